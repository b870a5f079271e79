//! Opening a store: superblocks, the newest checkpoint, then the log behind it.
//!
//! First of all the device is flushed: what a killed process wrote may be readable and not durable
//! (rule R2). Nothing is repaired on the device but the superblocks, which learn who opened it
//! (rule L5); damaged replicas are marked in the log as soon as the store runs.

use std::collections::HashMap;

use tercet_proto::disk::{
    EntryItem, FORMAT_VERSION, Get, Location, Malformed, RootBlock, Run, Slot, Superblock, crc32c,
};
use tercet_proto::storage::SnapshotState;
use tercet_proto::{BLOCK_BYTES, InstanceId, Promise, ReplicaId, SnapshotId, VolumeId};

use crate::arena::Buf;
use crate::disk::Disk;
use crate::format::{check_arena, check_capacity};
use crate::io::Io;
use crate::layout::{SLOT_BLOCKS, SUPERBLOCK_BLOCKS};
use crate::leaf::{Chunk, LeafNo, LeafPlace, Leaves};
use crate::load::LeafError;
use crate::map::Map;
use crate::options::{OpenError, OpenReport, Options};
use crate::replay::Replay;
use crate::replica::{LogEntry, Payload, Replica, Snapshot};
use crate::scan::scan;
use crate::store::{Store, Tombstone};

/// Leaves read at a time.
const LEAVES_AT_A_TIME: usize = 64;

impl Store {
    /// The instance that has opened the store before, as its superblocks say; none after format. It
    /// has ended, if the caller holds the device's exclusive lock (rules R3, L5): to be asked before
    /// the store is opened, which writes its own there. Reads a few blocks and writes nothing.
    ///
    /// # Errors
    /// As [`Store::open`]: what another store says counts for nothing.
    pub fn last_instance(
        disk: &mut dyn Disk,
        options: &Options,
    ) -> Result<Option<InstanceId>, OpenError> {
        check_arena(options)?;
        let mut io = Io::new(disk, options.arena.clone());
        let capacity_blocks = check_capacity(io.capacity_bytes())?;
        let found = read_superblock(&mut io)?;
        check_superblock(&found, options, capacity_blocks)?;
        Ok(opener_of(&found))
    }

    /// Opens the store on a device. The caller holds the device's exclusive lock (rule R3).
    ///
    /// # Errors
    /// See [`OpenError`]: each says what to do.
    pub fn open(
        disk: &mut dyn Disk,
        options: Options,
        instance: InstanceId,
    ) -> Result<(Self, OpenReport), OpenError> {
        check_arena(&options)?;
        let mut io = Io::new(disk, options.arena.clone());
        let capacity_blocks = check_capacity(io.capacity_bytes())?;
        io.flush()?;
        let found = read_superblock(&mut io)?;
        check_superblock(&found, &options, capacity_blocks)?;
        let previous = opener_of(&found);
        let (version, generation) = (FORMAT_VERSION, found.generation + 1);
        let superblock = Superblock { version, generation, instance, ..found };
        for block in order(superblock.generation) {
            io.write(block, &*superblock.encode(), true)?;
        }
        let (mut store, mut report) = load(&mut io, options, superblock)?;
        report.previous_instance = previous;
        for volume in &report.damaged {
            let incomplete = store.replicas[volume].incomplete;
            store.push_incomplete(*volume, incomplete, None);
        }
        store.resume_fills();
        store.changed = !store.log.records.is_empty();
        Ok((store, report))
    }
}

/// The state that the newest checkpoint and the log behind it say. Writes nothing.
pub(crate) fn load(
    io: &mut Io<'_>,
    options: Options,
    superblock: Superblock,
) -> Result<(Store, OpenReport), OpenError> {
    let slot = read_slot(io, &superblock)?;
    let strict = is_strict(&options);
    let mut store = Store::with(options, superblock, slot.log_start);
    let root = Root::read(io, &slot, &store.superblock, &mut store.leaves)?;
    let pending = root.fill(io, &mut store)?;
    let data = |run: Run| store.alloc.contains(run);
    let scan = scan(io, store.superblock.store, store.log.ring, &data, &slot, strict)?;
    store.checkpoint_durable = slot.sequence;
    store.log_before_start = (slot.previous, slot.previous_crc);
    store.log.previous = store.log_before_start;
    let report = Replay::new(&mut store, slot.frozen, pending).run(scan);
    store.alloc.seek_longest();
    Ok((store, report))
}

