//! The user-space host with its I/O: what `tercet-attach` and the load generator reach a volume
//! through.
//!
//! [`Driver`] runs in the caller's thread, for a load generator that wants no hand-over between
//! threads. [`Host`] owns a thread with a driver and takes operations from any thread; completions
//! are called in its thread and must not block. Multipath, retries and reconnects are those of
//! `tercet_nvmf::host`.

mod driver;
mod socket;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use rustix::fd::OwnedFd;
use tercet_nvmf::host::OPERATIONS_MAX;

pub use driver::{Driver, Finished, now};
pub use tercet_nvmf::host::{
    Geometry, HostOptions, Operation, OperationError, OperationId, PathState, SubmitError,
};

/// How long a turn looks for completions before it sleeps, by default.
pub const SPIN: Duration = Duration::from_micros(50);
/// Longest that a detach waits for its connections.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);

/// What a completion calls.
pub type Callback = Box<dyn FnOnce(Result<Vec<Bytes>, OperationError>) + Send>;

/// The volume and its paths at a moment.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Once a path has been live.
    pub geometry: Option<Geometry>,
    /// Every endpoint.
    pub paths: Vec<(SocketAddr, PathState)>,
    /// Why the path that was lost last was lost.
    pub last_loss: Option<String>,
}

enum Request {
    Submit(Operation, Callback),
    Endpoints(Vec<SocketAddr>),
    Detach,
}

struct Shared {
    requests: Mutex<Vec<Request>>,
    /// The thread sleeps or is about to: wake it.
    is_asleep: AtomicBool,
    /// Operations that were taken and have not ended.
    under_way: AtomicUsize,
    status: Mutex<Status>,
    changed: Condvar,
}

/// A host in a thread of its own. Dropped, it detaches.
pub struct Host {
    shared: Arc<Shared>,
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of the lock panics")
}

impl Host {
    /// Begins to connect; [`Host::wait_ready`] tells when the volume is known.
    pub fn connect(options: HostOptions) -> std::io::Result<Self> {
        let driver = Driver::new(options, SPIN, rand::random())?;
        let wake = driver.waker()?;
        let shared = Arc::new(Shared {
            requests: Mutex::new(Vec::new()),
            is_asleep: AtomicBool::new(false),
            under_way: AtomicUsize::new(0),
            status: Mutex::new(Status::default()),
            changed: Condvar::new(),
        });
        let worker = Worker {
            driver,
            shared: Arc::clone(&shared),
            callbacks: HashMap::new(),
            next_operation: 0,
            detach_until: None,
        };
        let thread =
            std::thread::Builder::new().name("nvme-host".into()).spawn(move || worker.run())?;
        Ok(Self { shared, wake, thread: Some(thread) })
    }

    /// Takes an operation; `done` is called with its end, in the host's thread (in this one when
    /// there are too many).
    pub fn submit(&self, operation: Operation, done: Callback) {
        if self.shared.under_way.fetch_add(1, Ordering::AcqRel) >= OPERATIONS_MAX {
            self.shared.under_way.fetch_sub(1, Ordering::AcqRel);
            return done(Err(SubmitError::TooMany.into()));
        }
        self.ask(Request::Submit(operation, done));
    }

