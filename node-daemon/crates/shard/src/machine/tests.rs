//! The loop alone, with a store and a protocol of a few lines.

use std::time::Duration;

use bytes::Bytes;
use tercet_proto::storage::{Incomplete, NewReplica, ReplicaState, SnapshotState, StorageError};
use tercet_proto::{
    BlockRange, BlockVersion, Config, Copies, Entry, EntryHeader, Lsn, Piece, Place, Promise,
    Repairs, ReplicaId, Stamps, Token, View, ViewId, VolumeId,
};

use super::*;
use crate::{ScrubStatus, Usage};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);

/// Answers a read with an event at once; a flush is queued for each promise.
#[derive(Default)]
struct FakeStore {
    ops: Vec<(DiskToken, DiskOp)>,
    events: Vec<StorageEvent>,
    deadline: Option<Instant>,
    ticks: usize,
}

impl Copies for FakeStore {
    fn freeze(&mut self, _: VolumeId) -> Option<View> {
        None
    }
    fn thaw(&mut self, _: ViewId) {}
    fn view_stamps(&mut self, _: ViewId, _: usize, _: u64, _: Token) -> Stamps {
        Stamps::Gone
    }
    fn read_view(&mut self, _: ViewId, _: usize, _: &[BlockRange], _: Token) {}
    fn stamps(&mut self, _: VolumeId, _: BlockRange, _: Token) -> Stamps {
        Stamps::Here(Vec::new())
    }
    fn copy_begin(&mut self, _: VolumeId, _: &[SnapshotState]) {}
    fn copy_resize(&mut self, _: VolumeId, _: u64) {}
    fn copy_write(&mut self, _: VolumeId, _: Vec<Piece>, _: Token) {}
    fn copy_snapshot(&mut self, _: VolumeId, _: SnapshotState) {}
    fn copy_settle(&mut self, _: VolumeId, _: Token) {}
    fn copy_finish(&mut self, _: VolumeId, _: Place, _: Token) {}
}

impl Repairs for FakeStore {
    fn read_version(&mut self, _: VolumeId, _: BlockVersion, _: Token) {}
    fn repair(&mut self, _: VolumeId, _: BlockVersion, _: Bytes, _: Token) {}
}

impl Storage for FakeStore {
    fn replicas(&self) -> Vec<ReplicaState> {
        Vec::new()
    }
    fn replica(&self, _: VolumeId) -> Option<ReplicaState> {
        None
    }
    fn snapshots(&self, _: VolumeId) -> Vec<SnapshotState> {
        Vec::new()
    }
    fn create_replica(&mut self, _: NewReplica, _: Token) {}
    fn delete_replica(&mut self, _: VolumeId, _: ReplicaId, _: Token) {}
    fn tombstone(&self, _: VolumeId) -> Option<Config> {
        None
    }
    fn set_promise(&mut self, _: VolumeId, _: Promise, _: Token) {}
    fn set_incomplete(&mut self, _: VolumeId, _: Option<Incomplete>, token: Token) {
        self.ops.push((DiskToken(token.0), DiskOp::Flush));
    }
    fn append(&mut self, _: VolumeId, _: Option<Lsn>, _: Vec<Entry>) -> Result<(), StorageError> {
        Ok(())
    }
    fn header(&self, _: VolumeId, _: Lsn) -> Option<EntryHeader> {
        None
    }
    fn in_flight(&self, _: VolumeId) -> bool {
        false
    }
    fn read_log(&mut self, _: VolumeId, _: Lsn, _: usize, _: Token) {}
    fn apply(&mut self, _: VolumeId, _: Lsn) {}
    fn read(&mut self, _: VolumeId, _: BlockRange, token: Token) {
        self.events.push(StorageEvent::Read { token, result: Ok(vec![Bytes::new()]) });
    }
    fn chunk_sums(&mut self, _: VolumeId, _: Token) {}
    fn chunk_map(&mut self, _: VolumeId, _: u64, _: Token) {}
}

