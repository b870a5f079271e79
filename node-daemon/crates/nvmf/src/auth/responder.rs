//! The controller's side of one queue.

use super::group::{Computation, Computed};
use super::message::Message;
use super::{Challenge, FailureReason, Group, Hash, Secret, Side};

/// The controller's side of one queue: takes what Authentication Send brings, has what
/// Authentication Receive fetches.
#[derive(Debug)]
pub struct Responder {
    host_nqn: String,
    subsystem_nqn: String,
    /// What the host has to know.
    secret: Secret,
    /// What the host may ask this side to know.
    controller_secret: Option<Secret>,
    state: State,
    is_authenticated: bool,
}

/// A transaction's parameters.
#[derive(Clone, Copy, Debug)]
struct Terms {
    transaction: u16,
    hash: Hash,
    group: Group,
}

#[derive(Debug)]
struct Reply {
    response: Vec<u8>,
    sequence: u32,
    nonce: Option<Vec<u8>>,
}

#[derive(Debug)]
enum State {
    /// A Negotiate is due.
    Idle,
    /// The challenge is being made.
    Drawing(Terms),
    /// It waits to be fetched.
    Challenge(Terms, Box<Computed>),
    /// A Reply is due.
    Reply(Terms, Box<Computed>),
    /// The reply is being checked.
    Checking(Terms, Box<Computed>, Reply),
    /// Success1 waits to be fetched; a Success2 is due if it has a response.
    Success1(Terms, Option<Vec<u8>>),
    Success2(Terms),
    /// Failure1 waits to be fetched.
    Failure(u16, FailureReason),
    /// Failure1 has been fetched, or the host has sent Failure2.
    Over(FailureReason),
}

impl Responder {
    /// For a queue of this host to this subsystem.
    pub fn new(
        host_nqn: &str,
        subsystem_nqn: &str,
        secret: Secret,
        controller_secret: Option<Secret>,
    ) -> Self {
        Self {
            host_nqn: host_nqn.to_owned(),
            subsystem_nqn: subsystem_nqn.to_owned(),
            secret,
            controller_secret,
            state: State::Idle,
            is_authenticated: false,
        }
    }

    /// The host has shown that it knows the secret, at least once.
    pub fn is_authenticated(&self) -> bool {
        self.is_authenticated
    }

    /// The queue has to end, and why.
    pub fn failure(&self) -> Option<FailureReason> {
        match self.state {
            State::Over(reason) => Some(reason),
            _ => None,
        }
    }

    fn fail(&mut self, transaction: u16, reason: FailureReason) -> Option<Computation> {
        self.state = State::Failure(transaction, reason);
        None
    }

    /// The host has sent a message.
    pub fn send(&mut self, data: &[u8]) -> Option<Computation> {
        let message = match Message::parse(data) {
            Ok(message) => message,
            Err(reason) => {
                let transaction = data.get(4..6).map_or(0, |at| u16::from_le_bytes([at[0], at[1]]));
                return self.fail(transaction, reason);
            }
        };
        match (message, std::mem::replace(&mut self.state, State::Idle)) {
            (Message::Negotiate { transaction, concatenates, hashes, groups }, State::Idle) => {
                self.negotiate(transaction, concatenates, &hashes, &groups)
            }
            (
                Message::Reply { transaction, response, sequence, nonce, public },
                State::Reply(terms, drawn),
            ) if transaction == terms.transaction => {
                let reply = Reply { response, sequence, nonce };
                self.take_reply(terms, drawn, reply, &public)
            }
            (Message::Success2 { transaction }, State::Success2(terms))
                if transaction == terms.transaction =>
            {
                self.is_authenticated = true;
                None
            }
            (Message::Failure { reason, by_host: true, .. }, _) => {
                self.state = State::Over(reason);
                None
            }
            (message, _) => self.fail(message.transaction(), FailureReason::Message),
        }
    }

