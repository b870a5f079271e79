//! Reading the log after a start: which records are there, where the log ends, and what is damaged
//! (rule R1).
//!
//! Records in flight together persist in any order, so a bad record before a valid one can be an
//! ordinary power cut. Each valid record's mark says below which position everything was durable:
//! a bad record below any mark is damage, any other bad record is the end of the log. Behind damage
//! the log goes on at the record from which a chain of predecessors leads to the largest mark:
//! records of an older instance behind its torn tail hang on no such chain.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use tercet_proto::BLOCK_BYTES;
use tercet_proto::disk::{Get, Item, Location, Name, RecordHeader, Run, Slot, StoreId, crc32c};

use crate::io::Io;
use crate::log::{RECORD_HEADER_BLOCKS_MAX, RECORD_PAYLOAD_BLOCKS_MAX};
use crate::options::OpenError;

const WINDOW_BLOCKS: u32 = 128;

/// A record as it was read.
#[derive(Debug)]
pub(crate) struct Scanned {
    pub(crate) header: RecordHeader,
    pub(crate) crc: u32,
    pub(crate) items: Vec<Item>,
    /// Items whose payload has not its checksum.
    pub(crate) bad: Vec<usize>,
}

impl Scanned {
    pub(crate) fn blocks(&self) -> u32 {
        self.header.header_blocks + self.header.payload_blocks
    }

    pub(crate) fn end(&self) -> u64 {
        self.header.position + u64::from(self.blocks())
    }
}

/// What the log is made of.
#[derive(Debug)]
pub(crate) enum Piece {
    Record(Box<Scanned>),
    /// A record is lost; the volumes in it, if its successor names them.
    Lost(Option<Vec<Name>>),
}

/// What scanning found.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) pieces: Vec<Piece>,
    /// The log goes on here.
    pub(crate) end: u64,
    /// Below this a mark on the device says that everything was durable.
    pub(crate) mark: u64,
}

struct Scanner<'a, 'b> {
    io: &'a mut Io<'b>,
    store: StoreId,
    ring: Run,
    window: (u64, Vec<u8>),
    /// Headers that can be read, by position.
    headers: BTreeMap<u64, (RecordHeader, u32)>,
}

impl Scanner<'_, '_> {
    /// `count` blocks from a position on, within one lap.
    fn blocks(&mut self, position: u64, count: u32) -> Result<&[u8], OpenError> {
        let ring = u64::from(self.ring.1);
        let have = (self.window.1.len() / BLOCK_BYTES) as u64;
        let (start, end) = (self.window.0, self.window.0 + have);
        if position < start || position + u64::from(count) > end {
            let left = ring - position % ring;
            let read = u64::from(WINDOW_BLOCKS.max(count)).min(left) as u32;
            let block = self.ring.0 + (position % ring) as u32;
            let mut bytes = std::mem::take(&mut self.window.1); // its memory is used again
            bytes.clear();
            let mut done = 0;
            while done < read {
                let now = WINDOW_BLOCKS.min(read - done);
                bytes.extend_from_slice(&self.io.read((block + done, now))?);
                done += now;
            }
            self.window = (position, bytes);
        }
        let from = (position - self.window.0) as usize * BLOCK_BYTES;
        Ok(&self.window.1[from..from + count as usize * BLOCK_BYTES])
    }

    /// The header of a record at this position, whole and fitting its lap.
    fn header(&mut self, position: u64) -> Result<Option<(RecordHeader, u32)>, OpenError> {
        let ring = u64::from(self.ring.1);
        let store = self.store;
        let probe = RecordHeader::probe(self.blocks(position, 1)?, store, position);
        let Some(count) = probe else { return Ok(None) };
        let left = ring - position % ring;
        if !(1..=RECORD_HEADER_BLOCKS_MAX).contains(&count) || u64::from(count) > left {
            return Ok(None);
        }
        let Ok((header, crc, _)) = RecordHeader::decode(self.blocks(position, count)?) else {
            return Ok(None);
        };
        let blocks = u64::from(header.header_blocks) + u64::from(header.payload_blocks);
        let fits = header.header_blocks == count
            && header.payload_blocks <= RECORD_PAYLOAD_BLOCKS_MAX
            && blocks <= left
            && header.mark <= position;
        Ok(fits.then_some((header, crc)))
    }

    /// Every header that the ring holds from `start` on.
    fn survey(&mut self, start: u64) -> Result<(), OpenError> {
        for position in start..start + u64::from(self.ring.1) {
            if let Some(found) = self.header(position)? {
                self.headers.insert(position, found);
            }
        }
        Ok(())
    }

    /// The whole record behind a header.
    fn record(&mut self, header: &RecordHeader, crc: u32) -> Result<Scanned, OpenError> {
        let header = header.clone();
        let area = self.blocks(header.position, header.header_blocks)?;
        let (_, _, mut bytes) = RecordHeader::decode(area).map_err(damaged)?;
        let mut get = Get(std::mem::take(&mut bytes));
        let items: Vec<Item> = (0..header.items)
            .map(|_| Item::decode(&mut get))
            .collect::<Result<_, _>>()
            .map_err(damaged)?;
        let mut bad = Vec::new();
        if header.payload_blocks > 0 {
            let at = header.position + u64::from(header.header_blocks);
            let payload = self.blocks(at, header.payload_blocks)?;
            for (index, item) in items.iter().enumerate() {
                if !payload_is_whole(item, payload) {
                    bad.push(index);
                }
            }
        }
        Ok(Scanned { header, crc, items, bad })
    }

