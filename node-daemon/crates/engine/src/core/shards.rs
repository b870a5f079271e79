//! Shards of a reactor: opened, stepped, their effects carried out.

use std::collections::{BTreeMap, HashMap};
use std::process::exit;

use tercet_proto::disk::StoreId;
use tercet_proto::{BLOCK_BYTES, BlockVersion, InstanceId, NodeName, Token, VolumeId};
use tercet_reactor::{DiskId, FileDisk, now};
use tercet_replication::api::{
    Control, ControlDone, ControlError, Input, Notice as ShardNotice, Output, VolumeView,
};
use tercet_shard::{Effect, Event, FormatOptions, Identity, OpenError, Options, ScrubPace, Shard};
use tercet_store::arena::Arena;
use tercet_store::disk::{Disk, DiskDone, DiskOp, DiskToken};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::Core;
use super::types::{Answer, NewShard, ReplicaReport, ShardReport};
use crate::outbox::{Notice, Swap, SwapId};
use crate::supervisor::EXIT_FATAL;
use crate::table::Change;

/// Bytes at the start of a device that are looked at to tell a fresh one from a damaged one.
const BLANK_BYTES: u64 = 1 << 20;

/// A shard of this reactor, open or not.
pub(super) struct Slot {
    pub(super) shard: u16,
    device_id: String,
    disk: Option<DiskId>,
    inner: Option<Shard>,
    failed: Option<String>,
}

/// Requests of the agent's that have no answer yet.
#[derive(Default)]
pub(super) struct Asked {
    next: u64,
    waiting: HashMap<(usize, Token), (Answer, Option<VolumeId>)>,
}

/// What the agent told of volumes before their shard was open.
#[derive(Default)]
pub(super) struct Early {
    views: BTreeMap<(u16, VolumeId), VolumeView>,
}

impl Slot {
    pub(super) fn is_open(&self) -> bool {
        self.inner.is_some()
    }

    pub(super) fn next_deadline(&self) -> Option<tercet_proto::Instant> {
        self.inner.as_ref().and_then(Shard::next_deadline)
    }

    fn provisioned_bytes(&self) -> u64 {
        let replicas = self.inner.as_ref().map(|shard| shard.storage().replicas());
        let blocks = replicas.iter().flatten().map(|replica| replica.size_blocks);
        blocks.sum::<u64>() * BLOCK_BYTES as u64
    }

    pub(super) fn report(&self) -> ShardReport {
        ShardReport {
            shard: self.shard,
            usage: self.inner.as_ref().map(Shard::usage).unwrap_or_default(),
            provisioned_bytes: self.provisioned_bytes(),
            scrub: self.inner.as_ref().map(Shard::scrub_status).unwrap_or_default(),
            failed: self.failed.clone(),
        }
    }
}

impl Core {
    pub(super) fn slot_of(&self, volume: VolumeId) -> Option<usize> {
        let shard = self.table.held().shard_of(volume)?;
        self.open_slot(shard)
    }

    fn open_slot(&self, shard: u16) -> Option<usize> {
        self.slots.iter().position(|slot| slot.shard == shard && slot.is_open())
    }

    /// Opens a shard, formatting a fresh device; one that cannot be opened is left as it is and
    /// reported.
    pub(super) fn open_shard(&mut self, new: NewShard) {
        let NewShard { shard, device_id, device, locked_at } = new;
        let identity = Identity {
            node: self.directory.node.clone(),
            instance: self.directory.instance,
            shard,
            locked_at,
        };
        let mut slot = Slot { shard, device_id, disk: None, inner: None, failed: None };
        match self.reactor.add_disk(device) {
            Ok(disk) => {
                slot.disk = Some(disk);
                match self.open_store(disk, &identity) {
                    Ok(inner) => slot.inner = Some(inner),
                    Err(why) => {
                        slot.failed =
                            Some(format!("{why}; looked at again when the engine starts"));
                    }
                }
            }
            Err(error) => slot.failed = Some(error.to_string()),
        }
        let device = &slot.device_id;
        match &slot.failed {
            None => info!(device, shard, "the shard is open"),
            Some(why) => {
                error!(device, shard, error = why, "the shard cannot be opened");
                let message = format!("device {device}: {why}");
                let (volume, reason) = (None, "DeviceFailed");
                self.outbox.notice(Notice { volume, reason, message, warning: true });
            }
        }
        self.slots.push(slot);
        self.begin_shard(self.slots.len() - 1);
        self.outbox.changed();
    }

