//! One core's copy of the structure, and its way to write.

use thiserror::Error;

use crate::Dispatch;
use crate::core::{Answer, Shared, TryCombineError};
use crate::log::{COPY_ENTRIES, Cursor, Evicted};
use crate::options::broken;
use crate::patience::Patience;
use crate::seat::Writer;
use crate::sync::Arc;

/// Which replica: drawn when it is made, never given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Number(pub usize);

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "replica {}", self.0)
    }
}

/// Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WriteError {
    /// The log is full of what this replica is in the middle of copying: its thread has no core.
    #[error("{number} ({name}) stands still while it copies the log: write again later")]
    NoRoom {
        /// Which.
        number: Number,
        /// Its name.
        name: String,
    },
    /// Another thread has been writing for all of `Options::patience`.
    #[error("the thread of {combiner} has been writing for too long: write again later")]
    Busy {
        /// Whose thread it is.
        combiner: Number,
    },
    /// `Dispatch::write` has panicked: reads go on, as of before, writes do not.
    #[error("a write has panicked: nothing can be written any more")]
    Poisoned,
}

/// See the module. For one thread at a time.
pub struct Replica<T: Dispatch> {
    shared: Arc<Shared<T>>,
    value: T,
    cursor: Cursor<T::Write>,
    writer: Writer<T::Write, Answer<T>>,
    /// Changes between the log and `value`.
    copied: Vec<T::Write>,
    /// A change has been begun and not ended: `value` may be half of it.
    is_torn: bool,
}

impl<T: Dispatch> Replica<T> {
    pub(crate) fn new(
        shared: Arc<Shared<T>>,
        value: T,
        cursor: Cursor<T::Write>,
        writer: Writer<T::Write, Answer<T>>,
    ) -> Self {
        let copied = Vec::with_capacity(COPY_ENTRIES as usize);
        Self { shared, value, cursor, writer, copied, is_torn: false }
    }

    /// Which one it is.
    pub fn number(&self) -> Number {
        Number(self.cursor.position().number)
    }

    /// Answers a question as of now: everything that was written before this call began is seen.
    /// Panics when this replica was evicted and a [`Dispatch::write`] has panicked.
    pub fn read(&mut self, question: T::Read<'_>) -> T::Found {
        self.latest().read(question)
    }

    /// The structure as of now, for several questions at one point of time. It stays as it is for as
    /// long as it is looked at, and stops nobody: neither readers nor writers.
    pub fn latest(&mut self) -> &T {
        let is_stale = broken!(self.shared.options, StaleRead);
        if (!self.cursor.is_current() && !is_stale) || self.is_torn {
            self.catch_up();
        }
        &self.value
    }

    /// The structure as of the last `latest` or `read`: without a look at any shared word.
    pub fn held(&self) -> &T {
        assert!(!self.is_torn, "a change to a replica has panicked");
        &self.value
    }

    #[cold]
    fn catch_up(&mut self) {
        // As far as the log is now, not as far as it is when we are there: writers that are quicker
        // than this thread would have it run after them for ever.
        let goal = self.cursor.published();
        loop {
            if self.is_torn || self.cursor.copy(&mut self.copied) == Err(Evicted) {
                self.copied.clear();
                self.value = self.shared.copy_for(&mut self.cursor);
                self.is_torn = false;
                return;
            }
            self.is_torn = true;
            for change in self.copied.drain(..) {
                // The answer was its writer's.
                drop(self.value.write(change));
            }
            self.is_torn = false;
            if self.cursor.has_copied(goal) {
                return;
            }
        }
    }

    /// Carries out a change. When it returns, every read that begins anywhere sees it; when it
    /// returns an error, none ever will. Waits for other writers, for at most `Options::patience`
    /// and, if one of them has taken this change by then, for it to finish its batch.
    pub fn write(&mut self, change: T::Write) -> Result<T::Done, WriteError> {
        self.writer.post(change);
        let mut patience = Patience::new(self.shared.options.patience);
        loop {
            if let Some(answer) = self.writer.answer() {
                return answer.unwrap_or(Err(WriteError::Poisoned));
            }
            match self.shared.try_combine(self.cursor.position().number) {
                // Ours was posted before: it was done now, or by who had the lock before.
                Ok(()) => {}
                Err(TryCombineError::Poisoned) => {
                    if self.writer.withdraw() {
                        return Err(WriteError::Poisoned);
                    }
                }
                Err(TryCombineError::Busy) => {
                    if !patience.wait() && self.writer.withdraw() {
                        return Err(WriteError::Busy { combiner: self.shared.combiner() });
                    }
                }
            }
        }
    }
}
