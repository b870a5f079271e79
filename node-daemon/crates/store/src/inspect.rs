//! Looking at a device without changing it: what is on it, and whether all of it is whole.
//!
//! The same code as an opening reads checkpoint and log, so what this finds is what an engine would
//! find; then everything is counted again ([`Store::check`]) and every block that anything names is
//! read and compared with its CRC32C. Only reads are submitted. What is damaged is named by whose it
//! is; mending is left to replication, which has the other copies (rule C4).

use std::collections::HashSet;
use std::ops::Range;

use serde::Serialize;
use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock, Slot, Superblock, crc32c};
use tercet_proto::storage::{Incomplete, SnapshotState};
use tercet_proto::{BLOCK_BYTES, InstanceId, NodeName, Place, ReplicaId, SnapshotId, VolumeId};
use uuid::Uuid;

use crate::disk::Disk;
use crate::format::{check_arena, check_capacity};
use crate::io::Io;
use crate::layout::{SLOT_BLOCKS, SUPERBLOCK_BLOCKS};
use crate::leaf::{Chunk, LeafNo, Leaves};
use crate::map::Map;
use crate::open::{check_superblock, load, read_superblock};
use crate::options::{OpenError, OpenReport, Options};
use crate::replica::{Payload, Replica};
use crate::store::Store;

/// Blocks read at a time.
const WINDOW_BLOCKS: u32 = 128;

/// One copy of a structure of which there are two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Copy {
    /// Block of the device.
    pub block: u32,
    /// Generation of a superblock, number of a checkpoint; none: it cannot be read.
    pub number: Option<u64>,
    /// Why it cannot be read.
    pub problem: Option<String>,
}

/// A snapshot on the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotFacts {
    /// Which.
    pub snapshot: SnapshotId,
    /// The entry that made it.
    pub epoch: u64,
    /// The entry that made it.
    pub lsn: u64,
    /// Bytes of the volume then.
    pub size_bytes: u64,
    /// Bytes that its map names, shared ones included.
    pub mapped_bytes: u64,
}

/// A replica on the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReplicaFacts {
    /// The volume.
    pub volume: VolumeId,
    /// The replica.
    pub replica: ReplicaId,
    /// The volume's name.
    pub name: String,
    /// Bytes of the volume.
    pub size_bytes: u64,
    /// Whether it may be adopted (rule T5).
    pub complete: bool,
    /// What it may have acknowledged, when it is not complete.
    pub incomplete: Option<String>,
    /// The epoch that it has promised (rule T4).
    pub promised_epoch: Option<u64>,
    /// Last entry in its map: (epoch, lsn).
    pub applied: (u64, u64),
    /// Last entry of its log: (epoch, lsn).
    pub tail: (u64, u64),
    /// First lsn that its log retains.
    pub log_start_lsn: u64,
    /// Bytes that its map names, shared ones included.
    pub mapped_bytes: u64,
    /// Oldest first.
    pub snapshots: Vec<SnapshotFacts>,
}

/// What the newest checkpoint and the log behind it say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Contents {
    /// The cluster.
    pub cluster: Uuid,
    /// The node.
    pub node: NodeName,
    /// Number of the store on that node.
    pub shard: u16,
    /// Who opened it last; none: nobody since format.
    pub instance: Option<InstanceId>,
    /// Number of the newest checkpoint.
    pub checkpoint: u64,
    /// Bytes of the data area.
    pub capacity_bytes: u64,
    /// Bytes of it that are held.
    pub allocated_bytes: u64,
    /// Bytes of the log ring.
    pub log_bytes: u64,
    /// Records and entries behind the checkpoint's log start.
    pub log_records: u64,
    /// Entries among them.
    pub log_entries: u64,
    /// Deleted replicas that are remembered (rule M2).
    pub tombstones: u64,
    /// By volume.
    pub replicas: Vec<ReplicaFacts>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "problem", rename_all = "kebab-case")]
