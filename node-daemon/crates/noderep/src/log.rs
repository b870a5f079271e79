//! The shared log: a ring of changes, one appender, a cursor for each replica.
//!
//! Indices grow for ever (63 bits: three centuries at a billion changes a second); entry `i` is in
//! slot `i mod entries`. Three words carry everything:
//!
//! - `tail`: entries below it are there (O1). Written by the appender alone.
//! - a cursor's `word`: what it has copied; `idle(n)` or `copying(n)`: all below `n`. The appender
//!   reuses a slot only when every cursor is past what was in it (O2).
//! - the same word becomes [`EVICTED`] when a cursor that lags a whole log and is idle shall not
//!   keep the appender waiting; only in one compare-and-swap from `idle`, so never under a cursor
//!   that is copying (O3). Such a cursor reads no slot until it has been placed anew.
//!
//! The appender and the cursors are values that cannot be cloned and need `&mut`, so "the one
//! appender" and "the one thread at this cursor" are the borrow checker's business.

use crate::options::{Options, broken};
use crate::patience::{COPYING, Patience};
use crate::sync::{Arc, AtomicU64, Ordering, Padded, UnsafeCell};

/// Entries that are copied at once: bounds how long a cursor cannot be evicted.
pub(crate) const COPY_ENTRIES: u64 = 32;

/// A cursor's word: it has been put out.
const EVICTED: u64 = u64::MAX;
/// A cursor's word: it is no more.
const GONE: u64 = u64::MAX - 1;

const fn idle(next: u64) -> u64 {
    next << 1
}

const fn copying(next: u64) -> u64 {
    next << 1 | 1
}

const fn is_copying(word: u64) -> bool {
    word & 1 == 1
}

const fn next_of(word: u64) -> u64 {
    word >> 1
}

/// What appender and cursors share.
struct Ring<C> {
    tail: Padded<AtomicU64>,
    slots: Box<[UnsafeCell<Option<C>>]>,
    options: Options,
}

// SAFETY: the only thing in a ring that is not `Sync` by itself are the slots. A change is moved in
// by the appender's thread and dropped by it (or by whoever drops the ring), so `C: Send`; cursors
// of several threads read (clone from) one slot at the same time, so `C: Sync`. That no access to a
// slot meets a write to it is argued at the two accesses, `Appender::put` and `Cursor::copy`.
unsafe impl<C: Send + Sync> Sync for Ring<C> {}
// SAFETY: a ring owns its changes and nothing else.
unsafe impl<C: Send> Send for Ring<C> {}

impl<C> Ring<C> {
    fn slot(&self, index: u64) -> &UnsafeCell<Option<C>> {
        // The number of slots is a power of two.
        &self.slots[index as usize & (self.slots.len() - 1)]
    }

    fn entries(&self) -> u64 {
        self.slots.len() as u64
    }
}

/// Where a cursor is, for the appender and for whoever asks how it is.
pub(crate) struct Position {
    word: Padded<AtomicU64>,
    evictions: AtomicU64,
    pub(crate) number: usize,
    pub(crate) name: String,
}

/// How a cursor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It has copied everything below this.
    At(u64),
    /// Put out.
    Evicted,
    /// No more.
    Gone,
}

impl Position {
    pub(crate) fn standing(&self) -> Standing {
        match self.word.0.load(Ordering::Acquire) {
            EVICTED => Standing::Evicted,
            GONE => Standing::Gone,
            word => Standing::At(next_of(word)),
        }
    }

    pub(crate) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Relaxed)
    }
}

/// No room in the log: this cursor stands still in the middle of copying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom {
    pub(crate) number: usize,
    pub(crate) name: String,
}

/// The one that appends.
pub(crate) struct Appender<C> {
    ring: Arc<Ring<C>>,
    /// Entries that are in the ring, published or not.
    written: u64,
    /// Every cursor has copied what is below; as of the last look.
    head: u64,
    positions: Vec<Arc<Position>>,
}

