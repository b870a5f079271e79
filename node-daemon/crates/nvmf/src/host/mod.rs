//! The user-space NVMe/TCP host as a state machine: paths to a volume's members, and operations
//! that find their way over whichever is optimized.
//!
//! An operation fails only when a controller says that it is wrong; while no path takes it, it
//! waits. One whose association ends is sent again elsewhere only after every connection of that
//! association is closed: the members see to it that the first copy either takes effect before or
//! never (rules H2, H3).

mod api;
mod authenticate;
mod path;
mod queue;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tercet_proto::{BlockRange, Instant};

use crate::auth::Computed;

pub use api::{
    ConnectionId, ENDPOINTS_MAX, Geometry, HostEffect, HostOptions, KEEP_ALIVE_MAX, OPERATIONS_MAX,
    Operation, OperationError, OperationId, PathState, SubmitError,
};
pub use queue::QueueError;

use crate::command::{DSM_DEALLOCATE, Entry, WRITE_ZEROES_DEALLOCATE, io};
use crate::log::AnaState;
use crate::{BLOCK_BYTES, NSID, TRANSFER_BYTES_MAX};
use path::{Context, Path, Said};
use queue::Completed;

/// How long a path that is no longer the best may take to answer what runs on it.
const SUPERSEDED_GRACE: Duration = Duration::from_millis(20);
/// Tries of an operation whose controller answers with a retryable status that is no path error.
const TRIES_MAX: u32 = 8;
/// Most blocks of one Write Zeroes.
const WRITE_ZEROES_BLOCKS_MAX: u32 = 1 << 16;

#[derive(Debug)]
struct Running {
    operation: Operation,
    tries: u32,
    /// A command for it has gone out before.
    was_sent: bool,
    /// Which path has it; `None` while it waits.
    path: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Multipath {
    options: HostOptions,
    /// By a number that is never reused.
    paths: BTreeMap<u64, Path>,
    next_path: u64,
    /// The path that turned optimized last.
    best: Option<u64>,
    operations: BTreeMap<OperationId, Running>,
    waiting: VecDeque<OperationId>,
    geometry: Option<Geometry>,
    next_connection: u64,
    random: u64,
    is_detached: bool,
}

impl Multipath {
    /// A host that begins to connect with the first tick. `seed` makes its jitter.
    pub fn new(options: HostOptions, seed: u64, now: Instant) -> Self {
        assert!(options.io_queues >= 1 && options.queue_entries >= 2);
        assert!(options.keep_alive > Duration::ZERO && options.keep_alive <= KEEP_ALIVE_MAX);
        let endpoints = options.endpoints.clone();
        let mut host = Self {
            options,
            paths: BTreeMap::new(),
            next_path: 0,
            best: None,
            operations: BTreeMap::new(),
            waiting: VecDeque::new(),
            geometry: None,
            next_connection: 0,
            random: seed | 1,
            is_detached: false,
        };
        host.set_endpoints(&endpoints, now, &mut Vec::new());
        host
    }

    /// The volume, once a path has been live.
    pub fn geometry(&self) -> Option<Geometry> {
        self.geometry
    }

    /// Every path and how it is.
    pub fn paths(&self) -> Vec<(SocketAddr, PathState)> {
        self.paths.values().map(|path| (path.endpoint, path.state())).collect()
    }

    /// Operations that wait or run.
    pub fn operations(&self) -> usize {
        self.operations.len()
    }

    /// The members are at these endpoints now; at most [`ENDPOINTS_MAX`] count.
    pub fn set_endpoints(
        &mut self,
        endpoints: &[SocketAddr],
        now: Instant,
        effects: &mut Vec<HostEffect>,
    ) {
        let endpoints = &endpoints[..endpoints.len().min(ENDPOINTS_MAX)];
        let keys: Vec<u64> = self.paths.keys().copied().collect();
        for key in keys {
            if !endpoints.contains(&self.paths[&key].endpoint) {
                self.at_path(key, now, effects, Path::remove);
            }
        }
        for &endpoint in endpoints {
            let is_new = self.paths.values().all(|path| path.endpoint != endpoint);
            if is_new && !self.is_detached {
                self.paths.insert(self.next_path, Path::new(endpoint, now));
                self.next_path += 1;
            }
        }
    }

