//! How a store and a protocol make one state machine: storage's events go back into the protocol
//! until both are quiet, and only then does the executor get a turn.
//!
//! Nothing here knows a rule of replication.md; it keeps one promise that they build on: an event
//! of storage is delivered after the call that caused it has returned, and device operations are
//! handed out in the order in which they were queued.

use tercet_proto::storage::Storage;
use tercet_proto::{Instant, Place, StorageEvent, VolumeId};
use tercet_replication::api::{Input, Output, ReplicaStatus};
use tercet_store::disk::{DiskDone, DiskOp, DiskToken};

use crate::{Effect, Event, ScrubStatus, Usage};

/// Storage events that one step may bring about; more is a loop between store and protocol.
const EVENTS_PER_STEP_MAX: usize = 1 << 20;

/// What a shard needs of a store beside [`Storage`].
pub(crate) trait Backend: Storage {
    /// A device operation has completed.
    fn disk_done(&mut self, done: DiskDone, now: Instant);

    /// Time has come.
    fn tick(&mut self, now: Instant);

    /// When it wants a tick at the latest.
    fn next_deadline(&self) -> Option<Instant>;

    /// Moves out what is to be submitted, in order, and what has happened, in order.
    fn take(&mut self, ops: &mut Vec<(DiskToken, DiskOp)>, events: &mut Vec<StorageEvent>);

    /// How full the device is.
    fn usage(&self) -> Usage;

    /// How far scrub is, and what was found bad (rule C4).
    fn scrub_status(&self) -> ScrubStatus;

    /// Where on the device the bytes of a block are: in 4 KiB from its start.
    fn place_of(&self, volume: VolumeId, block: u64) -> Option<u64>;

    /// The entry that changed a block last, where that is at hand.
    fn stamp_of(&self, volume: VolumeId, block: u64) -> Option<Place>;

    /// Bytes that a replica's newest state maps.
    fn allocated_bytes(&self, volume: VolumeId) -> Option<u64>;
}

/// What a shard needs of the replication protocol.
pub(crate) trait Protocol {
    /// The one transition.
    fn step(
        &mut self,
        input: Input,
        now: Instant,
        storage: &mut dyn Storage,
        outputs: &mut Vec<Output>,
    );

    /// When it wants a tick at the latest.
    fn next_deadline(&self) -> Option<Instant>;

    /// Every replica here.
    fn statuses(&self) -> Vec<ReplicaStatus>;
}

/// A store and a protocol as one.
pub(crate) struct Machine {
    store: Box<dyn Backend>,
    protocol: Box<dyn Protocol>,
    outputs: Vec<Output>,
    ops: Vec<(DiskToken, DiskOp)>,
    events: Vec<StorageEvent>,
    /// What came about before the first step, and since when it waits for it.
    begun: Option<(Instant, Vec<Effect>)>,
}

impl Machine {
    pub(crate) fn new(store: Box<dyn Backend>, protocol: Box<dyn Protocol>) -> Self {
        let (outputs, ops, events) = (Vec::new(), Vec::new(), Vec::new());
        Self { store, protocol, outputs, ops, events, begun: None }
    }

    /// Something that the protocol learns before anything else; its effects come with the first
    /// step.
    pub(crate) fn begin_with(&mut self, input: Input, now: Instant) {
        let mut effects = Vec::new();
        self.protocol_step(input, now, &mut effects);
        self.begun = Some((now, effects));
    }

    pub(crate) fn step(&mut self, event: Event, now: Instant, effects: &mut Vec<Effect>) {
        if let Some((_, mut begun)) = self.begun.take() {
            effects.append(&mut begun);
        }
        match event {
            Event::Input(input) => self.protocol_step(input, now, effects),
            Event::Disk(done) => self.store.disk_done(done, now),
            Event::Tick => self.tick(now, effects),
        }
        self.settle(now, effects);
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let (a, b) = (self.store.next_deadline(), self.protocol.next_deadline());
        let begun = self.begun.as_ref().map(|(at, _)| *at);
        a.into_iter().chain(b).chain(begun).min()
    }

    pub(crate) fn statuses(&self) -> Vec<ReplicaStatus> {
        self.protocol.statuses()
    }

    pub(crate) fn usage(&self) -> Usage {
        self.store.usage()
    }

    pub(crate) fn scrub_status(&self) -> ScrubStatus {
        self.store.scrub_status()
    }

    pub(crate) fn place_of(&self, volume: VolumeId, block: u64) -> Option<u64> {
        self.store.place_of(volume, block)
    }

    pub(crate) fn stamp_of(&self, volume: VolumeId, block: u64) -> Option<Place> {
        self.store.stamp_of(volume, block)
    }

    pub(crate) fn storage(&self) -> &dyn Storage {
        self.store.as_ref()
    }

    pub(crate) fn allocated_bytes(&self, volume: VolumeId) -> Option<u64> {
        self.store.allocated_bytes(volume)
    }

    /// Only whoever asked for this time gets it, so that an idle half stays idle.
    fn tick(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.store.next_deadline().is_some_and(|at| at <= now) {
            self.store.tick(now);
        }
        if self.protocol.next_deadline().is_some_and(|at| at <= now) {
            self.protocol_step(Input::Tick, now, effects);
        }
    }

    fn protocol_step(&mut self, input: Input, now: Instant, effects: &mut Vec<Effect>) {
        self.protocol.step(input, now, self.store.as_mut(), &mut self.outputs);
        effects.extend(self.outputs.drain(..).map(Effect::Output));
    }

    /// Feeds storage's events back until there are none.
    fn settle(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let mut count = 0;
        loop {
            self.store.take(&mut self.ops, &mut self.events);
            effects.extend(self.ops.drain(..).map(|(token, op)| Effect::Disk(token, op)));
            if self.events.is_empty() {
                return;
            }
            for event in std::mem::take(&mut self.events) {
                count += 1;
                assert!(count < EVENTS_PER_STEP_MAX, "store and protocol feed each other");
                self.protocol_step(Input::Storage(event), now, effects);
            }
        }
    }
}

#[cfg(test)]
mod tests;