impl<C> Appender<C> {
    pub(crate) fn new(options: Options) -> Self {
        let entries = options.log_entries;
        assert!(entries.is_power_of_two() && entries >= 2, "log_entries: {entries}, a power of 2");
        let slots = (0..entries).map(|_| UnsafeCell::new(None)).collect();
        let tail = Padded(AtomicU64::new(0));
        let ring = Arc::new(Ring { tail, slots, options });
        Self { ring, written: 0, head: 0, positions: Vec::new() }
    }

    /// A cursor behind everything that was published.
    pub(crate) fn cursor(&mut self, number: usize, name: String) -> Cursor<C> {
        assert_eq!(self.written, self.published(), "a batch is published before a cursor comes");
        self.positions.retain(|position| position.standing() != Standing::Gone);
        let word = Padded(AtomicU64::new(idle(self.written)));
        let position = Arc::new(Position { word, evictions: AtomicU64::new(0), number, name });
        self.positions.push(Arc::clone(&position));
        let ring = Arc::clone(&self.ring);
        Cursor { ring, position, next: self.written }
    }

    /// Places a cursor that was evicted behind everything that was published.
    pub(crate) fn place(&mut self, cursor: &mut Cursor<C>) {
        assert!(Arc::ptr_eq(&self.ring, &cursor.ring), "a cursor of another log");
        assert_eq!(self.written, self.published(), "a batch is published before a cursor comes");
        cursor.next = self.written;
        // Relaxed: `put` looks at it through `&mut self`, hence after this.
        cursor.position.word.0.store(idle(self.written), Ordering::Relaxed);
    }

    /// All cursors.
    pub(crate) fn positions(&self) -> &[Arc<Position>] {
        &self.positions
    }

    /// Entries that are published.
    pub(crate) fn published(&self) -> u64 {
        self.ring.tail.0.load(Ordering::Relaxed) // written by us alone
    }

    /// Makes room for one entry, if need be by putting out cursors that lag a whole log.
    pub(crate) fn make_room(&mut self) -> Result<(), NoRoom> {
        if self.written - self.head < self.ring.entries() {
            return Ok(());
        }
        if broken!(self.ring.options, ReclaimAll) {
            self.head = self.written;
            return Ok(());
        }
        let mut patience = Patience::new(COPYING);
        loop {
            match self.look_at_cursors() {
                None => return Ok(()),
                Some(slowest) if !patience.wait() => {
                    let (number, name) = (slowest.number, slowest.name.clone());
                    return Err(NoRoom { number, name });
                }
                Some(_) => {}
            }
        }
    }

    /// Finds the head anew; the cursor that stands in the way and cannot be put out, if any.
    fn look_at_cursors(&mut self) -> Option<Arc<Position>> {
        // What is below is overwritten by the next entry.
        let needed = (self.written + 1).saturating_sub(self.ring.entries());
        let mut head = self.written;
        for position in &self.positions {
            // Acquire: with the Release of the cursor's store. What it read from slots below
            // `next` is before what we write to them (O2).
            let word = position.word.0.load(Ordering::Acquire);
            if word == EVICTED || word == GONE {
                continue;
            }
            if next_of(word) >= needed {
                head = head.min(next_of(word));
            } else if !self.evict(position, word) {
                return Some(Arc::clone(position));
            }
        }
        self.head = head;
        None
    }

    fn evict(&self, position: &Position, word: u64) -> bool {
        if is_copying(word) && !broken!(self.ring.options, EvictCopying) {
            return false;
        }
        // One swap from `idle(n)`: either the cursor's own from `idle(n)` to `copying(n)` comes
        // first and this fails, or this comes first and that fails; both are of one word, whose
        // changes all threads see in one order (O3). Acquire as above.
        let evicted =
            position.word.0.compare_exchange(word, EVICTED, Ordering::Acquire, Ordering::Relaxed);
        if evicted.is_ok() {
            position.evictions.fetch_add(1, Ordering::Relaxed);
        }
        evicted.is_ok()
    }

