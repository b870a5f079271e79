//! Connections as TCP gives them: in order or not at all, stalled by a cut and going on when it
//! heals, alive at one end while the other has given up.
//!
//! A pipe is one direction of one connection. What a sender has pushed may arrive long after it has
//! closed its end: that is where late copies of commands come from (rule H2).

use std::collections::VecDeque;

use crate::world::World;

/// Where a pipe starts or ends: nodes, then hosts, then the API server.
pub type Site = usize;

/// Names a pipe.
pub type PipeId = usize;

/// What is done on arrival.
pub type Delivery = Box<dyn FnOnce(&mut World)>;

/// One direction of a connection.
pub struct Pipe {
    from: Site,
    to: Site,
    /// When each may arrive, and what.
    queue: VecDeque<(u64, Delivery)>,
    last_ready: u64,
    broken: bool,
}

/// All pipes and cuts.
pub struct Network {
    pipes: Vec<Pipe>,
    /// How many faults cut this direction now.
    cuts: Vec<Vec<u32>>,
}

impl Network {
    /// A network of that many sites.
    pub fn new(sites: usize) -> Self {
        Self { pipes: Vec::new(), cuts: vec![vec![0; sites]; sites] }
    }

    /// Whether nothing gets from `from` to `to`.
    pub fn is_cut(&self, from: Site, to: Site) -> bool {
        self.cuts[from][to] > 0
    }

    /// Whether a connection between both can be made.
    pub fn is_open(&self, a: Site, b: Site) -> bool {
        !self.is_cut(a, b) && !self.is_cut(b, a)
    }

    /// Cuts a direction; counted, so that overlapping faults heal one by one.
    pub fn cut(&mut self, from: Site, to: Site) {
        self.cuts[from][to] += 1;
    }
}

impl World {
    /// A new pipe.
    pub fn pipe(&mut self, from: Site, to: Site) -> PipeId {
        let pipe = Pipe { from, to, queue: VecDeque::new(), last_ready: 0, broken: false };
        self.net.pipes.push(pipe);
        self.net.pipes.len() - 1
    }

    /// Sends something that is done at its arrival, after what was sent before.
    pub fn push(&mut self, id: PipeId, delivery: Delivery) {
        let ready = self.now + self.delay();
        let pipe = &mut self.net.pipes[id];
        if pipe.broken {
            return;
        }
        pipe.last_ready = pipe.last_ready.max(ready);
        let ready = pipe.last_ready;
        pipe.queue.push_back((ready, delivery));
        if pipe.queue.len() == 1 {
            self.at(ready, move |world| world.pump(id));
        }
    }

    /// Drops what is under way and whatever is sent later.
    pub fn break_pipe(&mut self, id: PipeId) {
        let pipe = &mut self.net.pipes[id];
        pipe.broken = true;
        pipe.queue.clear();
    }

    /// Ends one cut of a direction; what has waited goes on.
    pub fn heal(&mut self, from: Site, to: Site) {
        let count = &mut self.net.cuts[from][to];
        *count = count.saturating_sub(1);
        if *count > 0 {
            return;
        }
        for id in 0..self.net.pipes.len() {
            let pipe = &self.net.pipes[id];
            if pipe.from == from && pipe.to == to && !pipe.queue.is_empty() {
                let delay = self.delay();
                self.after(delay, move |world| world.pump(id));
            }
        }
    }

    fn pump(&mut self, id: PipeId) {
        loop {
            let pipe = &mut self.net.pipes[id];
            let Some((ready, _)) = pipe.queue.front() else { return };
            let ready = *ready;
            if self.net.cuts[pipe.from][pipe.to] > 0 {
                return;
            }
            if ready > self.now {
                self.at(ready, move |world| world.pump(id));
                return;
            }
            let (_, delivery) = pipe.queue.pop_front().expect("seen above");
            delivery(self);
        }
    }
}
