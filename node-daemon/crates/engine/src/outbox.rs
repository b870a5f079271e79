//! What the engine wants of the agent, kept until it is answered.
//!
//! Reactors put in, the control thread hands out. Swaps and reads are kept by what they are about,
//! so that a new subscriber gets exactly those that have no answer yet, and a request that is made
//! twice is one. Notices are a bounded queue that loses its oldest: they are for people. The lock
//! is taken a few times per takeover and never on the way of I/O.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tercet_proto::{Config, Epoch, Token, VolumeId};
use tokio::sync::Notify;

/// Notices that wait for the agent; the oldest is dropped for a new one.
const NOTICES_MAX: usize = 1024;

/// Names a swap for the agent: a shard and its token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwapId {
    /// Who asked.
    pub shard: u16,
    /// Its name for it.
    pub token: Token,
}

const TOKEN_BITS: u32 = 48;

impl SwapId {
    /// As one number on the wire.
    pub fn to_wire(self) -> u64 {
        assert!(self.token.0 < 1 << TOKEN_BITS, "tokens count up from 0");
        u64::from(self.shard) << TOKEN_BITS | self.token.0
    }

    /// Back from the wire.
    pub fn from_wire(wire: u64) -> Self {
        let shard = (wire >> TOKEN_BITS) as u16;
        Self { shard, token: Token(wire & ((1 << TOKEN_BITS) - 1)) }
    }
}

/// A compare-and-swap to be executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// The volume.
    pub volume: VolumeId,
    /// What must be there.
    pub old: Config,
    /// What shall be there.
    pub new: Config,
}

/// Something worth an event at an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The volume; none for the node.
    pub volume: Option<VolumeId>,
    /// As Kubernetes events have it.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// Whether it is bad.
    pub warning: bool,
}

/// One thing for the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Execute this swap.
    Swap(SwapId, Box<Swap>),
    /// Read this Volume object consistently.
    Read(VolumeId),
    /// Write `status.fence` (rule H5).
    Fenced(VolumeId, Epoch, u64),
    /// Tell people.
    Notice(Notice),
    /// Status has changed.
    Changed,
}

#[derive(Default)]
struct State {
    swaps: BTreeMap<SwapId, Swap>,
    reads: BTreeSet<VolumeId>,
    fences: BTreeMap<VolumeId, (Epoch, u64)>,
    notices: VecDeque<Notice>,
    changed: bool,
    /// Not handed to the present subscriber yet.
    fresh: VecDeque<Fresh>,
    subscriber: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fresh {
    Swap(SwapId),
    Read(VolumeId),
    Fence(VolumeId),
    Notice,
}

/// What there is for a subscriber now.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Is(Request),
    Nothing,
    /// A newer one has come.
    Ended,
}

/// See the module's text.
#[derive(Default)]
pub struct Outbox {
    state: Mutex<State>,
    notify: Notify,
}