/// Who opened the store last; none after format.
fn opener_of(superblock: &Superblock) -> Option<InstanceId> {
    let instance = superblock.instance;
    (instance.as_bytes() != &[0; 16]).then_some(instance)
}

/// The older copy is overwritten first, so that one is whole at any moment.
fn order(generation: u64) -> [u32; 2] {
    let first = (generation % 2) as usize;
    [SUPERBLOCK_BLOCKS[first], SUPERBLOCK_BLOCKS[1 - first]]
}

#[cfg(not(feature = "canary"))]
fn is_strict(_options: &Options) -> bool {
    true
}

#[cfg(feature = "canary")]
fn is_strict(options: &Options) -> bool {
    options.canary != Some(crate::options::Canary::TornTailForDamage)
}

pub(crate) fn read_superblock(io: &mut Io<'_>) -> Result<Superblock, OpenError> {
    let mut found: Option<Superblock> = None;
    let mut why = Vec::new();
    for block in SUPERBLOCK_BLOCKS {
        match Superblock::decode(&io.read((block, 1))?) {
            Ok(one) => {
                if found.as_ref().is_none_or(|other| other.generation < one.generation) {
                    found = Some(one);
                }
            }
            Err(error) => why.push(format!("block {block}: {error}")),
        }
    }
    found.ok_or_else(|| OpenError::Superblock(why.join(", ")))
}

pub(crate) fn check_superblock(
    found: &Superblock,
    options: &Options,
    capacity_blocks: u32,
) -> Result<(), OpenError> {
    if let Some((cluster, node, shard)) = &options.expect
        && (found.cluster, &found.node, found.shard) != (*cluster, node, *shard)
    {
        return Err(OpenError::WrongStore {
            found: format!("cluster {}, node {}, shard {}", found.cluster, found.node, found.shard),
            expected: format!("cluster {cluster}, node {node}, shard {shard}"),
        });
    }
    if found.capacity_blocks > capacity_blocks {
        return Err(OpenError::Shrunk {
            store_bytes: u64::from(found.capacity_blocks) * BLOCK_BYTES as u64,
            capacity_bytes: u64::from(capacity_blocks) * BLOCK_BYTES as u64,
        });
    }
    let ends = |run: Run| u64::from(run.0) + u64::from(run.1);
    let fits = found.ring.1 > 0
        && found.data.1 > 0
        && ends(found.ring) <= u64::from(found.data.0)
        && ends(found.data) <= u64::from(found.capacity_blocks);
    if !fits {
        return Err(OpenError::Damaged("the superblock divides the device badly".to_owned()));
    }
    Ok(())
}

fn read_slot(io: &mut Io<'_>, superblock: &Superblock) -> Result<Slot, OpenError> {
    let mut found: Option<Slot> = None;
    for block in SLOT_BLOCKS {
        let Ok(slot) = Slot::decode(&io.read((block, 1))?) else {
            continue;
        };
        let mine = slot.store == superblock.store;
        if mine && found.is_none_or(|other| other.sequence < slot.sequence) {
            found = Some(slot);
        }
    }
    found.ok_or_else(|| OpenError::Damaged("neither checkpoint slot can be read".to_owned()))
}

fn bad(what: &str) -> impl Fn(Malformed) -> OpenError + '_ {
    move |error| OpenError::Damaged(format!("{what}: {error}"))
}

#[derive(Debug)]
struct RootReplica {
    volume: VolumeId,
    replica: Replica,
    carried: Vec<EntryItem>,
    snapshots: Vec<SnapshotState>,
    /// Newest first.
    maps: Vec<Map>,
}

/// The decoded root stream.
#[derive(Debug)]
struct Root {
    runs: Vec<Run>,
    next_number: u64,
    next_leaf: u64,
    tombstones: Vec<Tombstone>,
    replicas: Vec<RootReplica>,
}

