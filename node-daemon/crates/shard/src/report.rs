//! What goes into a shard at its start, and what it says of itself.

use tercet_replication::{Identity, Limits, Timing};

/// How a shard shall behave.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of the store: its buffers, which store must be here.
    pub store: tercet_store::options::Options,
    /// The times of the protocol.
    pub timing: Timing,
    /// What bounds the protocol's queues.
    pub limits: Limits,
    /// A rule of the protocol to break.
    #[cfg(feature = "canary")]
    pub canary: Option<tercet_replication::options::Canary>,
}

impl Options {
    /// What the protocol is told of it.
    pub(crate) fn of_protocol(&self, identity: Identity) -> tercet_replication::Options {
        tercet_replication::Options {
            identity,
            timing: self.timing,
            limits: self.limits,
            #[cfg(feature = "canary")]
            canary: self.canary,
        }
    }

    /// The product's, with the store's.
    pub fn new(store: tercet_store::options::Options) -> Self {
        Self {
            store,
            timing: Timing::default(),
            limits: Limits::default(),
            #[cfg(feature = "canary")]
            canary: None,
        }
    }
}