pub enum Problem {
    /// One of two copies cannot be read; the other one counts.
    Copy {
        /// Superblock or checkpoint slot.
        what: &'static str,
        /// Block of the device.
        block: u32,
        /// Why.
        why: String,
    },
    /// The store does not open.
    Closed {
        /// Why, and what to do.
        why: String,
    },
    /// The log is damaged below a mark: the replica is incomplete (rule R1).
    Log {
        /// The volume.
        volume: VolumeId,
    },
    /// What is counted is not what is found.
    Count {
        /// What.
        what: String,
    },
    /// A block has not its checksum.
    Block {
        /// Whose.
        volume: VolumeId,
        /// Of this snapshot; none: of the newest state, or of an entry.
        snapshot: Option<SnapshotId>,
        /// Block within the volume; none: an entry's.
        block: Option<u64>,
        /// The entry, when it is one's.
        lsn: Option<u64>,
        /// Block of the device.
        device_block: u32,
        /// A wrong checksum, or how the device fails.
        why: String,
    },
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Both superblocks.
    pub superblocks: Vec<Copy>,
    /// Both checkpoint slots. One is not there before the second checkpoint.
    pub slots: Vec<Copy>,
    /// None: the store does not open.
    pub contents: Option<Contents>,
    /// Blocks that were read and compared.
    pub blocks_checked: u64,
    /// Empty: all is well.
    pub problems: Vec<Problem>,
}

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Metadata and log.
    Metadata,
    /// And every block that they name.
    Blocks,
}