    /// Ends everything: operations fail, controllers are told, connections close. The host is
    /// [`Multipath::is_ended`] when they have.
    pub fn detach(&mut self, now: Instant, effects: &mut Vec<HostEffect>) {
        self.is_detached = true;
        for (id, _) in std::mem::take(&mut self.operations) {
            effects.push(HostEffect::Completed(id, Err(OperationError::Detached)));
        }
        self.waiting.clear();
        let keys: Vec<u64> = self.paths.keys().copied().collect();
        for key in keys {
            self.at_path(key, now, effects, Path::shut_down);
        }
    }

    /// Detached, and no connection is left.
    pub fn is_ended(&self) -> bool {
        self.is_detached && self.paths.is_empty()
    }

    /// Takes an operation; its end comes as [`HostEffect::Completed`].
    pub fn submit(
        &mut self,
        id: OperationId,
        operation: Operation,
        now: Instant,
        effects: &mut Vec<HostEffect>,
    ) -> Result<(), SubmitError> {
        if !fits(&operation) || id.0 >= authenticate::AUTHENTICATION_TAG {
            return Err(SubmitError::Length);
        }
        if self.operations.len() >= OPERATIONS_MAX {
            return Err(SubmitError::TooMany);
        }
        if self.operations.contains_key(&id) {
            return Err(SubmitError::Duplicate);
        }
        if self.is_detached {
            effects.push(HostEffect::Completed(id, Err(OperationError::Detached)));
            return Ok(());
        }
        self.operations.insert(id, Running { operation, tries: 0, was_sent: false, path: None });
        self.waiting.push_back(id);
        self.dispatch(now, effects);
        Ok(())
    }

    /// A connection is open.
    pub fn opened(&mut self, id: ConnectionId, now: Instant, effects: &mut Vec<HostEffect>) {
        if let Some(key) = self.path_of(id) {
            self.at_path(key, now, effects, |path, context| path.opened(id, context));
        }
    }

    /// An [`HostEffect::Compute`] has been run. For a connection that is gone: dropped.
    pub fn computed(
        &mut self,
        id: ConnectionId,
        computed: &Computed,
        now: Instant,
        effects: &mut Vec<HostEffect>,
    ) {
        if let Some(key) = self.path_of(id) {
            self.at_path(key, now, effects, |path, context| path.computed(id, computed, context));
        }
    }

    /// Bytes arrived.
    pub fn input(
        &mut self,
        id: ConnectionId,
        bytes: Bytes,
        now: Instant,
        effects: &mut Vec<HostEffect>,
    ) {
        if let Some(key) = self.path_of(id) {
            self.at_path(key, now, effects, |path, context| {
                path.input(id, bytes, context);
            });
        }
    }

    /// A connection is closed, could not be opened, or has been closed as asked.
    pub fn closed(&mut self, id: ConnectionId, now: Instant, effects: &mut Vec<HostEffect>) {
        if let Some(key) = self.path_of(id) {
            self.at_path(key, now, effects, |path, context| path.closed(id, context));
        }
    }

    /// Takes what has to be sent; true when there is more.
    pub fn take_output(&mut self, id: ConnectionId, out: &mut Vec<Bytes>) -> bool {
        let Some(key) = self.path_of(id) else {
            return false;
        };
        self.paths.get_mut(&key).expect("found").take_output(id, out)
    }

    /// Bytes that a payload under way on this connection lacks.
    pub fn missing_bytes(&self, id: ConnectionId) -> usize {
        self.path_of(id).map_or(0, |key| self.paths[&key].missing_bytes(id))
    }

    /// When [`Multipath::tick`] has to be called at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.paths.values().filter_map(|path| path.next_deadline(&self.options)).min()
    }

    /// Time has come.
    pub fn tick(&mut self, now: Instant, effects: &mut Vec<HostEffect>) {
        let options = &self.options;
        let is_due = |path: &Path| path.next_deadline(options).is_some_and(|at| at <= now);
        let due: Vec<u64> =
            self.paths.iter().filter(|(_, path)| is_due(path)).map(|(&key, _)| key).collect();
        for key in due {
            self.at_path(key, now, effects, Path::tick);
        }
    }

    fn path_of(&self, id: ConnectionId) -> Option<u64> {
        self.paths.iter().find(|(_, path)| path.has(id)).map(|(&key, _)| key)
    }

