//! A node's device: the store's own simulated disk, which completes operations late and in any order
//! here, and forgets what it may forget when the power goes.
//!
//! When only the process dies, what it had submitted lands before anybody gets the lock (rule R3),
//! and stays volatile (rule R2).

use rand::Rng;
use rand::rngs::SmallRng;
use tercet_proto::BLOCK_BYTES;
use tercet_proto::disk::StoreId;
use tercet_proto::{InstanceId, Instant};
use tercet_shard::{
    Event, FormatOptions, Identity, OpenError, OpenReport, Options, ScrubPace, Shard,
};
use tercet_store::arena::Arena;
use tercet_store::disk::{Disk, DiskOp, DiskToken};
use tercet_store::simdisk::SimDisk;

use crate::canaries::Canary;
use crate::world::World;
use uuid::Uuid;

/// Bytes of a device.
const CAPACITY_BYTES: u64 = 48 << 20;

/// A ring that is cut behind replicas that are away for long.
const SMALL_RING_BLOCKS: u32 = 1024;

/// Bytes of an engine's buffers.
const ARENA_BYTES: usize = 16 << 20;

/// Where the log ring begins (docs/disk-format.md).
const RING_START: u64 = 64;

/// A device with its faults.
pub struct Device {
    disk: SimDisk,
    arena: Arena,
    formatted: bool,
    ring_blocks: u32,
    duration_ns: (u64, u64),
    /// How it is scrubbed.
    pub scrub: Option<ScrubPace>,
    /// Everything takes this many times as long.
    pub slow: u64,
    /// Nothing completes before.
    pub stuck_until: u64,
}

impl Device {
    /// An empty device.
    pub fn new(rng: &mut SmallRng, duration_ns: (u64, u64)) -> Self {
        Self {
            disk: SimDisk::new(CAPACITY_BYTES),
            arena: Arena::new(ARENA_BYTES),
            formatted: false,
            ring_blocks: if rng.random_ratio(1, 4) { SMALL_RING_BLOCKS } else { 4096 },
            duration_ns,
            scrub: None,
            slow: 1,
            stuck_until: 0,
        }
    }

    fn options(&self, canary: Option<Canary>) -> Options {
        let store = tercet_store::options::Options::new(self.arena.clone());
        // Four leaves: what is mapped is read from the device again and again.
        let store = tercet_store::options::Options { leaf_cache_bytes: 96 << 10, ..store };
        let mut options = Options::new(store);
        options.store.scrub = self.scrub;
        break_rule(&mut options, canary);
        options
    }

    /// The instance whose exit the lock proves (L5).
    pub fn last_instance(&mut self) -> Result<Option<InstanceId>, OpenError> {
        if !self.formatted {
            return Ok(None);
        }
        let options = self.options(None);
        Shard::last_instance(&mut self.disk, &options)
    }

    /// Formats it when it is new, and opens the shard on it.
    pub fn open(
        &mut self,
        identity: Identity,
        canary: Option<Canary>,
        now: Instant,
    ) -> Result<(Shard, OpenReport), OpenError> {
        let options = self.options(canary);
        if !self.formatted {
            self.formatted = true;
            let format = FormatOptions {
                store: StoreId(*identity.instance.as_bytes()),
                cluster: Uuid::nil(),
                node: identity.node.clone(),
                shard: identity.shard,
                ring_blocks: Some(self.ring_blocks),
                overwrite: false,
            };
            Shard::format(&mut self.disk, &format, &options)?;
        }
        Shard::open(&mut self.disk, identity, options, now)
    }

    /// The process is gone; what it had in flight lands before anybody gets the lock (R3).
    pub fn process_died(&mut self) {
        self.disk.kill(&mut |_| true);
    }

    /// The power is gone while a process runs. Whether anything was lost.
    pub fn power_loss(&mut self, rng: &mut SmallRng) -> bool {
        // Sometimes everything volatile is lost, sometimes nothing, mostly any part of it.
        let keeps: f64 = [0.0, 0.3, 0.7, 1.0][rng.random_range(0..4)];
        let mut lost = false;
        self.disk.power_cut(&mut |choice| {
            let whole = rng.random_bool(keeps);
            let kept = if whole { choice.versions } else { rng.random_range(0..choice.versions) };
            lost |= kept < choice.versions;
            kept
        });
        lost
    }

    /// A block goes bad: a bit flips, or it cannot be read any more.
    pub fn decay(&mut self, sector: u64, flip: Option<&mut SmallRng>) {
        match flip {
            Some(rng) => self.disk.flip(sector, rng.random_range(0..BLOCK_BYTES * 8)),
            None => self.disk.set_unreadable(sector),
        }
    }

    /// Flips a bit somewhere in the log ring, and makes all else durable: one fault, not two.
    pub fn rot(&mut self, rng: &mut SmallRng) -> Option<u64> {
        self.disk.power_cut(&mut |choice| choice.versions);
        let ring = RING_START..RING_START + u64::from(self.ring_blocks);
        let written: Vec<u64> =
            ring.filter(|sector| self.disk.sector(*sector).iter().any(|byte| *byte != 0)).collect();
        let sector = *written.get(rng.random_range(0..written.len().max(1)))?;
        self.disk.flip(sector, rng.random_range(0..BLOCK_BYTES * 8));
        Some(sector)
    }
}

/// The product's options, but for the rule that this run breaks.
fn break_rule(options: &mut Options, canary: Option<Canary>) {
    #[cfg(feature = "canary")]
    match canary {
        Some(Canary::Replication(canary)) => options.canary = Some(canary),
        Some(Canary::Store(canary)) => options.store.canary = Some(canary),
        None => {}
    }
    #[cfg(not(feature = "canary"))]
    let _ = (options, canary);
}

impl World {
    /// `Effect::Disk`.
    pub fn device_submit(&mut self, node: usize, token: DiskToken, op: DiskOp) {
        let life = self.nodes[node].life;
        let device = &mut self.nodes[node].device;
        device.disk.submit(token, op);
        let (range, slow, stuck) = (device.duration_ns, device.slow, device.stuck_until);
        let duration = self.between(range) * slow;
        let at = (self.now + duration).max(if stuck > self.now { stuck + duration } else { 0 });
        self.at(at, move |world| world.device_done(node, life, token));
    }

    fn device_done(&mut self, node: usize, life: u64, token: DiskToken) {
        if self.nodes[node].life != life || !self.nodes[node].runs() {
            return;
        }
        let now = self.now;
        let device = &mut self.nodes[node].device;
        if device.stuck_until > now {
            let later = device.stuck_until + 1;
            self.at(later, move |world| world.device_done(node, life, token));
            return;
        }
        let mut done = Vec::new();
        device.disk.complete(token);
        device.disk.poll(&mut done);
        for done in done {
            self.on_node(node, life, move |world| world.feed(node, Event::Disk(done)));
        }
    }
}