impl Store {
    /// Looks at the store on a device; nothing is written. `progress` hears of blocks done, and of
    /// how many there are. The caller keeps engines away (rule R3).
    ///
    /// # Errors
    /// The device or the arena is unfit, or the device fails; damage is a [`Problem`].
    pub fn inspect(
        disk: &mut dyn Disk,
        options: Options,
        depth: Depth,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Inspection, OpenError> {
        check_arena(&options)?;
        let mut io = Io::new(disk, options.arena.clone());
        let capacity_blocks = check_capacity(io.capacity_bytes())?;
        let mut found = copies(&mut io)?;
        let opened = read_superblock(&mut io).and_then(|superblock| {
            check_superblock(&superblock, &options, capacity_blocks)?;
            let instance = superblock.instance;
            load(&mut io, options, superblock).map(|(store, report)| (store, report, instance))
        });
        let (store, report, instance) = match opened {
            Ok(opened) => opened,
            Err(OpenError::Device(error)) => return Err(OpenError::Device(error)),
            Err(closed) => {
                found.problems.push(Problem::Closed { why: closed.to_string() });
                return Ok(found);
            }
        };
        let log = report.damaged.iter().map(|volume| Problem::Log { volume: *volume });
        let mut read = |run| io.read(run).map_or_else(|_| Vec::new(), |buf| buf.to_vec());
        let counts = store.check(&mut read).into_iter().map(|what| Problem::Count { what });
        found.problems.extend(log.chain(counts));
        found.contents = Some(contents(&store, &report, instance));
        if depth == Depth::Blocks {
            Blocks { io, store: &store, found: &mut found, progress }.all()?;
        }
        Ok(found)
    }
}

fn copies(io: &mut Io<'_>) -> Result<Inspection, OpenError> {
    let mut found = Inspection {
        superblocks: Vec::new(),
        slots: Vec::new(),
        contents: None,
        blocks_checked: 0,
        problems: Vec::new(),
    };
    for block in SUPERBLOCK_BLOCKS {
        let read = Superblock::decode(&io.read((block, 1))?).map(|one| one.generation);
        found.superblocks.push(copy("superblock", block, read, &mut found.problems));
    }
    for block in SLOT_BLOCKS {
        let bytes = io.read((block, 1))?;
        if bytes.iter().all(|byte| *byte == 0) {
            let problem = Some("never written".to_owned());
            found.slots.push(Copy { block, number: None, problem });
            continue;
        }
        let read = Slot::decode(&bytes).map(|one| one.sequence);
        found.slots.push(copy("checkpoint slot", block, read, &mut found.problems));
    }
    Ok(found)
}

fn copy(
    what: &'static str,
    block: u32,
    read: Result<u64, tercet_proto::disk::Malformed>,
    problems: &mut Vec<Problem>,
) -> Copy {
    let problem = read.as_ref().err().map(ToString::to_string);
    if let Some(why) = problem.clone() {
        problems.push(Problem::Copy { what, block, why });
    }
    Copy { block, number: read.ok(), problem }
}

fn contents(store: &Store, report: &OpenReport, instance: InstanceId) -> Contents {
    let usage = store.usage();
    Contents {
        cluster: store.superblock.cluster,
        node: store.superblock.node.clone(),
        shard: store.superblock.shard,
        instance: (instance.as_bytes() != &[0; 16]).then_some(instance),
        checkpoint: store.checkpoint_durable,
        capacity_bytes: usage.capacity_bytes,
        allocated_bytes: usage.allocated_bytes,
        log_bytes: usage.log_bytes,
        log_records: report.log_records,
        log_entries: report.log_entries,
        tombstones: store.tombstones.len() as u64,
        replicas: store
            .replicas
            .iter()
            .map(|(volume, one)| replica(*volume, one, &store.leaves))
            .collect(),
    }
}

fn replica(volume: VolumeId, found: &Replica, leaves: &Leaves) -> ReplicaFacts {
    let pair = |place: Place| (place.epoch.0, place.lsn.0);
    let snapshots = found.snapshots.iter().map(|one| {
        let SnapshotState { id, place, size_blocks } = one.state;
        let (epoch, lsn) = pair(place);
        let size_bytes = size_blocks * BLOCK_BYTES as u64;
        SnapshotFacts {
            snapshot: id,
            epoch,
            lsn,
            size_bytes,
            mapped_bytes: mapped(&one.map, leaves),
        }
    });
    ReplicaFacts {
        volume,
        replica: found.replica,
        name: found.name.clone(),
        size_bytes: found.size_blocks * BLOCK_BYTES as u64,
        complete: found.incomplete.is_none(),
        incomplete: found.incomplete.map(|incomplete| match incomplete {
            Incomplete::AcknowledgedUpTo(place) => {
                format!("acknowledged at most up to {:?}", pair(place))
            }
            Incomplete::Unknown => "nobody knows what it acknowledged".to_owned(),
            Incomplete::Awaits(source) => {
                format!("awaits snapshot {} of volume {}", source.snapshot, source.volume)
            }
        }),
        promised_epoch: found.promise.as_ref().map(|promise| promise.epoch().0),
        applied: pair(found.applied),
        tail: pair(found.tail),
        log_start_lsn: found.log_start().0,
        mapped_bytes: mapped(&found.head, leaves),
        snapshots: snapshots.collect(),
    }
}

fn mapped(map: &Map, leaves: &Leaves) -> u64 {
    map.written_blocks(leaves) * BLOCK_BYTES as u64
}

/// A block to compare: where it is and what it must be.
type Wanted = (u32, u32);

/// Whose a block is: volume, snapshot, block within the volume, entry.
type Owner = (VolumeId, Option<SnapshotId>, Option<u64>, Option<u64>);

/// Reads everything that maps and entries name.
struct Blocks<'a, 'b> {
    io: Io<'b>,
    store: &'a Store,
    found: &'a mut Inspection,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Blocks<'_, '_> {
    fn all(mut self) -> Result<(), OpenError> {
        let store = self.store;
        let total = u64::from(store.superblock.data.1) - store.alloc.free();
        let mut seen = HashSet::new();
        for (volume, one) in &store.replicas {
            let older =
                one.snapshots.iter().map(|snapshot| (Some(snapshot.state.id), &snapshot.map));
            for (snapshot, map) in std::iter::once((None, &one.head)).chain(older) {
                for (number, chunk) in map.chunks().enumerate() {
                    if chunk.leaf().is_some_and(|no| seen.insert(no)) {
                        let blocks = self.blocks_of(chunk)?;
                        self.leaf(*volume, snapshot, number as u64, &blocks)?;
                        (self.progress)(self.found.blocks_checked, total);
                    }
                }
            }
            for entry in &one.entries {
                let Payload::Extents(runs) = &entry.payload else { continue };
                let blocks = runs.iter().flat_map(|run| run.0..run.0 + run.1);
                let wanted: Vec<Wanted> = blocks.zip(entry.crcs.iter().copied()).collect();
                let lsn = Some(entry.header.place.lsn.0);
                for (index, why) in self.bad(&wanted)? {
                    let owner = (*volume, None, None, lsn);
                    self.tell(owner, wanted[index].0, why);
                }
            }
        }
        Ok(())
    }

