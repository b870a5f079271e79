//! [`Shard`]: the store and the protocol of one device, as reactor and simulator see them.
//!
//! Life of a shard: [`Shard::format`] once; at each start [`Shard::open`], which blocks on the device
//! until the log is replayed and flushed (rule R2); then [`Shard::step`] for whatever happens. There
//! is no orderly end: a start is a recovery.

use tercet_proto::storage::Storage;
use tercet_proto::{InstanceId, Instant, Place, StorageEvent, VolumeId};
use tercet_replication::Node;
use tercet_replication::api::{Input, Output, ReplicaStatus};
use tercet_store::Store;
use tercet_store::disk::{Disk, DiskDone, DiskOp, DiskToken};

use crate::machine::{Backend, Machine, Protocol};
use crate::report::Options;
use crate::{Effect, Event, FormatOptions, Identity, OpenError, OpenReport, ScrubStatus, Usage};

/// One device's store and the replicas in it.
pub struct Shard {
    machine: Machine,
}

impl Shard {
    /// Makes an empty store on a device.
    ///
    /// # Errors
    /// The device has the wrong size, holds a store already, or fails.
    pub fn format(
        disk: &mut dyn Disk,
        format: &FormatOptions,
        options: &Options,
    ) -> Result<(), OpenError> {
        Store::format(disk, format, &options.store)
    }

    /// The instance that has opened the store on a device before: once the device is locked (rule R3),
    /// that is proof of its exit (L5), and there long before the log is replayed.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub fn last_instance(
        disk: &mut dyn Disk,
        options: &Options,
    ) -> Result<Option<InstanceId>, OpenError> {
        Store::last_instance(disk, &options.store)
    }

    /// Opens the store on a device that is locked (rule R3, at `identity.locked_at`), replays and
    /// flushes its log (R1, R2), and gives the dead instance's leases back: the lock proves that the
    /// instance which the superblocks name has ended (L5).
    ///
    /// # Errors
    /// What is wrong with the device, and what to do.
    pub fn open(
        disk: &mut dyn Disk,
        identity: Identity,
        options: Options,
        now: Instant,
    ) -> Result<(Self, OpenReport), OpenError> {
        let of_protocol = options.of_protocol(identity.clone());
        let (mut store, report) = Store::open(disk, options.store, identity.instance)?;
        let node = Node::new(of_protocol, now, &mut store);
        let mut machine = Machine::new(Box::new(store), Box::new(node));
        if let Some(previous) = report.previous_instance {
            machine.begin_with(Input::ProvenExit(identity.node, previous), now);
        }
        Ok((Self { machine }, report))
    }

    /// The one transition: appends to `effects` what shall be done, in order.
    pub fn step(&mut self, event: Event, now: Instant, effects: &mut Vec<Effect>) {
        self.machine.step(event, now, effects);
    }

    /// When it wants an [`Event::Tick`] at the latest; asked again after every step.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.machine.next_deadline()
    }

    /// Every replica here.
    pub fn statuses(&self) -> Vec<ReplicaStatus> {
        self.machine.statuses()
    }

    /// How full the device is.
    pub fn usage(&self) -> Usage {
        self.machine.usage()
    }

    /// How far scrub is, and what was found bad (rule C4).
    pub fn scrub_status(&self) -> ScrubStatus {
        self.machine.scrub_status()
    }

    /// Where on the device the bytes of a block of a volume are, in 4 KiB from its start: for tests
    /// that damage it. None where it is a hole, or its bytes are still in the log.
    pub fn place_of(&self, volume: VolumeId, block: u64) -> Option<u64> {
        self.machine.place_of(volume, block)
    }

    /// The entry that changed a block last, where that is at hand.
    pub fn stamp_of(&self, volume: VolumeId, block: u64) -> Option<Place> {
        self.machine.stamp_of(volume, block)
    }

    /// What is stored here, to look at.
    pub fn storage(&self) -> &dyn Storage {
        self.machine.storage()
    }

    /// Bytes that a replica's newest state maps, shared ones included.
    pub fn allocated_bytes(&self, volume: VolumeId) -> Option<u64> {
        self.machine.allocated_bytes(volume)
    }
}

impl Backend for Store {
    fn disk_done(&mut self, done: DiskDone, now: Instant) {
        self.on_disk(done, now);
    }

    fn tick(&mut self, now: Instant) {
        self.tick(now);
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.next_deadline()
    }

    fn take(&mut self, ops: &mut Vec<(DiskToken, DiskOp)>, events: &mut Vec<StorageEvent>) {
        self.take(ops, events);
    }

    fn usage(&self) -> Usage {
        self.usage()
    }

    fn scrub_status(&self) -> ScrubStatus {
        self.scrub_status()
    }

    fn place_of(&self, volume: VolumeId, block: u64) -> Option<u64> {
        self.place_of(volume, block)
    }

    fn stamp_of(&self, volume: VolumeId, block: u64) -> Option<Place> {
        self.stamp_of(volume, block)
    }

    fn allocated_bytes(&self, volume: VolumeId) -> Option<u64> {
        self.allocated_bytes(volume)
    }
}

impl Protocol for Node {
    fn step(
        &mut self,
        input: Input,
        now: Instant,
        storage: &mut dyn Storage,
        outputs: &mut Vec<Output>,
    ) {
        self.step(input, now, storage, outputs);
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.next_deadline()
    }

    fn statuses(&self) -> Vec<ReplicaStatus> {
        self.statuses()
    }
}
