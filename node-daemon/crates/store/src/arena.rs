//! Buffers for device operations: one region, allocated (and locked where the machine lets us) at
//! start, registered with the ring once.
//!
//! A [`Buf`] is an exclusively owned slice of whole pages that finds its way back on drop, from any
//! thread: as `Bytes::from_owner(buf)` it travels to a connection without a copy. Pages are kept in
//! a bitmap behind a lock that is held for a few hundred nanoseconds; small buffers are taken from
//! the low end and large ones from the high end, so that small ones do not cut up the large room.
//! An exhausted arena says so; nothing here ever allocates.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use tercet_proto::BLOCK_BYTES;

/// Buffers of at most this many pages come from the low end.
const SMALL_PAGES_MAX: usize = 16;

/// Regions of at least this begin at a multiple of it, so that the machine can back them with huge
/// pages: the ring then has one piece to walk through where it had 512.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A fixed region of page-aligned memory. Cheap to clone: all clones are one arena.
#[derive(Clone, Debug)]
pub struct Arena {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    base: NonNull<u8>,
    len: usize,
    /// What was mapped: the region, and what is left before and behind it.
    mapped: (NonNull<u8>, usize),
    pages: Mutex<Pages>,
}

// SAFETY: `base` is a private mapping that lives as long as `Inner`; its bytes are reached only
// through `Buf`s, which own disjoint pages, as the bitmap behind the lock guarantees.
unsafe impl Send for Inner {}
// SAFETY: as above; `Inner` itself hands out nothing but numbers.
unsafe impl Sync for Inner {}

#[derive(Debug)]
struct Pages {
    /// A bit for each page: set = taken.
    taken: Vec<u64>,
    count: usize,
    free: usize,
    low_hint: usize,
}

/// A buffer of the arena: 4,096-aligned, a multiple of 4,096 bytes long, back in the arena on drop.
/// A new one holds what its last owner left in it.
pub struct Buf {
    arena: Arc<Inner>,
    page: usize,
    pages: usize,
}

impl Arena {
    /// A region of `bytes` (rounded up to pages). Panics when the machine has no such memory: this
    /// happens at start, before anything is served.
    pub fn new(bytes: usize) -> Self {
        let count = bytes.div_ceil(BLOCK_BYTES).max(1);
        let len = count * BLOCK_BYTES;
        let huge = len >= HUGE_PAGE_BYTES;
        let mapped_len = if huge { len + HUGE_PAGE_BYTES } else { len };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at a place of the kernel's choice aliases nothing.
        let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped_len, access, flags) }
            .expect("memory for the arena");
        let mapped = NonNull::new(mapped.cast::<u8>()).expect("a mapping is not at null");
        let skipped = if huge { mapped.align_offset(HUGE_PAGE_BYTES) } else { 0 };
        // SAFETY: below a huge page, and so much more was mapped.
        let base = unsafe { mapped.add(skipped) };
        if huge {
            // SAFETY: a part of the mapping made above. Where the kernel has no huge pages the
            // arena works all the same.
            let _ = unsafe { madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
        }
        // SAFETY: as above. Where the limit on locked memory forbids it the arena works all the same.
        let _ = unsafe { mlock(base.as_ptr().cast(), len) };
        let taken = vec![0; count.div_ceil(64)];
        let pages = Mutex::new(Pages { taken, count, free: count, low_hint: 0 });
        Self { inner: Arc::new(Inner { base, len, mapped: (mapped, mapped_len), pages }) }
    }

    /// A buffer of `blocks` times 4,096 bytes, or none while the arena is exhausted.
    pub fn take(&self, blocks: usize) -> Option<Buf> {
        assert!(blocks > 0, "a buffer has at least one page");
        let page = self.inner.pages.lock().expect("no holder panics").take(blocks)?;
        Some(Buf { arena: Arc::clone(&self.inner), page, pages: blocks })
    }

    /// Address and length of the region, to register it with a ring.
    pub fn region(&self) -> (*const u8, usize) {
        (self.inner.base.as_ptr(), self.inner.len)
    }

    /// Pages that are free now.
    pub fn free_blocks(&self) -> usize {
        self.inner.pages.lock().expect("no holder panics").free
    }

    /// All pages.
    pub fn blocks(&self) -> usize {
        self.inner.len / BLOCK_BYTES
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; every `Buf` holds an `Arc` of this, so none is left.
        let _ = unsafe { munmap(self.mapped.0.as_ptr().cast(), self.mapped.1) };
    }
}

