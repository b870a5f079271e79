//! Authentication of a path's queues (`crate::auth`), between Connect and everything else.

use bytes::Bytes;

use super::api::{ConnectionId, HostEffect};
use super::path::{Context, Path};
use super::queue::Completed;
use crate::auth::{AuthEntry, Computed, Initiator, MESSAGE_BYTES_MAX};
use crate::command::{Data, fctype};
use crate::fabrics::AUTHENTICATION_REQUIRED;

/// Tag of commands that authenticate a queue; operations have smaller ones.
pub(super) const AUTHENTICATION_TAG: u64 = u64::MAX - 1;

impl Path {
    /// A queue's Connect has succeeded with this result.
    pub(super) fn queue_connected(
        &mut self,
        id: ConnectionId,
        result: u64,
        context: &mut Context<'_>,
    ) {
        let options = context.options;
        let is_required = result & AUTHENTICATION_REQUIRED != 0;
        match &options.secret {
            Some(secret) if is_required => {
                let transaction = context.draw() as u16;
                let initiator = Initiator::new(
                    &options.host_nqn,
                    &options.subsystem_nqn,
                    secret.clone(),
                    options.controller_secret.clone(),
                    transaction,
                );
                self.link(id).expect("a link").authentication = Some(Box::new(initiator));
                self.authenticate(id, context);
            }
            None if is_required => {
                self.lose(
                    "the controller asks for authentication, and there is no secret",
                    context,
                );
            }
            // Who is to show that it is the controller, and does not ask for it, is none.
            _ if options.controller_secret.is_some() => {
                self.lose("the controller does not authenticate itself", context);
            }
            _ => self.queue_ready(id, context),
        }
    }

    /// Sends or fetches the next message, or goes on when there is none any more.
    fn authenticate(&mut self, id: ConnectionId, context: &mut Context<'_>) {
        let link = self.link(id).expect("a link");
        let initiator = link.authentication.as_mut().expect("it is being authenticated");
        if let Some(message) = initiator.message() {
            let bytes = message.len() as u32;
            let data = Data::InCapsule(bytes);
            let entry = AuthEntry::to_entry(fctype::AUTHENTICATION_SEND, 0, bytes, data);
            link.queue.submit(entry, AUTHENTICATION_TAG, Bytes::from(message), 0);
        } else if let Some(reason) = initiator.failure() {
            return self.lose(&format!("authentication failed: {reason}"), context);
        } else if initiator.is_done() {
            link.authentication = None;
            return self.queue_ready(id, context);
        } else if initiator.wants_message() {
            let (bytes, room) = (MESSAGE_BYTES_MAX as u32, MESSAGE_BYTES_MAX);
            let data = Data::Transport(bytes);
            let entry = AuthEntry::to_entry(fctype::AUTHENTICATION_RECEIVE, 0, bytes, data);
            link.queue.submit(entry, AUTHENTICATION_TAG, Bytes::new(), room);
        }
        self.flush(id, context);
    }

    /// An Authentication Send or Receive has ended.
    pub(super) fn authentication_completed(
        &mut self,
        id: ConnectionId,
        completed: &Completed,
        context: &mut Context<'_>,
    ) {
        if !completed.status.is_success() {
            let why = format!("authentication failed: {}", completed.status);
            return self.lose(&why, context);
        }
        let link = self.link(id).expect("a link");
        let initiator = link.authentication.as_mut().expect("it is being authenticated");
        if !completed.data.is_empty()
            && let Some(computation) = initiator.receive(&completed.data.concat())
        {
            context.effects.push(HostEffect::Compute(id, computation));
            return;
        }
        self.authenticate(id, context);
    }

    /// The executor has run an [`HostEffect::Compute`].
    pub(super) fn computed(
        &mut self,
        id: ConnectionId,
        computed: &Computed,
        context: &mut Context<'_>,
    ) {
        let Some(initiator) = self.link(id).and_then(|link| link.authentication.as_mut()) else {
            return;
        };
        initiator.computed(computed);
        self.authenticate(id, context);
    }
}