    /// Runs something at a path and takes up what it says.
    fn at_path(
        &mut self,
        key: u64,
        now: Instant,
        effects: &mut Vec<HostEffect>,
        act: impl FnOnce(&mut Path, &mut Context<'_>),
    ) {
        let path = self.paths.get_mut(&key).expect("a path");
        let mut context = Context {
            options: &self.options,
            now,
            effects,
            next_connection: &mut self.next_connection,
            random: &mut self.random,
            said: Vec::new(),
        };
        act(path, &mut context);
        let said = context.said;
        let is_gone = path.is_gone();
        for said in said {
            self.take_up(key, said, now, effects);
        }
        if is_gone {
            self.paths.remove(&key);
        }
        if !self.waiting.is_empty() {
            self.dispatch(now, effects);
        }
    }

    fn take_up(&mut self, key: u64, said: Said, now: Instant, effects: &mut Vec<HostEffect>) {
        match said {
            Said::Completed(completed) => self.complete(key, completed, now, effects),
            Said::Namespace(namespace, controller) => {
                let most = controller.transfer_bytes_max.unwrap_or(TRANSFER_BYTES_MAX);
                let geometry = Geometry {
                    blocks: namespace.blocks,
                    transfer_bytes_max: most.min(TRANSFER_BYTES_MAX),
                    nguid: namespace.nguid,
                };
                self.know_geometry(key, geometry, now, effects);
            }
            Said::Ana => self.know_best(key, now),
            Said::Lost => {
                if self.best == Some(key) {
                    self.best = None;
                }
            }
            Said::Ended => self.requeue(key),
        }
    }

    fn know_geometry(
        &mut self,
        key: u64,
        geometry: Geometry,
        now: Instant,
        effects: &mut Vec<HostEffect>,
    ) {
        let known = self.geometry.map(|known| known.nguid);
        if known.is_some_and(|nguid| nguid != geometry.nguid) {
            let lose = |path: &mut Path, context: &mut Context<'_>| {
                path.lose("the endpoint has another volume", context);
            };
            return self.at_path(key, now, effects, lose);
        }
        // A volume never shrinks; a member that lags behind may not know yet.
        let blocks = self.geometry.map_or(0, |known| known.blocks).max(geometry.blocks);
        let geometry = Geometry { blocks, ..geometry };
        if self.geometry != Some(geometry) {
            self.geometry = Some(geometry);
            effects.push(HostEffect::Geometry(geometry));
        }
    }

    /// The path that turned optimized last is the best; what runs elsewhere has a little time.
    fn know_best(&mut self, key: u64, now: Instant) {
        let is_optimized = self.paths[&key].ana() == Some(AnaState::Optimized);
        if !is_optimized {
            if self.best == Some(key) {
                self.best = None;
            }
            return;
        }
        if self.best == Some(key) {
            return;
        }
        self.best = Some(key);
        for (&other, path) in &mut self.paths {
            if other == key {
                path.superseded_at = None;
            } else if path.operations().next().is_some() {
                path.superseded_at = Some(now + SUPERSEDED_GRACE);
            }
        }
    }

    /// The association of a path is over and closed: what ran there waits again, in order.
    fn requeue(&mut self, key: u64) {
        let lost = self.operations.iter_mut().filter(|(_, running)| running.path == Some(key));
        let mut lost: Vec<OperationId> = lost
            .map(|(&id, running)| {
                running.path = None;
                id
            })
            .collect();
        lost.extend(self.waiting.drain(..));
        self.waiting = lost.into();
    }

    fn complete(
        &mut self,
        key: u64,
        completed: Completed,
        now: Instant,
        effects: &mut Vec<HostEffect>,
    ) {
        let id = OperationId(completed.tag);
        // An operation that was detached from is not there any more.
        let Some(running) = self.operations.get_mut(&id) else {
            return;
        };
        debug_assert_eq!(running.path, Some(key));
        let status = completed.status;
        let retry = !status.is_final() && !status.is_success();
        if retry && (status.is_path_error() || running.tries < TRIES_MAX) {
            running.path = None;
            if status.is_path_error() {
                self.paths.get_mut(&key).expect("it spoke").distrust(status, now);
                if self.best == Some(key) {
                    self.best = None;
                }
            } else {
                running.tries += 1;
            }
            self.waiting.push_front(id);
            return;
        }
        self.operations.remove(&id);
        let result = if status.is_success() {
            Ok(completed.data)
        } else {
            Err(OperationError::Status(status))
        };
        effects.push(HostEffect::Completed(id, result));
    }