    fn open_store(&mut self, disk: DiskId, identity: &Identity) -> Result<Shard, String> {
        let plan = self.plan().cloned().expect("shards are opened by a plan");
        let mut file = FileDisk::new(&mut self.reactor, disk);
        let expect = (plan.cluster, identity.node.clone(), identity.shard);
        let mut store = tercet_store::Options::new(self.arena.clone());
        store.expect = Some(expect);
        store.scrub = Some(ScrubPace::default());
        #[cfg_attr(not(feature = "canary"), allow(unused_mut))]
        let mut options = Options::new(store);
        #[cfg(feature = "canary")]
        {
            options.canary = crate::canary::from_environment();
        }
        if blank(&mut file, &self.arena)? {
            info!(shard = identity.shard, "a fresh device: it is formatted");
            let format = FormatOptions {
                store: StoreId(Uuid::new_v4().into_bytes()),
                cluster: plan.cluster,
                node: identity.node.clone(),
                shard: identity.shard,
                ring_blocks: None,
                overwrite: false,
            };
            match Shard::format(&mut file, &format, &options) {
                // Only its first superblock is blank.
                Ok(()) | Err(OpenError::Formatted(_)) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        // Before the replay, which takes its time (L5).
        let last = Shard::last_instance(&mut file, &options).map_err(|error| error.to_string())?;
        self.directory.herald.tell(&plan, last.as_slice());
        let opened = Shard::open(&mut file, identity.clone(), options, now());
        let (shard, report) = opened.map_err(|error| error.to_string())?;
        let previous = report.previous_instance.map(|instance| instance.to_string());
        info!(shard = identity.shard, previous, entries = report.log_entries, "replayed");
        for volume in &report.damaged {
            error!(%volume, "its replica here is damaged and incomplete now (R1)");
        }
        Ok(shard)
    }

    /// What a shard is told once it is open.
    fn begin_shard(&mut self, slot: usize) {
        if !self.slots[slot].is_open() {
            return;
        }
        let node = self.directory.node.clone();
        for &instance in &self.directory.proven_exits {
            let exit = Input::ProvenExit(node.clone(), instance);
            self.work.push_back((slot, Event::Input(exit)));
        }
        let shard = self.slots[slot].shard;
        let early = std::mem::take(&mut self.early.views);
        for ((of, volume), view) in early {
            if of == shard {
                self.work.push_back((slot, Event::Input(Input::Observe(volume, view))));
            } else {
                self.early.views.insert((of, volume), view);
            }
        }
        let replicas = self.slots[slot].inner.as_ref().expect("it is open").storage().replicas();
        for replica in replicas {
            self.settle_home(shard, replica.volume);
            self.export(slot, replica.volume);
        }
    }

    /// A replica has been found here: whoever asks about its volume is sent here.
    fn settle_home(&mut self, shard: u16, volume: VolumeId) {
        if let Err(error) = self.table.write(Change::Home(volume, shard)) {
            error!(%volume, shard, %error, "the node's table cannot be changed");
        }
        let home = self.table.latest().home(volume);
        if home != Some(shard) {
            error!(%volume, shard, ?home, "a second replica of the volume is here: it is not used");
        }
    }

    /// Instances of a peer's node have ended (L5). A shard that is not open hears it with its links.
    pub(super) fn exited(&mut self, node: &NodeName, instances: &[InstanceId]) {
        for slot in (0..self.slots.len()).filter(|&slot| self.slots[slot].is_open()) {
            for &instance in instances {
                let exit = Input::ProvenExit(node.clone(), instance);
                self.work.push_back((slot, Event::Input(exit)));
            }
        }
    }

    pub(super) fn input(&mut self, shard: u16, input: Input) {
        let Some(slot) = self.open_slot(shard) else {
            if let Input::Observe(volume, mut view) = input {
                view.consistent = false; // it will be old by the time it is used
                self.early.views.insert((shard, volume), view);
            }
            return;
        };
        let observed = match &input {
            Input::Observe(volume, _) => Some(*volume),
            _ => None,
        };
        self.work.push_back((slot, Event::Input(input)));
        self.settle();
        if let Some(volume) = observed {
            self.export(slot, volume);
        }
    }

    /// A request of the agent's. Without the shard the answer is dropped, which tells.
    pub(super) fn control(&mut self, shard: u16, control: Control, answer: Answer) {
        let Some(slot) = self.open_slot(shard) else {
            return;
        };
        let token = Token(self.asked.next);
        self.asked.next += 1;
        let deleted = match &control {
            Control::DeleteReplica(volume, _) => Some(*volume),
            _ => None,
        };
        self.asked.waiting.insert((slot, token), (answer, deleted));
        self.work.push_back((slot, Event::Input(Input::Control(token, control))));
    }

    pub(super) fn disk_done(&mut self, disk: DiskId, done: DiskDone) {
        let slot = self.slots.iter().position(|slot| slot.disk == Some(disk));
        let slot = slot.expect("a device belongs to a shard");
        self.work.push_back((slot, Event::Disk(done)));
    }

    /// Steps shards until nothing is left to step.
    pub(super) fn settle(&mut self) {
        while let Some((slot, event)) = self.work.pop_front() {
            let Some(shard) = self.slots[slot].inner.as_mut() else {
                continue;
            };
            let mut effects = std::mem::take(&mut self.effects);
            shard.step(event, now(), &mut effects);
            for effect in effects.drain(..) {
                match effect {
                    Effect::Disk(token, op) => {
                        let disk = self.slots[slot].disk.expect("an open shard has a device");
                        self.reactor.submit(disk, token, op);
                    }
                    Effect::Output(output) => self.output(slot, output),
                }
            }
            self.effects = effects;
        }
    }

    fn output(&mut self, slot: usize, output: Output) {
        match output {
            Output::Send(peer, message) => self.send_message(slot, peer, &message),
            Output::Swap { token, volume, old, new } => {
                let id = SwapId { shard: self.slots[slot].shard, token };
                info!(%volume, from = old.epoch.0, to = new.epoch.0, "a swap is asked for");
                self.outbox.swap(id, Swap { volume, old, new });
            }
            Output::ReadConsistent(volume) => self.outbox.read(volume),
            Output::Fenced { volume, epoch, generation } => {
                self.outbox.fenced(volume, epoch, generation);
            }
            Output::ControlDone(token, result) => self.answer(slot, token, result),
            Output::Notice(volume, notice) => self.notice(volume, &notice),
            Output::Fatal(why) => {
                error!(shard = self.slots[slot].shard, why, "this engine stops for good");
                exit(i32::from(EXIT_FATAL));
            }
            Output::Ana(volume, _) => {
                self.export(slot, volume);
                self.host_output(output);
            }
            output => self.host_output(output),
        }
    }

    fn answer(&mut self, slot: usize, token: Token, result: Result<ControlDone, ControlError>) {
        let Some((answer, deleted)) = self.asked.waiting.remove(&(slot, token)) else {
            return warn!(?token, "an answer that nobody waits for");
        };
        if let (Some(volume), Ok(_)) = (deleted, &result) {
            let gone = self.slots[slot]
                .inner
                .as_ref()
                .is_none_or(|s| s.storage().replica(volume).is_none());
            if gone {
                self.hosts.withdraw(volume);
                self.carry_out_hosts();
            }
        }
        // Whoever asked may have given up.
        let _ = answer.send(result);
        self.outbox.changed();
    }

    fn notice(&self, volume: VolumeId, notice: &ShardNotice) {
        let node = &self.directory.node;
        let (reason, message, warning) = match notice {
            ShardNotice::Serving(epoch) => {
                ("Serving", format!("{node} serves as the primary of epoch {epoch}"), false)
            }
            ShardNotice::Stopped(epoch) => {
                ("Stopped", format!("{node} does not serve epoch {epoch} any more"), false)
            }
            ShardNotice::TakingOver(epoch) => {
                ("TakingOver", format!("{node} misses the primary of epoch {epoch}"), true)
            }
            ShardNotice::MemberInSync(member, true) => {
                ("InSync", format!("the replica on {member} is in sync"), false)
            }
            ShardNotice::MemberInSync(member, false) => {
                ("Lagging", format!("the replica on {member} has fallen behind"), true)
            }
            ShardNotice::RestoredObject(epoch) => (
                "RestoredObject",
                format!("the object is older than epoch {epoch}, which {node} has promised"),
                true,
            ),
            ShardNotice::Filled => {
                ("Filled", format!("the replica on {node} has its snapshot's blocks"), false)
            }
            ShardNotice::Learning(learner) => {
                ("Rebuilding", format!("a replica is copied to {learner}"), false)
            }
            ShardNotice::Changing(old, fresh) => {
                ("MembersChange", format!("{fresh} takes the place of {old}"), false)
            }
            ShardNotice::AbortingChange(epoch) => (
                "ChangeAborted",
                format!("too few of the new members answer: epoch {epoch} has those of before"),
                true,
            ),
            ShardNotice::Copied => {
                ("Copied", format!("the replica on {node} is complete again"), false)
            }
            ShardNotice::BadBlock(version) => {
                let message = format!("the replica on {node} has a bad {}", name_of(version));
                return warn!(%volume, "{message}: it is asked for elsewhere (C4)");
            }
            ShardNotice::Repaired(version) => {
                let what = name_of(version);
                ("BlockRepaired", format!("the replica on {node} had a bad {what}"), false)
            }
            ShardNotice::NotRepaired(version) => {
                let what = name_of(version);
                let message =
                    format!("the replica on {node} has a bad {what}, and no other has it");
                ("BadBlock", message, true)
            }
        };
        info!(%volume, reason, "{message}");
        self.outbox.notice(Notice { volume: Some(volume), reason, message, warning });
        self.outbox.changed();
    }

    /// Exports a volume whose replica is here and whose configuration is known.
    fn export(&mut self, slot: usize, volume: VolumeId) {
        let Some(shard) = self.slots[slot].inner.as_ref() else {
            return;
        };
        let Some(replica) = shard.storage().replica(volume) else {
            return;
        };
        if let Some(promise) = &replica.promise {
            let node = &self.directory.node;
            self.hosts.export(volume, replica.size_blocks, &promise.config, node);
            self.carry_out_hosts();
        }
    }

    pub(super) fn replica_reports(&self) -> Vec<ReplicaReport> {
        let mut reports = Vec::new();
        for shard in self.slots.iter().filter_map(|slot| slot.inner.as_ref()) {
            for status in shard.statuses() {
                let Some(replica) = shard.storage().replica(status.volume) else {
                    continue;
                };
                reports.push(ReplicaReport {
                    name: replica.name,
                    size_blocks: replica.size_blocks,
                    allocated_bytes: shard.allocated_bytes(status.volume).unwrap_or_default(),
                    snapshots: shard.storage().snapshots(status.volume),
                    hosts: self.hosts.of_volume(status.volume),
                    status,
                });
            }
        }
        reports
    }
}

fn name_of(version: &BlockVersion) -> String {
    match version.snapshot {
        None => format!("block {}", version.block),
        Some(snapshot) => format!("block {} of snapshot {snapshot}", version.block),
    }
}

/// Whether nothing was ever written to the start of the device.
fn blank(disk: &mut FileDisk<'_>, arena: &Arena) -> Result<bool, String> {
    let bytes = BLANK_BYTES.min(disk.capacity_bytes());
    let blocks = usize::try_from(bytes / 4096).expect("a mebibyte");
    let into = arena.take(blocks).ok_or("the arena is too small to look at the device")?;
    disk.submit(DiskToken(0), DiskOp::Read { offset: 0, into });
    let mut done = Vec::new();
    disk.wait(&mut done);
    let done = done.pop().expect("waited for");
    done.result.map_err(|error| error.to_string())?;
    Ok(done.buf.expect("a read's buffer comes back").iter().all(|&byte| byte == 0))
}
