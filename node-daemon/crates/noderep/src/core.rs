//! The writers' side: the copy that changes are tried on, the log's appender, the seats; all behind
//! one lock, which whoever gets it holds for all that wait (flat combining).
//!
//! One lock for all writers, where the original has a reservation in the log for each node's
//! combiner: what is replicated here changes rarely, and a lock leaves no hole in the log that
//! readers of other replicas would have to wait at. So one word, `tail`, says everything to readers,
//! and no reader ever waits for a writer.

use std::sync::{PoisonError, TryLockError};

use crate::Dispatch;
use crate::log::{Appender, Cursor, NoRoom, Standing};
use crate::options::{Options, broken};
use crate::replica::{Number, Replica, WriteError};
use crate::seat::{Desk, Taken, seat};
use crate::sync::{Arc, AtomicUsize, Mutex, MutexGuard, Ordering};

/// What a writer is told.
pub(crate) type Answer<T> = Result<<T as Dispatch>::Done, WriteError>;

/// Seats that were taken, and what their writers will be told.
type Answers<T> = Vec<(Taken<<T as Dispatch>::Write, Answer<T>>, Answer<T>)>;

/// A structure as replicas; makes them. Cheap to clone.
pub struct NodeReplicated<T: Dispatch> {
    shared: Arc<Shared<T>>,
}

impl<T: Dispatch> Clone for NodeReplicated<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

pub(crate) struct Shared<T: Dispatch> {
    core: Mutex<Core<T>>,
    /// Number of the replica whose thread has the lock, or had it last: for [`WriteError::Busy`].
    combiner: AtomicUsize,
    pub(crate) options: Options,
}

struct Core<T: Dispatch> {
    /// As of everything that is in the log.
    value: T,
    /// A batch has been begun and not ended: `value` may be half of it, and so may be what is in the
    /// log behind the tail. For ever, once a change has panicked. Not the lock's own poison: that is
    /// also there when a copy panicked, which spoils nothing.
    is_torn: bool,
    appender: Appender<T::Write>,
    desks: Vec<Desk<T::Write, Answer<T>>>,
    /// Empty; keeps its memory from batch to batch.
    answers: Answers<T>,
    replicas_made: usize,
}

/// How a replica is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its number.
    pub number: Number,
    /// Its name.
    pub name: String,
    /// Where it stands.
    pub state: State,
    /// How often it lagged a whole log and had to be copied anew.
    pub evictions: u64,
}

/// Where a replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has not looked at this many changes yet; its next read does.
    Lags(u64),
    /// It lagged the whole log: its next read copies the structure.
    Evicted,
}

impl<T: Dispatch> NodeReplicated<T> {
    /// Of this structure.
    pub fn new(value: T, options: Options) -> Self {
        let appender = Appender::new(options.clone());
        let (desks, answers) = (Vec::new(), Vec::new());
        let core = Core { value, is_torn: false, appender, desks, answers, replicas_made: 0 };
        let combiner = AtomicUsize::new(0);
        Self { shared: Arc::new(Shared { core: Mutex::new(core), combiner, options }) }
    }

    /// Adds a replica, as the structure is now. It goes when it is dropped. Waits for a writer at
    /// work. Panics when a [`Dispatch::write`] has panicked.
    pub fn replica(&self, name: &str) -> Replica<T> {
        let mut core = self.shared.lock();
        let core = &mut *core;
        let value = core.copy(); // first: if it panics, nobody has come
        core.replicas_made += 1;
        let number = core.replicas_made;
        let (writer, desk) = seat(self.shared.options.clone());
        core.desks.retain(|desk| !desk.is_gone());
        core.desks.push(desk);
        let cursor = core.appender.cursor(number, name.to_owned());
        Replica::new(Arc::clone(&self.shared), value, cursor, writer)
    }

    /// How the replicas are. Waits for a writer at work; also when a change has panicked.
    pub fn members(&self) -> Vec<Member> {
        let core = self.shared.lock();
        let published = core.appender.published();
        let mut members = Vec::new();
        for position in core.appender.positions() {
            let state = match position.standing() {
                Standing::At(next) => State::Lags(published - next),
                Standing::Evicted => State::Evicted,
                Standing::Gone => continue,
            };
            let (number, name) = (Number(position.number), position.name.clone());
            members.push(Member { number, name, state, evictions: position.evictions() });
        }
        members
    }
}

impl<T: Dispatch> Shared<T> {
    /// Whoever has panicked with the lock is no reason: what was spoilt says [`Core::is_torn`].
    fn lock(&self) -> MutexGuard<'_, Core<T>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the structure as it is now for a replica that was evicted. If that panics the replica
    /// is still evicted (O7): placed first, it would pass its old copy off as the newest.
    pub(crate) fn copy_for(&self, cursor: &mut Cursor<T::Write>) -> T {
        let mut core = self.lock();
        self.combiner.store(cursor.position().number, Ordering::Relaxed);
        let value = core.copy();
        core.appender.place(cursor);
        value
    }

    /// Carries out what waits at the seats, if nobody else is at it.
    pub(crate) fn try_combine(&self, number: usize) -> Result<(), TryCombineError> {
        let mut core = match self.core.try_lock() {
            Ok(core) => core,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(TryCombineError::Busy),
        };
        if core.is_torn {
            return Err(TryCombineError::Poisoned);
        }
        self.combiner.store(number, Ordering::Relaxed);
        core.combine(&self.options);
        Ok(())
    }

    pub(crate) fn combiner(&self) -> Number {
        Number(self.combiner.load(Ordering::Relaxed))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TryCombineError {
    /// Another thread has the lock.
    Busy,
    /// A change has panicked.
    Poisoned,
}

impl<T: Dispatch> Core<T> {
    fn copy(&self) -> T {
        assert!(
            !self.is_torn,
            "a write to a replicated structure has panicked: no copy can be made of it"
        );
        self.value.clone()
    }

    /// Every waiting change: on our copy, into the log; then all at once for everyone to see; then
    /// their writers are told. Before that point none of them has happened (O5).
    fn combine(&mut self, options: &Options) {
        // Ours and not `self`'s: if a change panics they are dropped, and their writers told.
        let mut answers = std::mem::take(&mut self.answers);
        self.is_torn = true;
        for desk in &self.desks {
            let Some((change, taken)) = desk.take() else {
                continue;
            };
            // Room first: a change that is refused is not on our copy either.
            let answer = match self.appender.make_room() {
                Ok(()) => {
                    let done = self.value.write(change.clone());
                    self.appender.put(change);
                    Ok(done)
                }
                Err(NoRoom { number, name }) => {
                    Err(WriteError::NoRoom { number: Number(number), name })
                }
            };
            if broken!(options, AnswerEarly) {
                taken.finish(answer);
            } else {
                answers.push((taken, answer));
            }
        }
        self.appender.publish();
        for (taken, answer) in answers.drain(..) {
            taken.finish(answer);
        }
        self.answers = answers;
        self.is_torn = false;
    }
}