    /// Puts an entry behind the others; nobody sees it before `publish`. Needs room.
    pub(crate) fn put(&mut self, change: C) {
        assert!(self.written - self.head < self.ring.entries(), "no room was made");
        let old = self.ring.slot(self.written).with_mut(|slot| {
            // SAFETY: nobody else touches this slot now. Writers: only the one appender writes, and
            // `&mut self` is it. Readers: a cursor reads entry `i` only when `i < tail` as it has
            // loaded it, and only while its word is `copying(n)` with n <= i. This slot held
            // entry `written - entries`, which is below `head` (asserted above): every cursor's word
            // was seen, with Acquire, to be beyond it, or EVICTED, or GONE. (O2, O3.) Entry
            // `written` itself is at or beyond `tail`, so no cursor reads it before `publish`.
            unsafe { (*slot).replace(change) }
        });
        self.written += 1;
        // Here and not in the cell: a drop is foreign code, which may do anything.
        drop(old);
    }

    /// Everything that was put is there, for everyone, at once: where writes take place.
    pub(crate) fn publish(&mut self) {
        // Release: with the Acquire of a cursor's look at the tail. Whoever sees this tail sees what
        // is in the slots below it (O1).
        let ordering = if broken!(self.ring.options, TailRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        self.ring.tail.0.store(self.written, ordering);
    }
}

/// Where a replica reads.
pub(crate) struct Cursor<C> {
    ring: Arc<Ring<C>>,
    position: Arc<Position>,
    /// The next entry to copy.
    next: u64,
}

/// The cursor was put out: what it lacks is not in the log any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Evicted;

impl<C: Clone> Cursor<C> {
    /// Whether there is nothing to copy: the whole cost of a read when nothing was written.
    pub(crate) fn is_current(&self) -> bool {
        self.published() == self.next
    }

    /// Entries that are published.
    pub(crate) fn published(&self) -> u64 {
        // Acquire: the answer of a write that was published before may have come to this thread by
        // any way; also see `publish` (O1).
        let ordering = if broken!(self.ring.options, LookRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        };
        self.ring.tail.0.load(ordering)
    }

    /// Whether all entries below this one are copied.
    pub(crate) fn has_copied(&self, goal: u64) -> bool {
        self.next >= goal
    }

    /// Copies entries that are there, at most [`COPY_ENTRIES`].
    pub(crate) fn copy(&mut self, into: &mut Vec<C>) -> Result<(), Evicted> {
        let tail = self.published();
        let word = &self.position.word.0;
        let (from, end) = (self.next, tail.min(self.next + COPY_ENTRIES));
        // Success Release: this write takes the place of the last `idle(from)`, whose Release the
        // appender needs (a release sequence would carry it on as well). Failure: there is nothing
        // to see but EVICTED.
        let claimed =
            word.compare_exchange(idle(from), copying(from), Ordering::Release, Ordering::Relaxed);
        if claimed.is_err() && !broken!(self.ring.options, ForgetEviction) {
            return Err(Evicted);
        }
        let copied = Copied { cursor: self };
        for index in from..end {
            let change = copied.cursor.ring.slot(index).with(|slot| {
                // SAFETY: entry `index` is in the slot and nobody writes to it. It is there: `index
                // < tail`, loaded with Acquire from the appender's Release after `put` (O1). It is
                // not overwritten: the word is `copying(from)` with `from <= index`, made by a swap
                // from `idle(from)`, so it was not EVICTED before and cannot become so (O3); the
                // appender reuses the slot only when it sees this word beyond `index` (O2), which
                // is not before `Copied` is dropped.
                unsafe { (*slot).clone() }
            });
            into.push(change.expect("an entry below the tail is there"));
            copied.cursor.next = index + 1;
        }
        Ok(())
    }

    /// What others see of it.
    pub(crate) fn position(&self) -> &Position {
        &self.position
    }
}

/// The cursor is idle again, also when a clone panicked.
struct Copied<'a, C> {
    cursor: &'a mut Cursor<C>,
}

impl<C> Drop for Copied<'_, C> {
    fn drop(&mut self) {
        // Release: what was read from slots below `next` is before what the appender writes to them
        // when it has seen this (O2).
        let ordering = if broken!(self.cursor.ring.options, PositionRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        self.cursor.position.word.0.store(idle(self.cursor.next), ordering);
    }
}

impl<C> Drop for Cursor<C> {
    fn drop(&mut self) {
        // Release as above; the appender forgets the position when it next adds one.
        self.position.word.0.store(GONE, Ordering::Release);
    }
}
