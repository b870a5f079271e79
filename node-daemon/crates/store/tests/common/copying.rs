//! A copy by stamps (rule C2) straight over the seam: plays source and target, knows no network, and
//! asks the target what it has, block by block.

use bytes::Bytes;
use tercet_proto::copy::{COPY_BLOCKS_MAX, Piece, StampRun, View};
use tercet_proto::storage::{Incomplete, Storage, StorageError};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, Copies, Entry, EntryKind, Place, Stamps, Token, ViewId, VolumeId,
};

use super::{ModelEntry, ModelVolume, World, payload};

/// Of a block: the entry that changed it last, and whether it is a hole.
pub type Stamp = (Place, bool);

/// What a pass has copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    pub data_blocks: u64,
    pub hole_blocks: u64,
}

/// A source's volume as it was frozen.
#[derive(Clone, Debug)]
pub struct Frozen {
    pub view: View,
    pub model: ModelVolume,
    /// Of each block of the volume.
    pub stamps: Vec<Stamp>,
}

pub fn expand(runs: &[StampRun]) -> Vec<Stamp> {
    let block = |run: &StampRun| vec![(run.stamp, run.hole); run.count as usize];
    runs.iter().flat_map(block).collect()
}

/// Stamps of a volume's newest state, as the store has them.
pub fn stamps(world: &mut World, volume: VolumeId) -> Vec<Stamp> {
    let size = world.store.replica(volume).expect("there").size_blocks;
    own_stamps(world, volume, BlockRange { start: 0, count: size as u32 })
}

pub fn own_stamps(world: &mut World, volume: VolumeId, range: BlockRange) -> Vec<Stamp> {
    let token = Token(world.fresh());
    let stamps = world.store.stamps(volume, range, token);
    expand(&come(world, token, stamps))
}

/// The stamps, at once or when they have been read.
fn come(world: &mut World, token: Token, stamps: Stamps) -> Vec<StampRun> {
    match stamps {
        Stamps::Here(runs) => return runs,
        Stamps::Gone => panic!("a part of a view"),
        Stamps::Later => {}
    }
    world.pump();
    loop {
        if let Some(result) = world.stamps.remove(&token) {
            return result.expect("stamps can be read");
        }
        assert!(world.complete_one(), "nothing is on its way, and no answer");
    }
}

fn view_stamps(world: &mut World, view: ViewId, part: usize, from: u64) -> Vec<StampRun> {
    let token = Token(world.fresh());
    let stamps = world.store.view_stamps(view, part, from, token);
    come(world, token, stamps)
}

/// All that a view says of a part.
pub fn part_stamps(world: &mut World, view: ViewId, part: usize) -> Vec<Stamp> {
    let mut all = Vec::new();
    loop {
        let runs = view_stamps(world, view, part, all.len() as u64);
        if runs.is_empty() {
            return all;
        }
        all.extend(expand(&runs));
    }
}

pub fn freeze(source: &mut World, volume: VolumeId) -> Frozen {
    let view = source.store.freeze(volume).expect("complete");
    let mut model = source.model[&volume].clone();
    assert_eq!(view.place, model.place_at(model.applied), "C2: what is applied");
    model.log.truncate(model.applied as usize);
    Frozen { stamps: stamps(source, volume), view, model }
}

/// What happens between any two steps of a target.
pub type Hook<'a> = &'a mut dyn FnMut(&mut World);

/// Lets the target go on until a token is answered.
fn wait(target: &mut World, token: Token, hook: Hook<'_>) -> Result<(), StorageError> {
    loop {
        target.pump();
        if let Some(result) = target.dones.remove(&token) {
            return result;
        }
        hook(target);
        assert!(target.complete_one(), "nothing is on its way, and no answer");
    }
}

fn read_view(source: &mut World, view: ViewId, part: usize, ranges: &[BlockRange]) -> Bytes {
    let token = Token(source.fresh());
    source.store.read_view(view, part, ranges, token);
    source.pump();
    loop {
        if let Some(result) = source.other_reads.remove(&token) {
            return result.expect("a view can be read").concat().into();
        }
        assert!(source.complete_one(), "nothing is on its way, and no answer");
    }
}

pub fn mark_incomplete(target: &mut World, volume: VolumeId) {
    let token = Token(target.fresh());
    target.store.set_incomplete(volume, Some(Incomplete::Unknown), token);
    wait(target, token, &mut |_| {}).expect("marked");
}

/// One copy, on its way.
pub struct Copying<'a> {
    pub source: &'a mut World,
    pub target: &'a mut World,
    pub volume: VolumeId,
    /// Work at the source meanwhile.
    pub meanwhile: &'a mut dyn FnMut(&mut World),
    pub hook: Hook<'a>,
}