    /// The record that follows `previous`, at `position` or at the start of the next lap.
    fn next(&self, position: u64, previous: (u64, u32)) -> Option<(RecordHeader, u32)> {
        let ring = u64::from(self.ring.1);
        let lap = position.next_multiple_of(ring);
        [position, lap].into_iter().find_map(|at| {
            let found = self.headers.get(&at)?;
            let chained = (found.0.previous, found.0.previous_crc) == previous;
            chained.then(|| found.clone())
        })
    }

    /// Where the log goes on behind damage at `bad`, and whether only one record is lost.
    fn resume(&self, bad: u64) -> Option<(RecordHeader, bool)> {
        // The largest mark is the newest instance's; a record that a torn tail left behind has a
        // smaller one, or an equal one further on.
        let knowing = self.headers.values().filter(|(header, _)| header.mark > bad);
        let knows = knowing.max_by_key(|(header, _)| (header.mark, Reverse(header.position)))?;
        let mut first = &knows.0;
        while let Some((before, crc)) = self.headers.get(&first.previous)
            && *crc == first.previous_crc
            && before.position > bad
        {
            first = before;
        }
        let lap = bad.next_multiple_of(u64::from(self.ring.1));
        Some((first.clone(), first.previous == bad || first.previous == lap))
    }

    fn extents_are_whole(&mut self, record: &Scanned) -> Result<bool, OpenError> {
        for item in &record.items {
            let Item::Entry { entry, .. } = item else {
                continue;
            };
            let Location::Extents(runs) = &entry.location else {
                continue;
            };
            let mut crcs = entry.crcs.iter();
            for run in runs {
                let mut done = 0;
                while done < run.1 {
                    let now = WINDOW_BLOCKS.min(run.1 - done);
                    let buf = self.io.read((run.0 + done, now))?;
                    if buf.chunks(BLOCK_BYTES).any(|block| crcs.next() != Some(&crc32c(block))) {
                        return Ok(false);
                    }
                    done += now;
                }
            }
        }
        Ok(true)
    }
}

fn damaged(error: tercet_proto::disk::Malformed) -> OpenError {
    OpenError::Damaged(format!("a log record with a valid checksum is {error}"))
}

fn payload_is_whole(item: &Item, payload: &[u8]) -> bool {
    let Item::Entry { entry, .. } = item else {
        return true;
    };
    let Location::Record(offset) = entry.location else {
        return true;
    };
    let blocks = payload.chunks(BLOCK_BYTES).skip(offset as usize);
    let mut matched = 0;
    for (block, crc) in blocks.zip(&entry.crcs) {
        if crc32c(block) != *crc {
            return false;
        }
        matched += 1;
    }
    matched == entry.crcs.len()
}

/// Reads the log from the checkpoint on. `strict` is off only where a canary breaks rule R1.
pub(crate) fn scan(
    io: &mut Io<'_>,
    store: StoreId,
    ring: Run,
    data: &dyn Fn(Run) -> bool,
    slot: &Slot,
    strict: bool,
) -> Result<Scan, OpenError> {
    let window = (0, Vec::new());
    let mut scanner = Scanner { io, store, ring, window, headers: BTreeMap::new() };
    scanner.survey(slot.log_start)?;
    let marks = scanner.headers.values().map(|(header, _)| header.mark);
    let mark = marks.chain([slot.frozen]).max().expect("the slot's");
    let newest = scanner.headers.values().map(|(header, _)| header.checkpoint).max();
    if newest > Some(slot.sequence) {
        let text =
            format!("checkpoint {} is lost, {} is there", newest.unwrap_or(0), slot.sequence);
        return Err(OpenError::Damaged(text));
    }
    let mut pieces = Vec::new();
    let mut position = slot.log_start;
    let mut previous = (slot.previous, slot.previous_crc);
    loop {
        let found = match scanner.next(position, previous) {
            Some((header, crc)) => Some(scanner.record(&header, crc)?),
            None => None,
        };
        let at = found.as_ref().map_or(position, |record| record.header.position);
        let below_mark = strict && at < mark;
        if let Some(record) = found {
            check_extents(&record, data)?;
            let whole =
                record.bad.is_empty() && (at < mark || scanner.extents_are_whole(&record)?);
            if whole || below_mark {
                position = record.end();
                previous = (record.header.position, record.crc);
                pieces.push(Piece::Record(Box::new(record)));
                continue;
            }
        }
        if !below_mark {
            break;
        }
        let Some((header, single)) = scanner.resume(position) else {
            pieces.push(Piece::Lost(None));
            position = mark;
            break;
        };
        pieces.push(Piece::Lost(if single { header.names.clone() } else { None }));
        position = header.position;
        previous = (header.previous, header.previous_crc);
    }
    Ok(Scan { pieces, end: position, mark })
}

fn check_extents(record: &Scanned, data: &dyn Fn(Run) -> bool) -> Result<(), OpenError> {
    for item in &record.items {
        if let Item::Entry { entry, .. } = item
            && let Location::Extents(runs) = &entry.location
            && !runs.iter().all(|run| data(*run))
        {
            let text = format!("the record at {} points outside", record.header.position);
            return Err(OpenError::Damaged(text));
        }
    }
    Ok(())
}
