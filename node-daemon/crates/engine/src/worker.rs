//! `tercet-engine run`: the engine itself.
//!
//! Start order: the instance is drawn, the peers are told which of its predecessors have ended
//! (`herald`), it is written down, the reactors start, the remembered plan is carried out (lock, replay, listen, see `opener` and `core`), and the control API answers from
//! the beginning, whatever state the devices are in. The main thread is the control thread.

use std::fs::File;
use std::io;
use std::process::ExitCode;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Signal, set_parent_process_death_signal};
use tercet_proto::{InstanceId, NodeName};
use tercet_reactor::{Postbox, Reactor, Settings, mailbox};
use tercet_store::arena::Arena;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::args::{Args, Command};
use crate::control::{self, Directory, Reactors, Service};
use crate::core::{Core, MESSAGES_MAX, ToReactor};
use crate::herald::Herald;
use crate::opener::Opener;
use crate::outbox::Outbox;
use crate::plan::Plan;
use crate::state::{self, InstanceFile};

/// Memory for device buffers, of all reactors together.
pub const ARENA_BYTES: usize = 64 << 20;
/// How long a reactor looks for more to do before it sleeps, while traffic flows and there are
/// cores to spare.
const SPIN: Duration = Duration::from_micros(20);
/// Cores from which on a reactor may spin: with fewer it would take them from its own peers.
const SPIN_CORES_MIN: usize = 4;

/// Runs the engine until SIGTERM or Stop.
pub fn run(args: &Args) -> io::Result<ExitCode> {
    std::fs::create_dir_all(&args.state_dir)?;
    let _lock = lock_state_dir(args)?;
    // Who kills the supervisor kills the engine: two of them must not fight for the devices.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let instance = InstanceId(Uuid::new_v4());
    let plan = state::load(&args.state_dir).map(Arc::new);
    let herald = announce(args, instance, plan.as_ref())?;
    InstanceFile::in_dir(&args.state_dir).write(instance.0).map_err(io::Error::other)?;
    info!(node = args.node, %instance, version = env!("CARGO_PKG_VERSION"), "engine");
    let outbox = Arc::new(Outbox::default());
    let started = start_reactors(args, instance, herald, &outbox)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(control(args, started, outbox, plan))
}

fn proven_exits(args: &Args) -> Vec<InstanceId> {
    args.proven_exits.iter().copied().map(InstanceId).collect()
}

/// First of all: hosts of the dead engine wait for its peers to hear that it is over (L5).
fn announce(args: &Args, instance: InstanceId, plan: Option<&Arc<Plan>>) -> io::Result<Herald> {
    let herald = Herald::start(NodeName::new(&args.node), instance)?;
    if let Some(plan) = plan {
        herald.tell(plan, &proven_exits(args));
    }
    Ok(herald)
}

/// One engine for each state directory, whatever started it.
fn lock_state_dir(args: &Args) -> io::Result<File> {
    let path = args.state_dir.join("lock");
    let file = File::create(&path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        let text = format!("{}: another engine runs with this state directory", path.display());
        io::Error::new(io::ErrorKind::AddrInUse, text)
    })?;
    Ok(file)
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

/// One reactor up to two cores: hosts and peers need some too.
fn reactors_of(args: &Args) -> usize {
    args.reactors.unwrap_or_else(|| if cores() <= 2 { 1 } else { cores() / 2 })
}

fn start_reactors(
    args: &Args,
    instance: InstanceId,
    herald: Herald,
    outbox: &Arc<Outbox>,
) -> io::Result<Arc<Directory>> {
    let count = reactors_of(args);
    let mut postboxes = Vec::new();
    let mut directories = Vec::new();
    for number in 0..count {
        let (postbox_sender, postbox) = sync_channel(1);
        let (directory, directory_receiver) = sync_channel::<Arc<Directory>>(1);
        let outbox = Arc::clone(outbox);
        thread::Builder::new().name(format!("reactor-{number}")).spawn(move || {
            match reactor(&postbox_sender, &directory_receiver, number, count, outbox) {
                Ok(core) => core.run(),
                Err(failure) => {
                    error!(reactor = number, error = %failure, "cannot be started");
                    std::process::exit(1);
                }
            }
        })?;
        postboxes.push(postbox.recv().map_err(io::Error::other)?);
        directories.push(directory);
    }
    let directory = Arc::new(Directory::new(
        NodeName::new(&args.node),
        instance,
        proven_exits(args),
        herald,
        Reactors(postboxes.into()),
    ));
    for sender in directories {
        sender.send(Arc::clone(&directory)).map_err(io::Error::other)?;
    }
    info!(reactors = count, "reactors are running");
    Ok(directory)
}

fn reactor(
    postbox: &mpsc::SyncSender<Postbox<ToReactor>>,
    directory: &mpsc::Receiver<Arc<Directory>>,
    number: usize,
    count: usize,
    outbox: Arc<Outbox>,
) -> io::Result<Core> {
    let spin = if cores() >= SPIN_CORES_MIN { SPIN } else { Duration::ZERO };
    let mut reactor = Reactor::new(Settings { spin })?;
    let (sender, inbox) = mailbox(reactor.waker(), MESSAGES_MAX);
    postbox.send(sender).map_err(io::Error::other)?;
    // Locking memory takes a while; devices are locked meanwhile.
    let arena = Arena::new(ARENA_BYTES / count);
    if !reactor.register_arena(&arena) {
        warn!(reactor = number, "device buffers are not registered: a little slower");
    }
    let directory = directory.recv().map_err(io::Error::other)?;
    Ok(Core::new(number, reactor, inbox, directory, outbox, arena))
}

async fn control(
    args: &Args,
    directory: Arc<Directory>,
    outbox: Arc<Outbox>,
    plan: Option<Arc<Plan>>,
) -> io::Result<ExitCode> {
    let opener = Opener::new(Arc::clone(&directory));
    let stop = Arc::new(Notify::new());
    let state_dir = args.state_dir.clone();
    let service = Service::new(directory, outbox, opener, state_dir, Arc::clone(&stop));
    let service = Arc::new(service);
    if let Some(plan) = plan {
        service.carry_out(&plan).map_err(io::Error::other)?;
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let ending = async {
        tokio::select! {
            () = stop.notified() => {}
            _ = terminate.recv() => service.hand_over_all().await,
        }
        // The answer to Stop is to leave before the process ends.
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    tokio::select! {
        served = control::serve(&args.socket, Arc::clone(&service), std::future::pending()) => {
            served?;
        }
        () = ending => {}
    }
    info!("the engine stops");
    // The reactors end with the process: nothing that they have needs an end.
    Ok(ExitCode::SUCCESS)
}

/// What `tercet-engine` does with its arguments.
pub fn main(args: &Args) -> io::Result<ExitCode> {
    match args.command {
        Command::Supervise => crate::supervisor::run(args),
        Command::Run => {
            crate::logging::abort_on_panic();
            run(args)
        }
    }
}