impl Copying<'_> {
    /// Makes the target what the view is, not durably yet.
    pub fn pass(&mut self, view: &View) -> Passed {
        let mut passed = Passed::default();
        self.target.store.copy_begin(self.volume, &view.snapshots);
        for part in 0..=view.snapshots.len() {
            let snapshot = view.snapshots.get(part);
            let have = self.target.store.snapshots(self.volume);
            if snapshot.is_some_and(|snapshot| have.contains(snapshot)) {
                continue;
            }
            let size = snapshot.map_or(view.size_blocks, |snapshot| snapshot.size_blocks);
            self.target.store.copy_resize(self.volume, size);
            self.part(view.id, part, size, &mut passed);
            if let Some(snapshot) = snapshot {
                self.target.store.copy_snapshot(self.volume, snapshot.clone());
            }
            (self.meanwhile)(self.source);
        }
        passed
    }

    fn part(&mut self, view: ViewId, part: usize, size: u64, passed: &mut Passed) {
        let mut from = 0;
        loop {
            let runs = view_stamps(self.source, view, part, from);
            if runs.is_empty() {
                assert_eq!(from, size, "stamps reach the end of a part");
                return;
            }
            let wanted = expand(&runs);
            let range = BlockRange { start: from, count: wanted.len() as u32 };
            let have = own_stamps(self.target, self.volume, range);
            assert_eq!(wanted.len(), have.len());
            self.differing(view, part, from, (&wanted, &have), passed);
            from += wanted.len() as u64;
            (self.meanwhile)(self.source);
        }
    }

    fn differing(
        &mut self,
        view: ViewId,
        part: usize,
        from: u64,
        (wanted, have): (&[Stamp], &[Stamp]),
        passed: &mut Passed,
    ) {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut blocks = 0;
        for (index, ((stamp, hole), have)) in wanted.iter().zip(have).enumerate() {
            if (*stamp, *hole) == *have {
                continue;
            }
            let at = from + index as u64;
            blocks += u32::from(!hole);
            if *hole {
                passed.hole_blocks += 1;
            } else {
                passed.data_blocks += 1;
            }
            match pieces.last_mut() {
                Some(last)
                    if last.range.end() == at
                        && last.stamp == *stamp
                        && last.data.is_none() == *hole =>
                {
                    last.range.count += 1;
                }
                _ => pieces.push(Piece {
                    range: BlockRange { start: at, count: 1 },
                    stamp: *stamp,
                    data: (!hole).then(Bytes::new),
                }),
            }
            if blocks == COPY_BLOCKS_MAX {
                self.send(view, part, std::mem::take(&mut pieces));
                blocks = 0;
            }
        }
        if !pieces.is_empty() {
            self.send(view, part, pieces);
        }
    }

    fn send(&mut self, view: ViewId, part: usize, mut pieces: Vec<Piece>) {
        let data = pieces.iter().filter(|piece| piece.data.is_some());
        let ranges: Vec<BlockRange> = data.map(|piece| piece.range).collect();
        let mut bytes = read_view(self.source, view, part, &ranges);
        for piece in pieces.iter_mut().filter(|piece| piece.data.is_some()) {
            piece.data = Some(bytes.split_to(piece.range.count as usize * BLOCK_BYTES));
        }
        loop {
            let token = Token(self.target.fresh());
            self.target.store.copy_write(self.volume, pieces.clone(), token);
            match wait(self.target, token, self.hook) {
                Ok(()) => return,
                Err(StorageError::Busy) => {
                    self.target.store.request_checkpoint();
                    self.target.settle();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn settle(&mut self) {
        let token = Token(self.target.fresh());
        self.target.store.copy_settle(self.volume, token);
        wait(self.target, token, self.hook).expect("settled");
    }

    pub fn finish(&mut self, frozen: &Frozen) {
        let token = Token(self.target.fresh());
        self.target.store.copy_finish(self.volume, frozen.view.place, token);
        wait(self.target, token, self.hook).expect("finished");
        adopt(self.target, self.volume, frozen);
    }

    pub fn whole(&mut self, frozen: &Frozen) -> Passed {
        let passed = self.pass(&frozen.view);
        self.settle();
        self.finish(frozen);
        passed
    }
}

/// From now on the target's model is the view's.
pub fn adopt(target: &mut World, volume: VolumeId, frozen: &Frozen) {
    let replica = target.model[&volume].replica;
    let model = ModelVolume {
        replica,
        acked: frozen.view.place,
        promise_acked: 0,
        promise_asked: 0,
        ..frozen.model.clone()
    };
    target.model.insert(volume, model);
}

/// Puts another store's entries into this one's log.
pub fn follow(world: &mut World, volume: VolumeId, entries: &[ModelEntry]) {
    for entry in entries {
        let bytes = match entry.header.kind {
            EntryKind::Write { range, .. } => payload(entry.tag, range.count),
            _ => Bytes::new(),
        };
        let one = vec![Entry { header: entry.header, payload: bytes }];
        while let Err(error) = world.store.append(volume, None, one.clone()) {
            assert_eq!(error, StorageError::Busy);
            world.store.request_checkpoint();
            world.settle();
        }
        let model = world.model.get_mut(&volume).expect("there");
        model.ever.insert(entry.header.place, entry.clone());
        model.log.push(entry.clone());
        world.pump();
    }
    world.settle();
}

/// The target is the view: place, size, snapshots, each byte, each stamp, and it counts right.
pub fn assert_is_view(target: &mut World, volume: VolumeId, frozen: &Frozen, what: &str) {
    let state = target.store.replica(volume).expect("there");
    assert_eq!(state.incomplete, None, "{what}");
    assert_eq!((state.applied, state.size_blocks), (frozen.view.place, frozen.view.size_blocks));
    assert_eq!(target.store.snapshots(volume), frozen.view.snapshots, "{what}");
    assert!(stamps(target, volume) == frozen.stamps, "{what}: other stamps");
    target.compare_all();
    target.assert_well(what);
}