    /// The path for the next operation: the one that turned optimized last, else any optimized,
    /// else any non-optimized.
    fn choose(&self) -> Option<u64> {
        let with = |state| {
            let mut paths = self.paths.iter().filter(|(_, path)| path.room() > 0);
            paths.find(|(_, path)| path.ana() == Some(state)).map(|(&key, _)| key)
        };
        let best = self.best.and_then(|key| self.paths.get_key_value(&key));
        if let Some((&key, path)) = best
            && path.ana() == Some(AnaState::Optimized)
        {
            return (path.room() > 0).then_some(key);
        }
        with(AnaState::Optimized).or_else(|| with(AnaState::NonOptimized))
    }

    fn dispatch(&mut self, now: Instant, effects: &mut Vec<HostEffect>) {
        while let Some(&id) = self.waiting.front() {
            let Some(key) = self.choose() else {
                self.watch(now);
                return;
            };
            self.waiting.pop_front();
            let running = self.operations.get_mut(&id).expect("waiting operations are there");
            running.path = Some(key);
            if std::mem::replace(&mut running.was_sent, true) {
                effects.push(HostEffect::SentAgain(id));
            }
            let (entry, payload, room) = command(&running.operation);
            let path = self.paths.get_mut(&key).expect("chosen");
            path.submit(entry, id.0, payload, room, effects);
        }
    }

    /// Operations wait: no path is optimized. Each live one is looked at again before long, in
    /// case an event got lost.
    fn watch(&mut self, now: Instant) {
        for path in self.paths.values_mut() {
            if path.ana() != Some(AnaState::Optimized) {
                path.watch(now);
            }
        }
    }
}

/// Whether an operation is one command.
fn fits(operation: &Operation) -> bool {
    let moves = |range: &BlockRange| range.count > 0 && range.bytes() <= TRANSFER_BYTES_MAX;
    match operation {
        Operation::Read(range) => moves(range),
        Operation::Write(range, data) | Operation::Compare(range, data) => {
            moves(range) && data.len() == range.bytes()
        }
        Operation::WriteZeroes(range, _) => (1..=WRITE_ZEROES_BLOCKS_MAX).contains(&range.count),
        Operation::Deallocate(range) => range.count > 0,
        Operation::Flush => true,
    }
}

/// An operation's command, its data and the bytes that come back.
fn command(operation: &Operation) -> (Entry, Bytes, usize) {
    let with_range = |opcode, range: &BlockRange| {
        let mut entry = Entry::new(opcode, 0);
        entry.set_nsid(NSID);
        entry.set_range(range.start, range.count);
        entry
    };
    match operation {
        Operation::Read(range) => {
            (with_range(io::READ, range), Bytes::new(), range.count as usize * BLOCK_BYTES)
        }
        Operation::Write(range, data) => (with_range(io::WRITE, range), data.clone(), 0),
        Operation::Compare(range, data) => (with_range(io::COMPARE, range), data.clone(), 0),
        Operation::WriteZeroes(range, deallocate) => {
            let mut entry = with_range(io::WRITE_ZEROES, range);
            let attribute = if *deallocate { WRITE_ZEROES_DEALLOCATE } else { 0 };
            entry.set_dword(12, entry.dword(12) | attribute);
            (entry, Bytes::new(), 0)
        }
        Operation::Deallocate(range) => {
            let mut entry = Entry::new(io::DATASET_MANAGEMENT, 0);
            entry.set_nsid(NSID);
            entry.set_dword(11, DSM_DEALLOCATE); // NR in dword 10 is 0's based: one range
            let mut data = BytesMut::with_capacity(crate::command::DSM_RANGE_BYTES);
            data.put_u32_le(0);
            data.put_u32_le(range.count);
            data.put_u64_le(range.start);
            (entry, data.freeze(), 0)
        }
        Operation::Flush => {
            let mut entry = Entry::new(io::FLUSH, 0);
            entry.set_nsid(NSID);
            (entry, Bytes::new(), 0)
        }
    }
}