/// What is decoded, and the leaves that it names.
struct Reader<'a, 'b> {
    get: Get<'a>,
    leaves: &'b mut Leaves,
    /// Those that were named before, by id.
    known: HashMap<u64, LeafNo>,
}

impl Root {
    fn read(
        io: &mut Io<'_>,
        slot: &Slot,
        superblock: &Superblock,
        leaves: &mut Leaves,
    ) -> Result<Self, OpenError> {
        let mut stream = Vec::new();
        let mut runs = Vec::new();
        let mut next = slot.root;
        for index in 0..slot.root_blocks {
            if next < superblock.data.0 || next >= superblock.capacity_blocks {
                return Err(OpenError::Damaged("the root chain leads outside".to_owned()));
            }
            let block = RootBlock::decode(&io.read((next, 1))?).map_err(bad("a root block"))?;
            let expected = (superblock.store, slot.sequence, index);
            if (block.store, block.sequence, block.index) != expected {
                return Err(OpenError::Damaged("a root block is another's".to_owned()));
            }
            runs.push((next, 1));
            stream.extend_from_slice(&block.payload);
            next = block.next;
        }
        if stream.len() as u64 != slot.root_bytes || crc32c(&stream) != slot.root_crc {
            return Err(OpenError::Damaged("the root has not its checksum".to_owned()));
        }
        let mut reader = Reader { get: Get(&stream), leaves, known: HashMap::new() };
        let mut root = reader.root().map_err(bad("the root"))?;
        root.runs = runs;
        Ok(root)
    }

    /// Puts everything into the store; the carried entries are given back for the replay.
    fn fill(
        self,
        io: &mut Io<'_>,
        store: &mut Store,
    ) -> Result<Vec<(VolumeId, LogEntry)>, OpenError> {
        read_leaves(io, store)?;
        store.alloc.hold_runs(&self.runs);
        store.root_blocks = self.runs.len() as u64;
        store.root_runs = self.runs;
        store.next_number = self.next_number;
        store.leaves.next_id = self.next_leaf;
        store.tombstones = self.tombstones;
        let mut carried = Vec::new();
        for found in self.replicas {
            let mut maps = found.maps.into_iter();
            let mut replica = found.replica;
            replica.head = maps.next().expect("the head's");
            // Maps stand newest first, snapshots oldest first.
            let mut older: Vec<Map> = maps.collect();
            for state in found.snapshots {
                let map = older.pop().expect("one for each snapshot");
                replica.snapshots.push(Snapshot { state, map });
            }
            for entry in found.carried {
                let payload = match entry.location {
                    Location::None => Payload::None,
                    Location::Extents(runs) => Payload::Extents(runs),
                    Location::Record(_) => {
                        let text = "a carried entry lies in a record".to_owned();
                        return Err(OpenError::Damaged(text));
                    }
                };
                let crcs = entry.crcs.into();
                let entry =
                    LogEntry { header: entry.header, payload, crcs, memory: None, position: 0 };
                carried.push((found.volume, entry));
            }
            store.replicas.insert(found.volume, replica);
        }
        Ok(carried)
    }
}

impl Reader<'_, '_> {
    fn root(&mut self) -> Result<Root, Malformed> {
        let (next_number, next_leaf) = (self.get.u64()?, self.get.u64()?);
        let (runs, tombstones, replicas) = (Vec::new(), Vec::new(), Vec::new());
        let mut root = Root { runs, next_number, next_leaf, tombstones, replicas };
        for _ in 0..self.get.u32()? {
            let (volume, replica) = (VolumeId(self.get.uuid()?), ReplicaId(self.get.uuid()?));
            let config = if self.get.flag()? { Some(self.get.config()?) } else { None };
            root.tombstones.push(Tombstone { volume, replica, config });
        }
        for _ in 0..self.get.u32()? {
            root.replicas.push(self.replica()?);
        }
        Ok(root)
    }