impl Pages {
    fn take(&mut self, pages: usize) -> Option<usize> {
        if pages > self.free {
            return None;
        }
        let first =
            if pages <= SMALL_PAGES_MAX { self.find_low(pages) } else { self.find_high(pages) }?;
        self.mark(first, pages, true);
        self.free -= pages;
        Some(first)
    }

    fn is_taken(&self, page: usize) -> bool {
        self.taken[page / 64] >> (page % 64) & 1 == 1
    }

    fn find_low(&mut self, pages: usize) -> Option<usize> {
        let mut page = self.low_hint;
        let mut run = 0;
        let mut passed_free = false;
        while page < self.count {
            if page.is_multiple_of(64) && run == 0 && self.taken[page / 64] == u64::MAX {
                page += 64;
                continue;
            }
            if self.is_taken(page) {
                run = 0;
            } else {
                run += 1;
                if run == pages {
                    if !passed_free {
                        self.low_hint = page + 1;
                    }
                    return Some(page + 1 - pages);
                }
            }
            passed_free |= run > 0 && run < pages && self.next_taken(page);
            page += 1;
        }
        None
    }

    /// Whether a free run that is too short ends here: then the hint must not pass it.
    fn next_taken(&self, page: usize) -> bool {
        page + 1 >= self.count || self.is_taken(page + 1)
    }

    fn find_high(&self, pages: usize) -> Option<usize> {
        let mut run = 0;
        let mut page = self.count;
        while page > 0 {
            page -= 1;
            if self.is_taken(page) {
                run = 0;
                continue;
            }
            run += 1;
            if run == pages {
                return Some(page);
            }
        }
        None
    }

    fn mark(&mut self, first: usize, pages: usize, taken: bool) {
        for page in first..first + pages {
            assert_ne!(self.is_taken(page), taken, "a page has one owner");
            self.taken[page / 64] ^= 1 << (page % 64);
        }
    }
}

impl Buf {
    /// Where it begins within [`Arena::region`].
    pub fn offset(&self) -> usize {
        self.page * BLOCK_BYTES
    }

    /// Its length in blocks.
    pub fn blocks(&self) -> usize {
        self.pages
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let mut pages = self.arena.pages.lock().expect("no holder panics");
        pages.mark(self.page, self.pages, false);
        pages.free += self.pages;
        pages.low_hint = pages.low_hint.min(self.page);
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: pages `page..page + pages` lie in the mapping, which the `Arc` keeps, and belong
        // to this `Buf` alone until its drop; anonymous memory is initialised.
        unsafe {
            let start = self.arena.base.as_ptr().add(self.page * BLOCK_BYTES);
            std::slice::from_raw_parts(start, self.pages * BLOCK_BYTES)
        }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is the only way to these bytes.
        unsafe {
            let start = self.arena.base.as_ptr().add(self.page * BLOCK_BYTES);
            std::slice::from_raw_parts_mut(start, self.pages * BLOCK_BYTES)
        }
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} + {} pages)", self.page, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_disjoint_and_come_back() {
        let arena = Arena::new(64 * BLOCK_BYTES);
        let mut all: Vec<Buf> = std::iter::from_fn(|| arena.take(3)).collect();
        assert_eq!(all.len(), 21);
        assert!(arena.take(2).is_none());
        for (index, buf) in all.iter_mut().enumerate() {
            buf.fill(index as u8);
        }
        for (index, buf) in all.iter().enumerate() {
            assert!(buf.iter().all(|byte| *byte == index as u8));
            assert_eq!(buf.as_ptr() as usize % BLOCK_BYTES, 0);
        }
        let bytes = bytes::Bytes::from_owner(all.swap_remove(5));
        drop(all);
        assert_eq!(arena.free_blocks(), 61);
        std::thread::spawn(move || drop(bytes)).join().expect("the thread ends");
        assert!(arena.take(64).is_some());
    }

    #[test]
    fn small_and_large_stay_apart_and_no_hole_is_forgotten() {
        let arena = Arena::new(128 * BLOCK_BYTES);
        let (a, b, c) = (arena.take(1), arena.take(2), arena.take(1));
        let large = arena.take(100).expect("room for a large one");
        assert_eq!(large.offset(), 28 * BLOCK_BYTES);
        drop(b);
        let again = arena.take(1).expect("the hole");
        assert_eq!(again.offset(), BLOCK_BYTES);
        let two = arena.take(2).expect("behind");
        assert_eq!(two.offset(), 4 * BLOCK_BYTES);
        let one = arena.take(1).expect("the rest of the hole");
        assert_eq!(one.offset(), 2 * BLOCK_BYTES);
        drop((a, c));
    }
}