/// A place in the row of subscribers: a newer one ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscription(u64);

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.notify.notify_waiters();
    }

    /// Asks for a swap.
    pub fn swap(&self, id: SwapId, swap: Swap) {
        self.put(|state| {
            if state.swaps.insert(id, swap).is_none() {
                state.fresh.push_back(Fresh::Swap(id));
            }
        });
    }

    /// Asks for a consistent read.
    pub fn read(&self, volume: VolumeId) {
        self.put(|state| {
            if state.reads.insert(volume) {
                state.fresh.push_back(Fresh::Read(volume));
            }
        });
    }

    /// Asks for a fence to be written.
    pub fn fenced(&self, volume: VolumeId, epoch: Epoch, generation: u64) {
        self.put(|state| {
            if state.fences.insert(volume, (epoch, generation)) != Some((epoch, generation)) {
                state.fresh.push_back(Fresh::Fence(volume));
            }
        });
    }

    /// Tells people.
    pub fn notice(&self, notice: Notice) {
        self.put(|state| {
            state.notices.push_back(notice);
            state.fresh.push_back(Fresh::Notice);
            if state.notices.len() > NOTICES_MAX {
                state.notices.pop_front();
                let oldest = state.fresh.iter().position(|&fresh| fresh == Fresh::Notice);
                state.fresh.remove(oldest.expect("each notice stands in the row"));
            }
        });
    }

    /// Status has changed.
    pub fn changed(&self) {
        self.put(|state| state.changed = true);
    }

    /// The volume that a swap is for, while it has no answer.
    pub fn swap_volume(&self, id: SwapId) -> Option<VolumeId> {
        self.lock().swaps.get(&id).map(|swap| swap.volume)
    }

    /// A swap's answer has been handed on.
    pub fn swap_answered(&self, id: SwapId) {
        self.lock().swaps.remove(&id);
    }

    /// A consistent view of the volume has come; a fence that it shows need not be asked for.
    pub fn view_came(&self, volume: VolumeId, fence: Option<(Epoch, u64)>, consistent: bool) {
        let mut state = self.lock();
        if consistent {
            state.reads.remove(&volume);
        }
        if fence.is_some() && state.fences.get(&volume) == fence.as_ref() {
            state.fences.remove(&volume);
        }
    }

    /// The swaps of an epoch that is over will never be answered: forgotten with the volume.
    pub fn forget(&self, volume: VolumeId) {
        let mut state = self.lock();
        state.swaps.retain(|_, swap| swap.volume != volume);
        state.reads.remove(&volume);
        state.fences.remove(&volume);
    }

    /// A new subscriber; it is handed all that has no answer, then what comes.
    pub fn subscribe(&self) -> Subscription {
        let mut number = 0;
        self.put(|state| {
            state.subscriber += 1;
            number = state.subscriber;
            let swaps = state.swaps.keys().copied().map(Fresh::Swap);
            let reads = state.reads.iter().copied().map(Fresh::Read);
            let fences = state.fences.keys().copied().map(Fresh::Fence);
            let notices = state.notices.iter().map(|_| Fresh::Notice);
            state.fresh = swaps.chain(reads).chain(fences).chain(notices).collect();
            state.changed = true;
        });
        Subscription(number)
    }

    /// The next thing for this subscriber; nothing when a newer one has come.
    pub async fn next(&self, subscription: Subscription) -> Option<Request> {
        loop {
            let notified = self.notify.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            match self.try_next(subscription) {
                Next::Is(request) => return Some(request),
                Next::Ended => return None,
                Next::Nothing => notified.await,
            }
        }
    }

    fn try_next(&self, subscription: Subscription) -> Next {
        let mut state = self.lock();
        if state.subscriber != subscription.0 {
            return Next::Ended;
        }
        while let Some(fresh) = state.fresh.pop_front() {
            let request = match fresh {
                Fresh::Swap(id) => {
                    state.swaps.get(&id).map(|s| Request::Swap(id, Box::new(s.clone())))
                }
                Fresh::Read(volume) => state.reads.get(&volume).copied().map(Request::Read),
                Fresh::Fence(volume) => state
                    .fences
                    .get(&volume)
                    .map(|&(epoch, generation)| Request::Fenced(volume, epoch, generation)),
                Fresh::Notice => state.notices.pop_front().map(Request::Notice),
            };
            if let Some(request) = request {
                return Next::Is(request);
            }
        }
        if std::mem::take(&mut state.changed) { Next::Is(Request::Changed) } else { Next::Nothing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(number: u8) -> VolumeId {
        VolumeId::from_bytes([number; 16])
    }

    fn swap(number: u8, token: u64) -> (SwapId, Swap) {
        let config = Config {
            epoch: Epoch(1),
            state: tercet_proto::ConfigState::Recovering,
            primary: tercet_proto::Primary {
                node: tercet_proto::NodeName::new("n"),
                instance: tercet_proto::InstanceId::from_bytes([0; 16]),
            },
            members: Vec::new(),
            previous_members: None,
            learners: Vec::new(),
            single_copy: None,
            restored: None,
        };
        let id = SwapId { shard: 3, token: Token(token) };
        (id, Swap { volume: volume(number), old: config.clone(), new: config })
    }

    fn drain(outbox: &Outbox, subscription: Subscription) -> Vec<Request> {
        let next = || match outbox.try_next(subscription) {
            Next::Is(request) => Some(request),
            Next::Nothing => None,
            Next::Ended => panic!("the newest subscriber"),
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn a_new_subscriber_gets_all_that_has_no_answer_and_ends_the_older() {
        let outbox = Outbox::default();
        let first = outbox.subscribe();
        let (id, wanted) = swap(1, 7);
        outbox.swap(id, wanted.clone());
        outbox.read(volume(2));
        let swapped = Request::Swap(id, Box::new(wanted));
        let all = vec![swapped.clone(), Request::Read(volume(2)), Request::Changed];
        assert_eq!(drain(&outbox, first), all);
        let second = outbox.subscribe();
        assert_eq!(outbox.try_next(first), Next::Ended, "the older one has ended");
        assert_eq!(drain(&outbox, second), all, "nothing was answered");
        outbox.swap_answered(id);
        outbox.view_came(volume(2), None, true);
        let third = outbox.subscribe();
        assert_eq!(drain(&outbox, third), vec![Request::Changed]);
    }

    #[test]
    fn notices_lose_their_oldest() {
        let outbox = Outbox::default();
        let subscription = outbox.subscribe();
        for number in 0..NOTICES_MAX + 10 {
            let message = number.to_string();
            outbox.notice(Notice { volume: None, reason: "Test", message, warning: false });
        }
        let got = drain(&outbox, subscription);
        assert_eq!(got.len(), NOTICES_MAX + 1, "and that something has changed");
        let Request::Notice(first) = &got[0] else { panic!("a notice first") };
        assert_eq!(first.message, "10");
    }

    #[test]
    fn a_swap_has_one_name_on_the_wire() {
        let id = SwapId { shard: 65535, token: Token((1 << 48) - 1) };
        assert_eq!(SwapId::from_wire(id.to_wire()), id);
        assert_eq!(SwapId::from_wire(5), SwapId { shard: 0, token: Token(5) });
    }
}
