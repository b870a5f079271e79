//! Hosts that write and read through every fault, and the check that each block is a register.
//!
//! A block has one writer, whose writes count up, so linearizability is easy to judge: a read
//! returns nothing older than what was acknowledged or read before it began, and nothing that was
//! not asked for. A host that lost its memory reads first; what it has read as absent never appears
//! later (H3). Left out: what two hosts that write one block at the same time would see.

use rand::Rng;
use tercet_proto::{InstanceId, Token};
use tercet_replication::api::{Ana, AssociationId, HostCommand, HostDone, Input};

use super::{Cluster, at, block, host, stamp};

#[derive(Clone, Copy, Debug, Default)]
struct Register {
    /// Nothing older may be read by who begins now.
    floor: u64,
    /// The newest that was ever asked for.
    invoked: u64,
    /// Read as absent by a host that had forgotten: (after, upto] never appear.
    absent: (u64, u64),
    /// A host with new memory has to read before it writes.
    unread: bool,
}

#[derive(Clone, Debug)]
struct Op {
    block: u64,
    write: Option<u64>,
    floor: u64,
    sent: Option<(usize, AssociationId, Token)>,
}

#[derive(Clone, Copy, Debug)]
struct Path {
    instance: InstanceId,
    id: AssociationId,
    read_ana: bool,
}

struct Host {
    who: u8,
    paths: Vec<Option<Path>>,
    ops: Vec<Op>,
}

pub struct Workload {
    hosts: Vec<Host>,
    registers: Vec<Register>,
    pub completed: usize,
}

impl Workload {
    pub fn new(hosts: u8, blocks: usize, nodes: usize) -> Self {
        let hosts = (0..hosts).map(|who| Host { who, paths: vec![None; nodes], ops: Vec::new() });
        let registers = vec![Register::default(); blocks];
        Self { hosts: hosts.collect(), registers, completed: 0 }
    }

    pub fn pending(&self) -> usize {
        self.hosts.iter().map(|host| host.ops.len()).sum()
    }

    /// What is not done yet, for a message.
    pub fn describe(&self) -> String {
        let ops: Vec<_> = self.hosts.iter().map(|host| (&host.paths, &host.ops)).collect();
        format!("{ops:?}")
    }

    /// A host loses its memory: its operations are in doubt, its associations are not ended by it.
    pub fn reboot(&mut self, which: usize) {
        let host = &mut self.hosts[which];
        host.paths.fill(None);
        host.ops.clear();
        for (i, register) in self.registers.iter_mut().enumerate() {
            if i % self.hosts.len() == which {
                register.unread = true;
            }
        }
    }

    /// Begins an operation on a block that its writer is not busy with.
    pub fn begin(&mut self, cluster: &mut Cluster) {
        let index = cluster.rng.random_range(0..self.registers.len());
        let hosts = self.hosts.len();
        let owner = index % hosts;
        let busy = self.hosts[owner].ops.iter().any(|op| op.block == index as u64);
        let register = &mut self.registers[index];
        let writes = !register.unread && !busy && cluster.rng.random_bool(0.6);
        let reader = if register.unread { owner } else { cluster.rng.random_range(0..hosts) };
        if !writes && self.hosts[reader].ops.iter().any(|op| op.block == index as u64) {
            return;
        }
        let write = writes.then(|| {
            register.invoked += 1;
            register.invoked
        });
        let op = Op { block: index as u64, write, floor: register.floor, sent: None };
        self.hosts[if writes { owner } else { reader }].ops.push(op);
    }

    /// Hosts connect, send, take answers, try again elsewhere.
    pub fn step(&mut self, cluster: &mut Cluster) {
        for which in 0..self.hosts.len() {
            self.keep_paths(which, cluster);
            for index in (0..self.hosts[which].ops.len()).rev() {
                self.collect(which, index, cluster);
            }
            self.send(which, cluster);
        }
    }

