//! A seat: where one writer leaves its change and finds its answer, whoever carries it out.
//!
//! Flat combining needs a cell for each writer that changes hands: the writer's, the combiner's, and
//! back. Whose it is says `state`; only its holder touches the cell, and hands it on with Release to
//! a holder that takes it with Acquire (O4).
//!
//! ```text
//! FREE --post--> POSTED --take--> TAKEN --finish--> DONE --answer--> FREE
//!                   \--withdraw--> FREE
//! ```
//!
//! [`Writer`] is unique and needs `&mut`; a combiner holds a cell as [`Taken`], which exists at most
//! once for a seat because making it is the one swap from POSTED to TAKEN.

use crate::options::{Options, broken};
use crate::sync::{Arc, AtomicU8, Ordering, Padded, UnsafeCell};

/// The writer's; empty.
const FREE: u8 = 0;
/// Nobody's, until somebody takes it; has a change.
const POSTED: u8 = 1;
/// The combiner's that took it.
const TAKEN: u8 = 2;
/// The writer's; has an answer.
const DONE: u8 = 3;
/// The writer is no more.
const GONE: u8 = 4;

enum Content<C, A> {
    Empty,
    Change(C),
    Answer(Result<A, GaveUp>),
}

/// The combiner left in the middle: its thread panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GaveUp;

struct Seat<C, A> {
    state: Padded<AtomicU8>,
    cell: UnsafeCell<Content<C, A>>,
    options: Options,
}

// SAFETY: the cell is used by one thread at a time, its holder by `state` (argued at each access),
// so it is only sent: `C: Send`, `A: Send`.
unsafe impl<C: Send, A: Send> Sync for Seat<C, A> {}
// SAFETY: a seat owns its content and nothing else.
unsafe impl<C: Send, A: Send> Send for Seat<C, A> {}

impl<C, A> Seat<C, A> {
    /// Puts this into the cell; what was there comes back.
    ///
    /// # Safety
    /// The caller is the cell's holder by `state`, and has seen that with Acquire.
    unsafe fn exchange(&self, content: Content<C, A>) -> Content<C, A> {
        self.cell.with_mut(|cell| {
            // SAFETY: the holder is alone at the cell until it hands it on; what the holder before
            // it did is before this, by its Release and our Acquire.
            unsafe { std::mem::replace(&mut *cell, content) }
        })
    }
}

/// The writer's end.
pub(crate) struct Writer<C, A>(Arc<Seat<C, A>>);

/// The combiner's end.
pub(crate) struct Desk<C, A>(Arc<Seat<C, A>>);

/// A seat whose change is being carried out. Dropped without an answer: the combiner gave up.
pub(crate) struct Taken<C, A> {
    seat: Arc<Seat<C, A>>,
    answer: Result<A, GaveUp>,
}

pub(crate) fn seat<C, A>(options: Options) -> (Writer<C, A>, Desk<C, A>) {
    let state = Padded(AtomicU8::new(FREE));
    let seat = Arc::new(Seat { state, cell: UnsafeCell::new(Content::Empty), options });
    (Writer(Arc::clone(&seat)), Desk(seat))
}

impl<C, A> Writer<C, A> {
    /// Leaves a change. One at a time.
    pub(crate) fn post(&mut self, change: C) {
        if self.0.state.0.load(Ordering::Relaxed) != FREE {
            self.settle();
        }
        let state = self.0.state.0.load(Ordering::Relaxed); // FREE is written by us alone
        assert_eq!(state, FREE, "a writer has one change under way");
        // SAFETY: the state is FREE: the cell is the writer's, and `&mut self` is the one writer.
        // What was last done to it was done by this end (`answer`, `withdraw`).
        unsafe { self.0.exchange(Content::Change(change)) };
        // Release: with the Acquire of `take` (O4).
        self.0.state.0.store(POSTED, Ordering::Release);
    }

    /// This thread carried out a batch that panicked, so nobody has fetched the answer, or nobody has
    /// taken the change (and nobody will).
    #[cold]
    fn settle(&mut self) {
        if self.answer().is_none() {
            self.withdraw();
        }
    }

    /// Takes a change back that nobody has taken.
    pub(crate) fn withdraw(&mut self) -> bool {
        // Relaxed: what is in the cell was put there by this end.
        let free =
            self.0.state.0.compare_exchange(POSTED, FREE, Ordering::Relaxed, Ordering::Relaxed);
        if free.is_ok() {
            // SAFETY: POSTED became FREE by our own swap, so no combiner has taken it or can.
            unsafe { self.0.exchange(Content::Empty) };
        }
        free.is_ok()
    }

    /// The answer, once it is there.
    pub(crate) fn answer(&mut self) -> Option<Result<A, GaveUp>> {
        // Acquire: with the Release of `Taken`'s end (O4).
        if self.0.state.0.load(Ordering::Acquire) != DONE {
            return None;
        }
        // SAFETY: DONE: the cell is the writer's again; seen with Acquire.
        let content = unsafe { self.0.exchange(Content::Empty) };
        self.0.state.0.store(FREE, Ordering::Relaxed); // nobody but us acts on FREE
        match content {
            Content::Answer(answer) => Some(answer),
            Content::Empty | Content::Change(_) => unreachable!("DONE has an answer"),
        }
    }
}

impl<C, A> Drop for Writer<C, A> {
    fn drop(&mut self) {
        // A writer does not leave while its change is under way (`Replica::write` waits), so the
        // state is FREE; or, where a batch has panicked in this thread (`settle`), DONE with an
        // answer that nobody wants or POSTED with a change that nobody takes any more. Never TAKEN:
        // who takes hands on before it leaves the lock, also when it panics.
        self.0.state.0.store(GONE, Ordering::Release);
    }
}

impl<C, A> Desk<C, A> {
    /// The change that waits here, if one does.
    pub(crate) fn take(&self) -> Option<(C, Taken<C, A>)> {
        // A look first: a swap would take the line from the writer each time.
        if self.0.state.0.load(Ordering::Relaxed) != POSTED {
            return None;
        }
        // Acquire: with the Release of `post` (O4).
        let taken =
            self.0.state.0.compare_exchange(POSTED, TAKEN, Ordering::Acquire, Ordering::Relaxed);
        taken.ok()?;
        // SAFETY: POSTED became TAKEN by our own swap, seen with Acquire: the cell is ours until
        // `Taken` hands it on.
        let content = unsafe { self.0.exchange(Content::Empty) };
        match content {
            Content::Change(change) => {
                Some((change, Taken { seat: Arc::clone(&self.0), answer: Err(GaveUp) }))
            }
            Content::Empty | Content::Answer(_) => unreachable!("POSTED has a change"),
        }
    }

    /// Whether its writer is no more.
    pub(crate) fn is_gone(&self) -> bool {
        self.0.state.0.load(Ordering::Acquire) == GONE
    }
}

impl<C, A> Taken<C, A> {
    /// Hands the answer over.
    pub(crate) fn finish(mut self, answer: A) {
        self.answer = Ok(answer);
    }
}

impl<C, A> Drop for Taken<C, A> {
    fn drop(&mut self) {
        let answer = Content::Answer(std::mem::replace(&mut self.answer, Err(GaveUp)));
        // SAFETY: the state is TAKEN, by the swap that made this value: the cell is this value's,
        // which is unique, until the store below, which ends it.
        unsafe { self.seat.exchange(answer) };
        let ordering = if broken!(self.seat.options, AnswerRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Release // with the Acquire of `answer` (O4)
        };
        self.seat.state.0.store(DONE, ordering);
    }
}
