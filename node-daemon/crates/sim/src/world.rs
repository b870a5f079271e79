//! The simulated world: virtual time, one queue of what happens next, one source of chance.
//!
//! One thread; everything that happens is a closure in the queue, ordered by time and then by when
//! it was put there, so that a seed reproduces everything. What lives in the world is in the modules
//! beside this one: nodes with their shards, disks and clocks; links and connections; hosts; the API
//! server and the agents that talk to it; and the faults.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt::Display;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_proto::{Place, VolumeId};

use crate::canaries::Canary;
use crate::checker::{Histories, seconds};
use crate::cluster::{Cluster, Volume};
use crate::decay::Decay;
use crate::host::{Connection, Host};
use crate::links::Link;
use crate::members::Job;
use crate::mix::Mix;
use crate::node::Node;
use crate::observe::Seen;
use crate::pipes::{Network, Site};
use crate::probes::{Probe, Probes};
use crate::run::Settings;
use crate::snapshots::Snapshots;

/// Far more than a seed needs.
const EVENTS_MAX: u64 = 4_000_000;

type Action = Box<dyn FnOnce(&mut World)>;

struct Scheduled {
    at: u64,
    number: u64,
    action: Action,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The earliest is the greatest: `BinaryHeap` pops the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// Everything.
pub struct World {
    /// Virtual nanoseconds since the start.
    pub now: u64,
    /// The one source of chance.
    pub rng: SmallRng,
    queue: BinaryHeap<Scheduled>,
    /// What has happened so far.
    pub events: u64,
    number: u64,
    /// What this seed is like.
    pub mix: Mix,
    /// Node machines.
    pub nodes: Vec<Node>,
    /// Host machines.
    pub hosts: Vec<Host>,
    /// Links between nodes, `link_index` of a pair.
    pub links: Vec<Link>,
    /// Cuts and pipes.
    pub net: Network,
    /// Connections of hosts, never removed.
    pub connections: Vec<Connection>,
    /// The API server and the agents.
    pub cluster: Cluster,
    /// The volumes.
    pub volumes: Vec<Volume>,
    /// Snapshots that were asked for.
    pub snapshots: Snapshots,
    /// What hosts saw.
    pub histories: Histories,
    /// Rare paths.
    pub probes: Probes,
    /// What was seen of the protocol.
    pub seen: Seen,
    /// Blocks that go bad.
    pub decay: Decay,
    /// A node's replacement that goes on.
    pub job: Option<Job>,
    /// Whether faults are over.
    pub healed: bool,
    /// The node whose damage is not known yet.
    pub rotten: Option<usize>,
    /// Whether a bit has rotted in this run.
    pub rotted: bool,
    /// Tails of its replicas before the bit rotted.
    pub rot_tails: Vec<(VolumeId, Place)>,
    /// Faults that took place.
    pub faults_done: usize,
    /// Host operations that were answered.
    pub ops_done: u64,
    /// The first thing that must not be.
    pub violation: Option<String>,
    /// Whether to tell the story.
    pub telling: bool,
    /// A rule that is broken on purpose.
    pub canary: Option<Canary>,
    /// A hash over everything that happened, to compare two runs of a seed.
    pub digest: u64,
}

impl World {
    /// The world of a seed, before anything has happened.
    pub fn new(seed: u64, settings: &Settings) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut mix = Mix::draw(&mut rng);
        let decay = Decay::draw(seed, &mut mix);
        let sites = mix.nodes + mix.host_volumes.len() + 1;
        let mut world = Self {
            now: 0,
            rng,
            queue: BinaryHeap::new(),
            events: 0,
            number: 0,
            nodes: Vec::new(),
            hosts: Vec::new(),
            links: Vec::new(),
            net: Network::new(sites),
            connections: Vec::new(),
            cluster: Cluster::default(),
            volumes: Vec::new(),
            snapshots: Snapshots::default(),
            histories: Histories::default(),
            probes: Probes::default(),
            seen: Seen::default(),
            decay,
            job: None,
            healed: false,
            rotten: None,
            rotted: false,
            rot_tails: Vec::new(),
            faults_done: 0,
            ops_done: 0,
            violation: None,
            telling: settings.telling,
            canary: settings.canary,
            digest: 0,
            mix,
        };
        world.tell(|world| format!("seed {seed}: {}", world.mix.story()));
        world.make_nodes();
        world.make_volumes();
        world.make_hosts();
        world
    }

    /// Does something at a time.
    pub fn at(&mut self, at: u64, action: impl FnOnce(&mut Self) + 'static) {
        self.number += 1;
        let scheduled =
            Scheduled { at: at.max(self.now), number: self.number, action: Box::new(action) };
        self.queue.push(scheduled);
    }

    /// Does something after a while.
    pub fn after(&mut self, delay_ns: u64, action: impl FnOnce(&mut Self) + 'static) {
        self.at(self.now + delay_ns, action);
    }

    /// Goes on until `until`, or until something must not be.
    pub fn run_until(&mut self, until: u64) {
        while self.violation.is_none() {
            match self.queue.peek() {
                Some(next) if next.at <= until => {}
                _ => break,
            }
            let next = self.queue.pop().expect("peeked");
            self.events += 1;
            if self.events > EVENTS_MAX {
                self.violate(format!("{EVENTS_MAX} events: something goes round for ever"));
            }
            self.now = next.at;
            (next.action)(self);
        }
        self.now = self.now.max(until);
    }

    /// Something that must not be.
    pub fn violate(&mut self, what: impl Display) {
        self.tell(|_| format!("VIOLATION: {what}"));
        if self.violation.is_none() {
            self.violation = Some(format!("at {:.6} s: {what}", seconds(self.now)));
        }
    }

    /// Tells the story, when somebody listens.
    pub fn tell(&self, what: impl FnOnce(&Self) -> String) {
        if self.telling {
            println!("{:>12.6}  {}", seconds(self.now), what(self));
        }
    }

    /// Counts a rare path.
    pub fn probe(&mut self, probe: Probe) {
        self.probes.hit(probe);
    }

    /// Adds to the digest.
    pub fn note(&mut self, what: u64) {
        let mixed = self.digest ^ what.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.now;
        self.digest = mixed.rotate_left(17).wrapping_mul(0xff51_afd7_ed55_8ccd);
    }

    /// True that many times of a thousand.
    pub fn permille(&mut self, permille: u32) -> bool {
        permille > 0 && self.rng.random_range(0..1000) < permille
    }

    /// A number of nanoseconds between both.
    pub fn between(&mut self, range: (u64, u64)) -> u64 {
        self.rng.random_range(range.0..=range.1)
    }

    /// A delay of the network.
    pub fn delay(&mut self) -> u64 {
        self.between(self.mix.delay_ns)
    }

    /// A time around `mean`, sometimes much longer.
    pub fn around(&mut self, mean: u64) -> u64 {
        let uniform: f64 = self.rng.random_range(1e-6..1.0);
        Duration::from_nanos(mean).mul_f64(-uniform.ln()).as_nanos() as u64
    }

    /// Sixteen bytes for an id.
    pub fn id_bytes(&mut self) -> [u8; 16] {
        self.rng.random()
    }

    /// A host's site; a node's is its number.
    pub fn host_site(&self, host: usize) -> Site {
        self.mix.nodes + host
    }

    /// The API server's site.
    pub fn api_site(&self) -> Site {
        self.mix.nodes + self.mix.host_volumes.len()
    }
}