    /// Runs an operation to its end.
    pub fn run(&self, operation: Operation) -> Result<Vec<Bytes>, OperationError> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let done = Box::new(move |result| {
            let _ = sender.send(result);
        });
        self.submit(operation, done);
        receiver.recv().map_err(|_| OperationError::Detached)?
    }

    /// The members are at these endpoints now.
    pub fn set_endpoints(&self, endpoints: Vec<SocketAddr>) {
        self.ask(Request::Endpoints(endpoints));
    }

    /// The volume and its paths.
    pub fn status(&self) -> Status {
        lock(&self.shared.status).clone()
    }

    /// Waits until a path is optimized; `None` when none is in time.
    pub fn wait_ready(&self, timeout: Duration) -> Option<Geometry> {
        let is_waiting = |status: &mut Status| !status.is_usable();
        let status = lock(&self.shared.status);
        let (status, _) = self
            .shared
            .changed
            .wait_timeout_while(status, timeout, is_waiting)
            .expect("unpoisoned");
        if status.is_usable() { status.geometry } else { None }
    }

    /// Waits until the volume has another size than `blocks`; `None` when it has not in time.
    pub fn wait_resized(&self, blocks: u64, timeout: Duration) -> Option<Geometry> {
        let has_changed =
            |status: &Status| status.geometry.is_some_and(|geometry| geometry.blocks != blocks);
        let status = lock(&self.shared.status);
        let (status, _) = self
            .shared
            .changed
            .wait_timeout_while(status, timeout, |status| !has_changed(status))
            .expect("unpoisoned");
        if has_changed(&status) { status.geometry } else { None }
    }

    fn ask(&self, request: Request) {
        lock(&self.shared.requests).push(request);
        if self.shared.is_asleep.swap(false, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Ends everything and waits for it: operations under way fail.
    pub fn detach(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.ask(Request::Detach);
            thread.join().expect("the host's thread does not panic");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
    }
}

impl Status {
    /// Operations do not have to wait.
    pub fn is_usable(&self) -> bool {
        use tercet_nvmf::log::AnaState;
        let takes =
            |state| matches!(state, PathState::Live(AnaState::Optimized | AnaState::NonOptimized));
        self.geometry.is_some() && self.paths.iter().any(|&(_, state)| takes(state))
    }
}

struct Worker {
    driver: Driver,
    shared: Arc<Shared>,
    callbacks: HashMap<OperationId, Callback>,
    next_operation: u64,
    detach_until: Option<tercet_proto::Instant>,
}

impl Worker {
    fn run(mut self) {
        loop {
            self.take_requests();
            self.finish();
            self.publish();
            if let Some(until) = self.detach_until
                && (self.driver.host().is_ended() || until <= now())
            {
                return;
            }
            // Order: asleep first, then a last look, so that no request is missed.
            self.shared.is_asleep.store(true, Ordering::SeqCst);
            let is_idle = lock(&self.shared.requests).is_empty();
            if is_idle {
                self.driver.turn(self.detach_until).expect("epoll works");
            }
            self.shared.is_asleep.store(false, Ordering::SeqCst);
        }
    }

    fn take_requests(&mut self) {
        let requests = std::mem::take(&mut *lock(&self.shared.requests));
        for request in requests {
            match request {
                Request::Submit(operation, callback) => {
                    let id = OperationId(self.next_operation);
                    self.next_operation += 1;
                    self.callbacks.insert(id, callback);
                    if let Err(error) = self.driver.submit(id, operation) {
                        self.end(id, Err(error.into()));
                    }
                }
                Request::Endpoints(endpoints) => self.driver.set_endpoints(&endpoints),
                Request::Detach => {
                    self.detach_until = Some(now() + DETACH_TIMEOUT);
                    self.driver.detach();
                }
            }
        }
    }

    fn finish(&mut self) {
        for (id, result) in std::mem::take(&mut self.driver.finished) {
            self.end(id, result);
        }
    }

    fn end(&mut self, id: OperationId, result: Result<Vec<Bytes>, OperationError>) {
        let callback = self.callbacks.remove(&id).expect("each operation ends once");
        self.shared.under_way.fetch_sub(1, Ordering::AcqRel);
        callback(result);
    }

    fn publish(&mut self) {
        if !std::mem::take(&mut self.driver.changed) {
            return;
        }
        let status = Status {
            geometry: self.driver.geometry(),
            paths: self.driver.host().paths(),
            last_loss: self.driver.last_loss.clone(),
        };
        *lock(&self.shared.status) = status;
        self.shared.changed.notify_all();
    }
}