    fn negotiate(
        &mut self,
        transaction: u16,
        concatenates: bool,
        hashes: &[u8],
        groups: &[u8],
    ) -> Option<Computation> {
        if concatenates {
            return self.fail(transaction, FailureReason::Concatenation);
        }
        let Some(hash) = Hash::ALL.into_iter().find(|hash| hashes.contains(&(*hash as u8))) else {
            return self.fail(transaction, FailureReason::Hash);
        };
        // The smallest group that is one: 2,048 bits are enough, and larger ones only cost time. A
        // host that wants more offers no smaller one.
        let offered = |group: &Group| groups.contains(&(*group as u8));
        let real = Group::ALL[1..].iter().copied().find(offered);
        let Some(group) = real.or(Some(Group::Null).filter(offered)) else {
            return self.fail(transaction, FailureReason::Group);
        };
        self.state = State::Drawing(Terms { transaction, hash, group });
        Some(Computation::draw(group))
    }

    fn take_reply(
        &mut self,
        terms: Terms,
        drawn: Box<Computed>,
        reply: Reply,
        public: &[u8],
    ) -> Option<Computation> {
        let fits =
            reply.response.len() == terms.hash.bytes() && public.len() == terms.group.bytes();
        // A challenge of 0 is none; one that is asked for needs a number.
        if !fits || (reply.nonce.is_some() && reply.sequence == 0) {
            return self.fail(terms.transaction, FailureReason::Payload);
        }
        let computation = Computation::agree(terms.group, &drawn, public);
        self.state = State::Checking(terms, drawn, reply);
        Some(computation)
    }

    /// What [`Responder::send`] asked for has been computed.
    pub fn computed(&mut self, computed: Computed) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Drawing(terms) => self.state = State::Challenge(terms, Box::new(computed)),
            State::Checking(terms, drawn, reply) => self.check(terms, &drawn, reply, computed),
            state => self.state = state, // of a transaction that is over
        }
    }

    fn check(&mut self, terms: Terms, drawn: &Computed, reply: Reply, agreed: Computed) {
        let Some(shared) = agreed.shared else {
            self.fail(terms.transaction, FailureReason::Payload);
            return;
        };
        let challenge = Challenge {
            hash: terms.hash,
            nonce: &drawn.nonce[..terms.hash.bytes()],
            shared: &shared,
            sequence: drawn.sequence,
            transaction: terms.transaction,
            host_nqn: &self.host_nqn,
            subsystem_nqn: &self.subsystem_nqn,
        };
        if !Hash::same(&challenge.response(Side::Host, &self.secret), &reply.response) {
            self.fail(terms.transaction, FailureReason::Failed);
            return;
        }
        let response = match (reply.nonce, &self.controller_secret) {
            (None, _) => None,
            (Some(nonce), Some(secret)) => {
                let challenge = Challenge { nonce: &nonce, sequence: reply.sequence, ..challenge };
                Some(challenge.response(Side::Controller, secret))
            }
            (Some(_), None) => {
                self.fail(terms.transaction, FailureReason::Failed);
                return;
            }
        };
        self.state = State::Success1(terms, response);
    }

    /// The message that the host can fetch now, if there is one.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let (message, state) = match std::mem::replace(&mut self.state, State::Idle) {
            State::Challenge(terms, drawn) => {
                let message = Message::Challenge {
                    transaction: terms.transaction,
                    hash: terms.hash,
                    group: terms.group,
                    sequence: drawn.sequence,
                    nonce: drawn.nonce[..terms.hash.bytes()].to_vec(),
                    public: drawn.public.clone(),
                };
                (message, State::Reply(terms, drawn))
            }
            State::Success1(terms, response) => {
                let waits = response.is_some();
                self.is_authenticated |= !waits;
                let Terms { transaction, hash, .. } = terms;
                let message = Message::Success1 { transaction, hash, response };
                (message, if waits { State::Success2(terms) } else { State::Idle })
            }
            State::Failure(transaction, reason) => {
                (Message::Failure { transaction, by_host: false, reason }, State::Over(reason))
            }
            // Being computed: the host's command waits.
            state @ (State::Drawing(_) | State::Checking(..)) => {
                self.state = state;
                return None;
            }
            _ => {
                let (transaction, reason) = (0, FailureReason::Message);
                (Message::Failure { transaction, by_host: false, reason }, State::Over(reason))
            }
        };
        self.state = state;
        Some(message.to_wire())
    }
}
