//! Following a primary that hands over, at the member that was asked (T10).
//!
//! It says that it stands and swaps (T3), while the old primary still serves hosts under its lease. Once
//! it *knows* that its swap took place it says so, and waits a moment for the old primary to answer what
//! it has and to give its lease back (L5). Then it seals, adopts and serves like any new primary (T4 to
//! T7): nothing of that is left out or relied upon.
//!
//! Meanwhile it is a secondary of the old epoch: it takes entries and acknowledges them, for it has
//! promised nothing newer (W2, W3). If its swap is lost the old primary goes on, and so does it. If the
//! old primary says nothing any more the seal begins without it, and waits for grants as always (L2).

use tercet_proto::message::{Envelope, HandOverMessage, NotFollowing, ReplicaMessage};
use tercet_proto::{Config, Epoch, InstanceId, Instant, NodeName, ReplicaId};

use crate::api::PeerId;
use crate::cx::Cx;
use crate::replica::{Replica, Role};
use crate::seal::forgotten;

/// Swaps that are tried for one asking: an edit within the epoch may come between (T3).
const TRIES: u8 = 3;

/// What a replica knows of being asked to follow.
#[derive(Clone, Debug, Hash, Default)]
pub(crate) struct Succession {
    heir: Option<Heir>,
    last: Option<Asking>,
}

/// The newest asking, and what became of it: doubled ones are answered and do nothing.
#[derive(Clone, Debug, Hash)]
struct Asking {
    epoch: Epoch,
    instance: InstanceId,
    number: u64,
    declined: Option<NotFollowing>,
}

/// It follows.
#[derive(Clone, Debug, Hash)]
struct Heir {
    /// Whom: the primary of `epoch`.
    node: NodeName,
    replica: ReplicaId,
    epoch: Epoch,
    instance: InstanceId,
    number: u64,
    tries: u8,
    swapped: Option<Swapped>,
}

/// The swap took place.
#[derive(Clone, Debug, Hash)]
struct Swapped {
    config: Config,
    /// The attachments are those that the swap returned, or of a later consistent read (T7).
    attachments_known: bool,
    since: Instant,
}

impl Succession {
    /// Another leads a newer epoch, or this replica begins to.
    pub fn forget(&mut self) {
        self.heir = None;
    }
}

impl Replica {
    /// The primary asks this member to follow it.
    pub fn on_take_over(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        number: u64,
        cx: &mut Cx<'_>,
    ) {
        let Envelope { epoch, instance, from: replica, .. } = *envelope;
        if epoch < self.promised_epoch() {
            return self.tell_newer((peer, replica), cx);
        }
        let last = self.succession.last.as_ref();
        if last.is_some_and(|last| {
            (last.epoch, last.instance) == (epoch, instance) && number <= last.number
        }) {
            return self.answer_again(peer, envelope, cx);
        }
        if !self.fits_promise(envelope, cx) || !matches!(self.role, Role::Follower { .. }) {
            return; // asked again
        }
        if let Some(heir) = &mut self.succession.heir {
            // It was given up there and is not over here: the swap is on its way.
            heir.number = number;
            self.succession.last = Some(Asking { epoch, instance, number, declined: None });
            return self.answer_again(peer, envelope, cx);
        }
        let Some(config) = self.known.as_ref().map(|known| known.config.clone()) else { return };
        let declined = if config.epoch != epoch {
            Some(NotFollowing::Lost)
        } else if !self.may_stand(&config, cx) || forgotten(cx).is_some() {
            Some(NotFollowing::Unfit)
        } else if self.swap.is_some() || self.reading.is_some() {
            Some(NotFollowing::Busy)
        } else {
            None
        };
        self.succession.last = Some(Asking { epoch, instance, number, declined });
        if declined.is_none() {
            let (node, tries, swapped) = (peer.node.clone(), 1, None);
            let heir = Heir { node, replica, epoch, instance, number, tries, swapped };
            self.succession.heir = Some(heir);
        }
        self.answer_again(peer, envelope, cx);
        if declined.is_none() {
            let new = self.led_by_me(&config, cx);
            self.swap(new, cx);
        }
    }