impl Backend for FakeStore {
    fn disk_done(&mut self, done: DiskDone, _: Instant) {
        self.events.push(StorageEvent::Done { token: Token(done.token.0), result: Ok(()) });
    }
    fn tick(&mut self, _: Instant) {
        self.ticks += 1;
        self.deadline = None;
        self.events.push(StorageEvent::Durable { volume: VOLUME, place: Place::EMPTY });
    }
    fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }
    fn take(&mut self, ops: &mut Vec<(DiskToken, DiskOp)>, events: &mut Vec<StorageEvent>) {
        ops.append(&mut self.ops);
        events.append(&mut self.events);
    }
    fn usage(&self) -> Usage {
        Usage::default()
    }
    fn scrub_status(&self) -> ScrubStatus {
        ScrubStatus::default()
    }
    fn place_of(&self, _: VolumeId, _: u64) -> Option<u64> {
        None
    }

    fn stamp_of(&self, _: VolumeId, _: u64) -> Option<Place> {
        None
    }
    fn allocated_bytes(&self, _: VolumeId) -> Option<u64> {
        None
    }
}

/// Reads three times, each after the other, then flushes; notes what it was given.
#[derive(Default)]
struct FakeProtocol {
    reads: u64,
}

impl Protocol for FakeProtocol {
    fn step(
        &mut self,
        input: Input,
        _: Instant,
        storage: &mut dyn Storage,
        outputs: &mut Vec<Output>,
    ) {
        outputs.push(Output::Fatal(format!("{input:?}")));
        match input {
            Input::Storage(StorageEvent::Read { .. }) if self.reads == 3 => {
                storage.set_incomplete(VOLUME, None, Token(9));
            }
            Input::Storage(StorageEvent::Read { .. }) | Input::Control(..) => {
                self.reads += 1;
                storage.read(VOLUME, BlockRange { start: 0, count: 1 }, Token(self.reads));
            }
            _ => {}
        }
    }
    fn next_deadline(&self) -> Option<Instant> {
        Some(Instant(50))
    }
    fn statuses(&self) -> Vec<ReplicaStatus> {
        Vec::new()
    }
}

fn said(effects: &[Effect]) -> String {
    let word = |effect: &Effect| match effect {
        Effect::Output(Output::Fatal(text)) => text.split(['(', ' ']).take(2).collect::<String>(),
        Effect::Output(_) => "other".into(),
        Effect::Disk(token, _) => format!("disk{}", token.0),
    };
    effects.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn events_of_storage_go_back_until_both_are_quiet() {
    let mut machine =
        Machine::new(Box::new(FakeStore::default()), Box::new(FakeProtocol::default()));
    let mut effects = Vec::new();
    let ask = tercet_replication::api::Control::ChunkSums(VOLUME);
    machine.step(Event::Input(Input::Control(Token(1), ask)), Instant(1), &mut effects);
    assert_eq!(said(&effects), "Control1, StorageRead StorageRead StorageRead disk9");
    effects.clear();
    let done = DiskDone { token: DiskToken(9), buf: None, result: Ok(()) };
    machine.step(Event::Disk(done), Instant(2), &mut effects);
    assert_eq!(said(&effects), "StorageDone");
}

#[test]
fn a_tick_goes_to_whoever_asked_for_it() {
    let store = FakeStore { deadline: Some(Instant(20)), ..FakeStore::default() };
    let mut machine = Machine::new(Box::new(store), Box::new(FakeProtocol::default()));
    let mut effects = Vec::new();
    assert_eq!(machine.next_deadline(), Some(Instant(20)));
    machine.step(Event::Tick, Instant(20), &mut effects);
    assert_eq!(said(&effects), "StorageDurable");
    assert_eq!(machine.next_deadline(), Some(Instant(50)));
    effects.clear();
    machine.step(Event::Tick, Instant(50) + Duration::from_nanos(1), &mut effects);
    assert_eq!(said(&effects), "Tick");
}