    fn replica(&mut self) -> Result<RootReplica, Malformed> {
        let get = &mut self.get;
        let number = get.u64()?;
        let (volume, id) = (VolumeId(get.uuid()?), ReplicaId(get.uuid()?));
        let name = get.text()?.to_owned();
        let size_blocks = get.u64()?;
        let mut replica = Replica::new(number, id, name, Map::default(), size_blocks);
        replica.incomplete = get.incomplete()?;
        if get.flag()? {
            replica.promise = Some(Promise { config: get.config()? });
        }
        replica.applied = get.place()?;
        replica.durable = get.place()?;
        replica.tail = replica.durable;
        let carried = (0..get.u32()?).map(|_| EntryItem::decode(get)).collect::<Result<_, _>>()?;
        let snapshots: Vec<SnapshotState> = (0..get.u32()?)
            .map(|_| {
                let (id, place) = (SnapshotId(get.uuid()?), get.place()?);
                Ok(SnapshotState { id, place, size_blocks: get.u64()? })
            })
            .collect::<Result<_, Malformed>>()?;
        let mut maps: Vec<Map> = Vec::new();
        for _ in 0..=snapshots.len() {
            let map = self.map(maps.last())?;
            maps.push(map);
        }
        Ok(RootReplica { volume, replica, carried, snapshots, maps })
    }

    fn map(&mut self, newer: Option<&Map>) -> Result<Map, Malformed> {
        let total = self.get.u32()? as usize;
        let mut chunks: Vec<Chunk> = Vec::new();
        while chunks.len() < total {
            let room = total - chunks.len();
            let tag = self.get.u8()?;
            if tag >= 2 {
                let leaf = self.leaf(tag, chunks.len() as u32)?;
                chunks.push(leaf);
                continue;
            }
            let count = self.get.u32()? as usize;
            if count == 0 || count > room {
                return Err(Malformed("a map"));
            }
            if tag == 0 {
                let from = chunks.len();
                let same = newer.filter(|newer| from + count <= newer.len());
                let same = same.ok_or(Malformed("a map"))?;
                chunks.extend((from..from + count).map(|index| same.chunk(index)));
            } else {
                chunks.resize(chunks.len() + count, Chunk::Hole(self.get.place()?));
            }
        }
        Ok(Map::of(&chunks, newer, self.leaves))
    }

    fn leaf(&mut self, tag: u8, chunk: u32) -> Result<Chunk, Malformed> {
        if tag > 3 {
            return Err(Malformed("a map"));
        }
        let get = &mut self.get;
        let (id, crc) = (get.u64()?, get.u32()?);
        let runs: Vec<Run> = (0..get.u8()?)
            .map(|_| Ok((get.u32()?, get.u32()?)))
            .collect::<Result<_, Malformed>>()?;
        if runs.is_empty() || runs.iter().any(|run| run.1 > 8) {
            return Err(Malformed("a leaf's place"));
        }
        let leaves = &mut *self.leaves;
        let known = self.known.entry(id);
        let no = *known.or_insert_with(|| leaves.found(LeafPlace { id, crc, chunk, runs }));
        Ok(Chunk::Leaf { no, inherited: tag == 3 })
    }
}

/// Counts what every leaf holds. None of them stays in memory.
fn read_leaves(io: &mut Io<'_>, store: &mut Store) -> Result<(), OpenError> {
    let all: Vec<LeafNo> = store.leaves.all().collect();
    for group in all.chunks(LEAVES_AT_A_TIME) {
        let places: Vec<LeafPlace> = group.iter().map(|no| store.leaves.place_of(*no)).collect();
        let runs: Vec<Run> = places.iter().flat_map(|place| place.runs.clone()).collect();
        if !runs.iter().all(|run| store.alloc.contains(*run)) {
            return Err(OpenError::Damaged("a leaf lies outside".to_owned()));
        }
        let mut bufs = io.read_all(&runs)?.into_iter();
        for (no, place) in group.iter().zip(&places) {
            let bufs: Vec<Buf> = bufs.by_ref().take(place.runs.len()).collect();
            let bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
            let found = store.decode_leaf(place, &bytes);
            let blocks = found.map_err(|error| match error {
                LeafError::Device(error) => OpenError::Device(error),
                LeafError::Damaged(why) => OpenError::Damaged(why),
            })?;
            for block in blocks.iter().filter(|block| block.device != 0) {
                store.alloc.hold(block.device);
            }
            store.alloc.hold_runs(&place.runs);
            store.leaves.set_written(*no, &blocks);
        }
    }
    Ok(())
}