    fn blocks_of(&mut self, chunk: Chunk) -> Result<Vec<LeafBlock>, OpenError> {
        let (store, io) = (self.store, &mut self.io);
        let mut blocks = Vec::with_capacity(CHUNK_BLOCKS);
        let mut get = |no: LeafNo| {
            let place = store.leaves.place_of(no);
            let bytes: Vec<u8> =
                io.read_all(&place.runs)?.iter().flat_map(|b| b.to_vec()).collect();
            let found = store.decode_leaf(&place, &bytes);
            found.map_err(|error| OpenError::Damaged(error.to_string()))
        };
        store.leaves.fill_by(chunk, (0, CHUNK_BLOCKS), &mut blocks, &mut get)?;
        Ok(blocks)
    }

    fn leaf(
        &mut self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
        chunk: u64,
        blocks: &[LeafBlock],
    ) -> Result<(), OpenError> {
        let written = blocks.iter().enumerate().filter(|(_, block)| block.device != 0);
        let (at, wanted): (Vec<u64>, Vec<Wanted>) = written
            .map(|(index, block)| {
                (index as u64, (self.store.alloc.location(block.device), block.crc))
            })
            .unzip();
        for (index, why) in self.bad(&wanted)? {
            let block = Some(chunk * blocks.len() as u64 + at[index]);
            self.tell((volume, snapshot, block, None), wanted[index].0, why);
        }
        Ok(())
    }

    fn tell(&mut self, owner: Owner, device_block: u32, why: String) {
        let (volume, snapshot, block, lsn) = owner;
        let problem = Problem::Block { volume, snapshot, block, lsn, device_block, why };
        self.found.problems.push(problem);
    }

    /// Which of these are bad, and why. Neighbours are read together.
    fn bad(&mut self, wanted: &[Wanted]) -> Result<Vec<(usize, String)>, OpenError> {
        let mut bad = Vec::new();
        let mut index = 0;
        while index < wanted.len() {
            let first = wanted[index].0;
            let neighbours = wanted[index..].iter().zip(first..).take(WINDOW_BLOCKS as usize);
            let count = neighbours.take_while(|((block, _), next)| block == next).count();
            match self.io.read((first, u32::try_from(count).expect("a window"))) {
                Ok(bytes) => bad.extend(differing(&bytes, wanted, index)),
                Err(OpenError::Device(_)) => {
                    self.one_by_one(wanted, index..index + count, &mut bad)?;
                }
                Err(error) => return Err(error),
            }
            index += count;
        }
        self.found.blocks_checked += wanted.len() as u64;
        Ok(bad)
    }

    /// Some of these cannot be read: which?
    fn one_by_one(
        &mut self,
        wanted: &[Wanted],
        which: Range<usize>,
        bad: &mut Vec<(usize, String)>,
    ) -> Result<(), OpenError> {
        for index in which {
            match self.io.read((wanted[index].0, 1)) {
                Ok(bytes) => bad.extend(differing(&bytes, wanted, index)),
                Err(OpenError::Device(error)) => bad.push((index, error.to_string())),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn differing(bytes: &[u8], wanted: &[Wanted], from: usize) -> Vec<(usize, String)> {
    let blocks = (from..).zip(bytes.chunks(BLOCK_BYTES));
    let differ = blocks.filter(|(index, block)| crc32c(block) != wanted[*index].1);
    differ.map(|(index, _)| (index, "wrong checksum".to_owned())).collect()
}
