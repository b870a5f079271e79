//! The host's side of one queue.

use super::group::{Computation, Computed};
use super::message::Message;
use super::{Challenge, FailureReason, Group, Hash, Secret, Side};

/// The host's side of one queue. It is to fetch a message when [`Initiator::message`] has none.
#[derive(Debug)]
pub struct Initiator {
    host_nqn: String,
    subsystem_nqn: String,
    /// What this side shows to know.
    secret: Secret,
    /// What the controller has to show in turn.
    controller_secret: Option<Secret>,
    transaction: u16,
    state: State,
}

#[derive(Debug)]
struct Asked {
    hash: Hash,
    sequence: u32,
    nonce: Vec<u8>,
}

#[derive(Debug)]
enum State {
    /// A message waits to be sent, then this.
    Send(Vec<u8>, Box<State>),
    /// A Challenge is due.
    Challenge,
    /// It is being answered.
    Answering(Asked),
    /// A Success1 is due: with this response, if one was asked for.
    Success1(Option<Vec<u8>>),
    Done,
    Failed(FailureReason),
}

impl Initiator {
    /// For a queue of this host to this subsystem; `transaction` tells transactions apart.
    pub fn new(
        host_nqn: &str,
        subsystem_nqn: &str,
        secret: Secret,
        controller_secret: Option<Secret>,
        transaction: u16,
    ) -> Self {
        let negotiate = Message::Negotiate {
            transaction,
            concatenates: false,
            hashes: Hash::ALL.map(|hash| hash as u8).to_vec(),
            groups: Group::ALL.map(|group| group as u8).to_vec(),
        };
        Self {
            host_nqn: host_nqn.to_owned(),
            subsystem_nqn: subsystem_nqn.to_owned(),
            secret,
            controller_secret,
            transaction,
            state: State::Send(negotiate.to_wire(), Box::new(State::Challenge)),
        }
    }

    /// The message to send now; it counts as sent.
    pub fn message(&mut self) -> Option<Vec<u8>> {
        match std::mem::replace(&mut self.state, State::Done) {
            State::Send(message, next) => {
                self.state = *next;
                Some(message)
            }
            state => {
                self.state = state;
                None
            }
        }
    }

    /// Whether a message has to be fetched.
    pub fn wants_message(&self) -> bool {
        matches!(self.state, State::Challenge | State::Success1(_))
    }

    /// Both sides know what they have to.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// The queue has to end, and why.
    pub fn failure(&self) -> Option<FailureReason> {
        match self.state {
            State::Failed(reason) => Some(reason),
            _ => None,
        }
    }

    /// The controller is told so before the queue ends.
    fn fail(&mut self, reason: FailureReason) -> Option<Computation> {
        let message = Message::Failure { transaction: self.transaction, by_host: true, reason };
        self.state = State::Send(message.to_wire(), Box::new(State::Failed(reason)));
        None
    }

    /// A message has been fetched.
    pub fn receive(&mut self, data: &[u8]) -> Option<Computation> {
        let message = match Message::parse(data) {
            Ok(message) if message.transaction() == self.transaction => message,
            Ok(Message::Failure { by_host: false, reason, .. }) => {
                self.state = State::Failed(reason);
                return None;
            }
            Ok(_) => return self.fail(FailureReason::Message),
            Err(reason) => return self.fail(reason),
        };
        match (message, &self.state) {
            (Message::Failure { by_host: false, reason, .. }, _) => {
                self.state = State::Failed(reason);
                None
            }
            (Message::Challenge { hash, group, sequence, nonce, public, .. }, State::Challenge) => {
                self.state = State::Answering(Asked { hash, sequence, nonce });
                Some(Computation::draw_and_agree(group, &public))
            }
            (Message::Success1 { response, .. }, State::Success1(expected)) => {
                match (expected, response) {
                    (None, _) => self.state = State::Done,
                    (Some(expected), Some(response)) if Hash::same(expected, &response) => {
                        let message = Message::Success2 { transaction: self.transaction };
                        self.state = State::Send(message.to_wire(), Box::new(State::Done));
                    }
                    _ => return self.fail(FailureReason::Failed),
                }
                None
            }
            _ => self.fail(FailureReason::Message),
        }
    }

    /// What [`Initiator::receive`] asked for has been computed.
    pub fn computed(&mut self, computed: &Computed) {
        let State::Answering(asked) = std::mem::replace(&mut self.state, State::Done) else {
            unreachable!("only a challenge asks for a computation")
        };
        let Some(shared) = &computed.shared else {
            self.fail(FailureReason::Payload);
            return;
        };
        let challenge = Challenge {
            hash: asked.hash,
            nonce: &asked.nonce,
            shared,
            sequence: asked.sequence,
            transaction: self.transaction,
            host_nqn: &self.host_nqn,
            subsystem_nqn: &self.subsystem_nqn,
        };
        let response = challenge.response(Side::Host, &self.secret);
        let nonce = &computed.nonce[..asked.hash.bytes()];
        let expected = self.controller_secret.as_ref().map(|secret| {
            let challenge = Challenge { nonce, sequence: computed.sequence, ..challenge };
            challenge.response(Side::Controller, secret)
        });
        let message = Message::Reply {
            transaction: self.transaction,
            response,
            sequence: if expected.is_some() { computed.sequence } else { 0 },
            nonce: expected.is_some().then(|| nonce.to_vec()),
            public: computed.public.clone(),
        };
        self.state = State::Send(message.to_wire(), Box::new(State::Success1(expected)));
    }
}
