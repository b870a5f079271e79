//! Tells the peers that an instance of this node has ended (rule L5) before it can speak on links.
//!
//! A shard speaks on links once it has replayed its log, which takes a second and more with a large
//! one; the proof of its predecessor's exit is there long before: the parent has reaped it, or the
//! device's lock is got and the superblock names it. Until the peers hear of it they take the volume's
//! primary for silent, and wait out its lease. So each exit is said to each peer once, as soon as it
//! is proven, in one frame on a connection of its own, from a thread that waits for no replay.
//!
//! Nothing hangs on it: who is not reached within a lease's time has waited it out by then, and every
//! link begins with the exits that are known (`tercet-replication`, `lease.rs`). To hear of an exit
//! twice, or late, says nothing new: an instance never comes back.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tercet_proto::message::{EXITS_MAX, ProvenExit, encode_proven_exit};
use tercet_proto::{InstanceId, NodeName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;
use tracing::{debug, info};

use crate::plan::Plan;

/// How long it may take to reach a peer: D (rule L2), after which nobody waits any more.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module's text.
pub struct Herald {
    node: NodeName,
    instance: InstanceId,
    said: Mutex<BTreeSet<InstanceId>>,
    news: UnboundedSender<News>,
}

/// What is said, and to whom.
struct News {
    plan: Arc<Plan>,
    frame: Arc<[u8]>,
}

impl Herald {
    /// Of this start of the engine of `node`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(node: NodeName, instance: InstanceId) -> io::Result<Self> {
        let (news, received) = unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new()
            .name("herald".into())
            .spawn(move || runtime.block_on(tell_all(received)))?;
        Ok(Self { node, instance, said: Mutex::default(), news })
    }

    /// These were on this node and have ended, proven: the peers of `plan` are told, once of each.
    /// Returns at once.
    pub fn tell(&self, plan: &Arc<Plan>, exited: &[InstanceId]) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let news = exited.iter().copied().filter(|one| *one != self.instance && said.insert(*one));
        let mut exited: Vec<InstanceId> = news.collect();
        exited.drain(..exited.len().saturating_sub(EXITS_MAX)); // the newest come last
        let Some(last) = exited.last() else { return };
        info!(%last, count = exited.len(), "the peers are told of proven exits (L5)");
        let exit = ProvenExit {
            cluster: *plan.cluster.as_bytes(),
            node: self.node.clone(),
            instance: self.instance,
            exited,
        };
        let mut frame = Vec::new();
        encode_proven_exit(&exit, &mut frame);
        // The thread ends with the process.
        let _ = self.news.send(News { plan: Arc::clone(plan), frame: frame.into() });
    }
}

async fn tell_all(mut received: UnboundedReceiver<News>) {
    while let Some(News { plan, frame }) = received.recv().await {
        for peer in &plan.peers {
            let (from, to, frame) = (plan.address, peer.address, Arc::clone(&frame));
            tokio::spawn(async move {
                match timeout(PATIENCE, tell(from, to, &frame)).await {
                    Ok(Ok(())) => debug!(%to, "it has heard of the exit"),
                    Ok(Err(error)) => debug!(%to, %error, "it hears of the exit with its link"),
                    Err(_) => debug!(%to, "not reached in time: its link tells it of the exit"),
                }
            });
        }
    }
}

/// Connects, says it, and waits for the other side to close: what is closed here with bytes on their
/// way could be lost.
async fn tell(from: IpAddr, to: SocketAddr, frame: &[u8]) -> io::Result<()> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.bind(SocketAddr::new(from, 0))?;
    let mut stream = socket.connect(to).await?;
    stream.write_all(frame).await?;
    stream.shutdown().await?;
    while stream.read(&mut [0; 64]).await? > 0 {}
    Ok(())
}