    fn keep_paths(&mut self, which: usize, cluster: &mut Cluster) {
        let Host { who, paths, .. } = &mut self.hosts[which];
        for (node, path) in paths.iter_mut().enumerate() {
            let running = cluster.machines[node].node.is_some();
            let instance = cluster.machines[node].instance;
            let broken = path.is_some_and(|path| path.instance != instance);
            if !running || broken || path.is_some_and(|path| cluster.ended.contains(&path.id)) {
                *path = None;
            }
            if path.is_none() && running {
                let id = cluster.connect(node, host(*who));
                if cluster.accepted.get(&id) == Some(&Ok(())) {
                    let read_ana = cluster.machines[node].ana == Ana::Optimized;
                    *path = Some(Path { instance, id, read_ana });
                }
            }
            if let Some(path) = path
                && cluster.machines[node].ana == Ana::Optimized
                && !path.read_ana
            {
                cluster.input(node, Input::HostReadAna(path.id));
                path.read_ana = true;
            }
            if let Some(path) = path
                && cluster.machines[node].ana != Ana::Optimized
            {
                path.read_ana = false;
            }
        }
    }

    fn collect(&mut self, which: usize, index: usize, cluster: &mut Cluster) {
        let op = self.hosts[which].ops[index].clone();
        let Some((node, id, token)) = op.sent else { return };
        let path = self.hosts[which].paths[node];
        match cluster.done.remove(&(id, token)) {
            None => {
                if path.is_none_or(|path| path.id != id) {
                    self.hosts[which].ops[index].sent = None; // the association is gone: try again
                }
            }
            Some(Err(_)) => self.hosts[which].ops[index].sent = None,
            Some(Ok(done)) => {
                self.judge(which, &op, &done, cluster);
                self.hosts[which].ops.remove(index);
                self.completed += 1;
            }
        }
    }

    fn judge(&mut self, which: usize, op: &Op, done: &HostDone, cluster: &Cluster) {
        let owner = op.block as usize % self.hosts.len();
        let register = &mut self.registers[op.block as usize];
        let seen = match (op.write, done) {
            (Some(written), HostDone::Ok) => written,
            (None, HostDone::Data(data)) => {
                let stamp = stamp(data);
                assert!(stamp == 0 || stamp >> 32 == op.block, "another block's bytes");
                stamp & 0xffff_ffff
            }
            other => panic!("answer of another kind: {other:?}"),
        };
        let now = cluster.now;
        let why = format!("block {} at {now} ns: {seen} by {op:?}, {register:?}", op.block);
        assert!(op.write.is_some() || seen >= op.floor, "older than what was acknowledged: {why}");
        assert!(seen <= register.invoked, "never asked for: {why}");
        let (after, upto) = register.absent;
        assert!(seen <= after || seen > upto, "appears after it was read as absent: {why}");
        if register.unread && which == owner {
            register.unread = false;
            register.absent = (seen, register.invoked);
        }
        register.floor = register.floor.max(seen);
    }

    fn send(&mut self, which: usize, cluster: &mut Cluster) {
        let Host { paths, ops, .. } = &mut self.hosts[which];
        for op in ops.iter_mut().filter(|op| op.sent.is_none()) {
            let careless = cluster.rng.random_bool(0.02); // a host that has not read the ANA log
            let usable = |node: &usize| paths[*node].is_some_and(|path| path.read_ana || careless);
            let ready: Vec<_> = (0..paths.len()).filter(usable).collect();
            if ready.is_empty() {
                continue;
            }
            let node = ready[cluster.rng.random_range(0..ready.len())];
            let id = paths[node].expect("usable").id;
            let command = match op.write {
                Some(n) => HostCommand::Write(at(op.block), block(op.block << 32 | n)),
                None => HostCommand::Read(at(op.block)),
            };
            let token = cluster.command(node, id, command);
            op.sent = Some((node, id, token));
        }
    }
}
