//! The header area of a log record: what it says of itself and its predecessor (rule R1).

use super::{Get, Malformed, Put, StoreId, check_seal, seal};
use crate::entry::{BLOCK_BYTES, Place};
use crate::ids::{InstanceId, VolumeId};

const MAGIC: [u8; 4] = *b"TLG1";
/// Bytes before the names.
const FIXED_BYTES: usize = 100;

/// Most volumes that a record names of its predecessor; one more and it names none.
pub const NAMES_MAX: usize = 64;

/// A volume of the predecessor, and the last place of it there (or `Place::EMPTY` where it held no
/// entry but another change of that volume).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// The volume.
    pub volume: VolumeId,
    /// Its last entry in the predecessor.
    pub place: Place,
}

/// A record's header area without its items.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// The store.
    pub store: StoreId,
    /// The engine that wrote it.
    pub instance: InstanceId,
    /// Its place: blocks written to the ring before it, since format. Block in the ring = this
    /// modulo the ring's blocks.
    pub position: u64,
    /// Everything below this was durable when it was written, extents included.
    pub mark: u64,
    /// The newest checkpoint that was durable when it was written.
    pub checkpoint: u64,
    /// The predecessor's position; `u64::MAX` for the first record ever.
    pub previous: u64,
    /// The predecessor's CRC (its first four bytes).
    pub previous_crc: u32,
    /// Blocks of the header area.
    pub header_blocks: u32,
    /// Blocks of payload behind it.
    pub payload_blocks: u32,
    /// Number of items.
    pub items: u32,
    /// The volumes of the predecessor; none where there were too many.
    pub names: Option<Vec<Name>>,
}

impl RecordHeader {
    /// Blocks of a header area for so many names and bytes of items.
    pub fn header_blocks(names: usize, item_bytes: usize) -> u32 {
        let bytes = FIXED_BYTES + names.min(NAMES_MAX) * 32 + item_bytes;
        u32::try_from(bytes.div_ceil(BLOCK_BYTES)).expect("a bounded record")
    }

    /// Writes the header area into `area` (`header_blocks` long) and returns its CRC.
    pub fn encode(&self, items: &[u8], area: &mut [u8]) -> u32 {
        let names = self.names.as_ref().map_or(0, Vec::len);
        let mut put = Put(Vec::with_capacity(FIXED_BYTES + names * 32));
        put.u32(0);
        put.bytes(&MAGIC);
        put.bytes(&self.store.0);
        put.bytes(self.instance.as_bytes());
        for value in [self.position, self.mark, self.checkpoint, self.previous] {
            put.u64(value);
        }
        for value in [
            self.previous_crc,
            self.header_blocks,
            self.payload_blocks,
            self.items,
            u32::try_from(items.len()).expect("a bounded record"),
            self.names.as_ref().map_or(u32::MAX, |names| names.len() as u32),
        ] {
            put.u32(value);
        }
        put.u32(0);
        assert_eq!(put.0.len(), FIXED_BYTES, "a record's fixed part");
        for name in self.names.iter().flatten() {
            put.bytes(name.volume.as_bytes());
            put.place(name.place);
        }
        let (head, rest) = area.split_at_mut(put.0.len());
        let (body, zeroes) = rest.split_at_mut(items.len()); // the area was measured before
        head.copy_from_slice(&put.0);
        body.copy_from_slice(items);
        zeroes.fill(0);
        seal(area);
        u32::from_le_bytes(area[..4].try_into().expect("four bytes"))
    }

    /// Blocks of the header area if `block` may be the first of a record at `position` of `store`:
    /// a cheap look before [`RecordHeader::decode`], which needs them all.
    pub fn probe(block: &[u8], store: StoreId, position: u64) -> Option<u32> {
        if block[4..8] != MAGIC || block[8..24] != store.0 {
            return None;
        }
        if block[40..48] != position.to_le_bytes() {
            return None;
        }
        Some(u32::from_le_bytes(block[76..80].try_into().expect("four bytes")))
    }

    /// Reads a header area; also its CRC and its items' bytes.
    pub fn decode(area: &[u8]) -> Result<(Self, u32, &[u8]), Malformed> {
        check_seal(area, MAGIC)?;
        let mut get = Get(&area[8..]);
        let (store, instance) = (StoreId(get.uuid()?.into_bytes()), InstanceId(get.uuid()?));
        let (position, mark, checkpoint, previous) =
            (get.u64()?, get.u64()?, get.u64()?, get.u64()?);
        let previous_crc = get.u32()?;
        let (header_blocks, payload_blocks) = (get.u32()?, get.u32()?);
        let (items, item_bytes, count) = (get.u32()?, get.u32()?, get.u32()?);
        get.u32()?;
        let names = match count {
            u32::MAX => None,
            count if count as usize > NAMES_MAX => return Err(Malformed("names")),
            count => Some(
                (0..count)
                    .map(|_| Ok(Name { volume: VolumeId(get.uuid()?), place: get.place()? }))
                    .collect::<Result<_, Malformed>>()?,
            ),
        };
        let bytes = get.bytes(item_bytes as usize)?;
        let crc = u32::from_le_bytes(area[..4].try_into().expect("four bytes"));
        let header = Self {
            store,
            instance,
            position,
            mark,
            checkpoint,
            previous,
            previous_crc,
            header_blocks,
            payload_blocks,
            items,
            names,
        };
        Ok((header, crc, bytes))
    }
}