    /// The primary asked twice, or its word came twice.
    fn answer_again(&mut self, peer: PeerId, envelope: &Envelope, cx: &mut Cx<'_>) {
        let Some(last) = &self.succession.last else { return };
        let number = last.number;
        let answer = match (&self.succession.heir, last.declined) {
            (Some(Heir { swapped: Some(Swapped { config, .. }), .. }), _) => {
                HandOverMessage::Swapped { config: config.clone() }
            }
            (Some(_), _) => HandOverMessage::Stands { number },
            (None, Some(why)) => HandOverMessage::Declined { number, why },
            (None, None) => return,
        };
        let from = self.sender(envelope.epoch);
        cx.answer(peer, envelope.from, from, ReplicaMessage::HandOver(answer));
    }

    /// The object names this instance in an epoch that is not promised. Where it follows a primary
    /// that asked for it, that one is told and has a moment; whether it is so.
    pub fn waits_for_predecessor(
        &mut self,
        config: &Config,
        consistent: bool,
        cx: &mut Cx<'_>,
    ) -> bool {
        let drain = cx.options.timing.drain;
        let Some(heir) = &mut self.succession.heir else { return false };
        if config.epoch != heir.epoch.next() {
            return false;
        }
        if let Some(swapped) = &mut heir.swapped {
            swapped.config = config.clone();
            swapped.attachments_known |= consistent;
            return true;
        }
        let (config, since) = (config.clone(), cx.now);
        let message = HandOverMessage::Swapped { config: config.clone() };
        heir.swapped = Some(Swapped { config, attachments_known: consistent, since });
        let (node, replica, epoch) = (heir.node.clone(), heir.replica, heir.epoch);
        cx.send(&node, replica, self.sender(epoch), ReplicaMessage::HandOver(message));
        self.wake(since + drain + drain / 2);
        true
    }

    /// What the one who follows waits for: its swap, then its predecessor.
    pub fn tick_heir(&mut self, cx: &mut Cx<'_>) {
        let drain = cx.options.timing.drain;
        let Some(heir) = &self.succession.heir else { return };
        let Some(swapped) = &heir.swapped else { return self.tick_heirs_swap(cx) };
        let reached = cx.pairs.reached((&heir.node, heir.replica), self.volume);
        let gone = self.grants.is_given_back(heir.epoch, heir.instance)
            || cx.has_exited(&heir.node, heir.instance)
            || reached.is_none_or(|(instance, _)| instance != heir.instance);
        let late = swapped.since + drain + drain / 2;
        if !gone && cx.now < late {
            self.wake(late);
            return;
        }
        let Swapped { config, attachments_known, .. } = swapped.clone();
        self.start_candidate(config, cx);
        if attachments_known {
            self.attachments_known(cx);
        }
    }

    /// T3: lost to an edit within the epoch: once more with the new value. Else nothing has changed.
    fn tick_heirs_swap(&mut self, cx: &mut Cx<'_>) {
        if self.swap.is_some() || self.reading.is_some() {
            return; // until its outcome is known both count
        }
        let (Some(heir), Some(known)) = (&mut self.succession.heir, &self.known) else { return };
        let config = known.config.clone();
        if config.epoch == heir.epoch && heir.tries < TRIES {
            heir.tries += 1;
            let new = self.led_by_me(&config, cx);
            self.swap(new, cx);
            return;
        }
        let Heir { node, replica, epoch, number, .. } = heir.clone();
        let why = NotFollowing::Lost;
        if let Some(last) = &mut self.succession.last {
            last.declined = Some(why);
        }
        self.succession.heir = None;
        let declined = ReplicaMessage::HandOver(HandOverMessage::Declined { number, why });
        cx.send(&node, replica, self.sender(epoch), declined);
    }
}

#[cfg(feature = "model")]
impl Succession {
    /// See `Node::forget_pace`.
    pub fn forget_pace(&mut self, paced: Instant) {
        if let Some(Heir { swapped: Some(swapped), .. }) = &mut self.heir {
            swapped.since = paced;
        }
    }
}
