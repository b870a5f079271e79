//! What a seed is like: how many volumes and hosts, how fast everything is, which faults happen and
//! how hard. Each seed draws its own (a swarm), so that rare combinations come up that one average
//! mix would never show. The ranges are the same for all builds.

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

/// Milliseconds in virtual nanoseconds.
pub const MS: u64 = 1_000_000;
/// Microseconds in virtual nanoseconds.
pub const US: u64 = 1_000;
/// Seconds in virtual nanoseconds.
pub const S: u64 = 1_000_000_000;

/// Host operations that a seed answers at least.
pub const OPS_MIN: u64 = 2_000;
/// Faults that a seed has at least.
pub const FAULTS_MIN: usize = 3;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// kill -9 of an engine, a new one on the spot (L5).
    KillRestart,
    /// kill -9 of an engine, a new one after a while.
    KillLater,
    /// A node loses its power and gets it back.
    PowerOne,
    /// All nodes lose their power at once.
    PowerAll,
    /// A process stands still, often for longer than D.
    Pause,
    /// Two sites lose each other.
    CutPair,
    /// A site hears but is not heard, or the other way round.
    CutOneWay,
    /// A node loses all others, the hosts and the API server.
    Isolate,
    /// A node loses all others and the API server, while hosts still reach it (L1).
    CutOff,
    /// A node loses the API server and one node after the other; the last one restarts just then
    /// and has forgotten what it granted (L4).
    PartedAtRestart,
    /// A link between nodes breaks and comes back.
    LinkFlap,
    /// The API server is away.
    ApiAway,
    /// A node's agent loses the API server.
    ApiCut,
    /// A device is slow.
    DiskSlow,
    /// A device does nothing at all for a while.
    DiskStuck,
    /// A host dies and boots again with the same identity (H3).
    HostReboot,
    /// A host loses a node's path.
    HostCut,
    /// A host's connections break and come back.
    HostFlap,
    /// A host loses its attachment and gets it back later (H5).
    Detach,
    /// A volume is handed over in order.
    HandOver,
    /// The clock of a node changes its rate.
    ClockRate,
    /// A bit of one node's log rots while its engine is down (R1); once in a seed, and no other
    /// fault before that replica is known to be damaged, or in step: more is not tolerated.
    Rot,
}

/// Every kind.
pub const FAULTS: &[Fault] = &[
    Fault::KillRestart,
    Fault::KillLater,
    Fault::PowerOne,
    Fault::PowerAll,
    Fault::Pause,
    Fault::CutPair,
    Fault::CutOneWay,
    Fault::Isolate,
    Fault::CutOff,
    Fault::PartedAtRestart,
    Fault::LinkFlap,
    Fault::ApiAway,
    Fault::ApiCut,
    Fault::DiskSlow,
    Fault::DiskStuck,
    Fault::HostReboot,
    Fault::HostCut,
    Fault::HostFlap,
    Fault::Detach,
    Fault::HandOver,
    Fault::ClockRate,
    Fault::Rot,
];

/// How a member's place becomes free (M1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The node is off, and blank when it is back after its replacement.
    Wiped,
    /// The node lives, and shall be given up.
    Retired,
    /// The node is off for a while; when it is back its replacement is not wanted any more.
    Away,
}

/// A seed's settings.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Nodes.
    pub nodes: usize,
    /// Members of a volume: all nodes, or all but one.
    pub members: usize,
    /// Members that are lost, each with its time, in order; only where there is a node to spare.
    pub losses: Vec<(u64, Loss)>,
    /// Volumes.
    pub volumes: usize,
    /// Hosts; host h uses the volumes of `host_volumes[h]`.
    pub host_volumes: Vec<Vec<usize>>,
    /// Size of each volume.
    pub blocks: u64,
    /// Blocks that get most of the operations.
    pub hot_blocks: u64,
    /// Length of the phase with faults.
    pub faulty_ns: u64,
    /// Mean time between two operations of a host on a volume.
    pub think_ns: u64,
    /// Commands of a host on a volume at once.
    pub depth: usize,
    /// Per mille of operations that write.
    pub write_permille: u32,
    /// Per mille of operations that zero or discard.
    pub zero_permille: u32,
    /// Most blocks of one operation.
    pub op_blocks_max: u32,
    /// Faults to come, each with its time, in order.
    pub faults: Vec<(u64, Fault)>,
    /// Mean length of a fault that lasts.
    pub fault_ns: u64,
    /// One-way delay of the network, least and most.
    pub delay_ns: (u64, u64),
    /// Hosts know nothing of ANA: they try every path, and again later where they were refused (H2).
    pub blind: bool,
    /// Per mille of messages between nodes that are lost, doubled, or late, on links that stay up.
    pub lose_permille: u32,
    /// As above.
    pub double_permille: u32,
    /// As above; a late one is overtaken.
    pub late_permille: u32,
    /// Per mille of swaps whose answer is lost.
    pub answer_lost_permille: u32,
    /// Per mille of swaps that are executed long after.
    pub swap_late_permille: u32,
    /// Most that a watch lags.
    pub watch_lag_ns: u64,
    /// Duration of a device operation, least and most.
    pub disk_ns: (u64, u64),
    /// How long hosts and nodes wait for a sign of life of each other.
    pub kato_ns: u64,
    /// How long a cut connection between nodes lasts before both ends give it up.
    pub link_timeout_ns: u64,
    /// Mean time between snapshots.
    pub snapshot_ns: u64,
    /// A node whose engine speaks the protocol of a version that knows no swap while another serves.
    pub older: Option<usize>,
}

fn pick<T: Copy>(rng: &mut SmallRng, from: &[T]) -> T {
    from[rng.random_range(0..from.len())]
}

impl Mix {
    /// Draws a seed's settings.
    pub fn draw(rng: &mut SmallRng) -> Self {
        let nodes = pick(rng, &[3, 3, 3, 3, 3, 3, 3, 3, 2, 1]);
        let volumes = pick(rng, &[1, 1, 2, 3]);
        let host_volumes = draw_hosts(rng, volumes);
        let pairs: u64 = host_volumes.iter().map(|v| v.len() as u64).sum();
        let faulty_ns = rng.random_range(12..30) * S;
        // Some time is lost to faults: aim a little higher than OPS_MIN.
        let think_ns = faulty_ns * pairs / rng.random_range(OPS_MIN..2 * OPS_MIN);
        let lossy = rng.random_ratio(1, 3);
        let permille = |rng: &mut SmallRng, most: u32| {
            if lossy { rng.random_range(0..=most) } else { 0 }
        };
        let api_faults = rng.random_ratio(1, 2);
        let losses = draw_losses(rng, nodes, faulty_ns);
        Self {
            nodes: nodes + usize::from(!losses.is_empty()),
            members: nodes,
            losses,
            volumes,
            host_volumes,
            blocks: pick(rng, &[64, 128, 512]),
            hot_blocks: pick(rng, &[4, 16, 64]),
            faulty_ns,
            think_ns,
            depth: pick(rng, &[1, 4, 8, 16, 32]),
            write_permille: pick(rng, &[300, 500, 800]),
            zero_permille: pick(rng, &[0, 10, 60]),
            op_blocks_max: pick(rng, &[1, 4, 8, 32]),
            faults: draw_faults(rng, faulty_ns),
            fault_ns: pick(rng, &[300 * MS, S, 2 * S, 4 * S]),
            delay_ns: pick(rng, &[(10 * US, 60 * US), (50 * US, 500 * US), (20 * US, 5 * MS)]),
            blind: rng.random_ratio(1, 5),
            lose_permille: permille(rng, 20),
            double_permille: permille(rng, 20),
            late_permille: permille(rng, 20),
            answer_lost_permille: if api_faults { pick(rng, &[50, 200, 400]) } else { 0 },
            swap_late_permille: if api_faults { pick(rng, &[0, 50, 150]) } else { 0 },
            watch_lag_ns: pick(rng, &[20 * MS, 20 * MS, 300 * MS, 3 * S]),
            disk_ns: pick(rng, &[(20 * US, 200 * US), (50 * US, 2 * MS), (100 * US, 12 * MS)]),
            kato_ns: pick(rng, &[2 * S, 5 * S]),
            link_timeout_ns: pick(rng, &[S, 3 * S, 8 * S]),
            snapshot_ns: pick(rng, &[2 * S, 6 * S, 20 * S]),
            older: draw_older(rng, nodes),
        }
    }

    /// The settings in a line.
    pub fn story(&self) -> String {
        let mut kinds: Vec<Fault> = self.faults.iter().map(|(_, fault)| *fault).collect();
        kinds.sort_unstable();
        kinds.dedup();
        format!(
            "{} node(s), {} volume(s) of {} blocks, hosts {:?}, {} s with {} faults of {kinds:?} and \
             {} losses",
            self.nodes,
            self.volumes,
            self.blocks,
            self.host_volumes,
            self.faulty_ns / S,
            self.faults.len(),
            self.losses.len(),
        )
    }
}

/// One to three hosts; each volume has at least one, some have two.
fn draw_hosts(rng: &mut SmallRng, volumes: usize) -> Vec<Vec<usize>> {
    let count = rng.random_range(1..=3);
    let mut hosts = vec![Vec::new(); count];
    for volume in 0..volumes {
        let first = rng.random_range(0..count);
        hosts[first].push(volume);
        let second = rng.random_range(0..count);
        if second != first && rng.random_ratio(1, 3) {
            hosts[second].push(volume);
        }
    }
    hosts.retain(|volumes| !volumes.is_empty());
    hosts
}

/// A few kinds, at random times or in bursts.
fn draw_faults(rng: &mut SmallRng, faulty_ns: u64) -> Vec<(u64, Fault)> {
    let mut kinds = FAULTS.to_vec();
    kinds.shuffle(rng);
    kinds.truncate(rng.random_range(1..=6));
    let count = rng.random_range(FAULTS_MIN..=24);
    let bursts = rng.random_ratio(1, 3);
    let mut at = 0;
    let mut faults: Vec<(u64, Fault)> = (0..count)
        .map(|index| {
            at = if bursts && index % 3 != 0 {
                at + rng.random_range(0..600 * MS)
            } else {
                rng.random_range(S..faulty_ns - S)
            };
            (at.min(faulty_ns - MS), pick(rng, &kinds))
        })
        .collect();
    faults.sort_unstable();
    faults
}

/// On one seed in eight a node's engine is older. Drawn from a copy, as losses are.
fn draw_older(rng: &SmallRng, nodes: usize) -> Option<usize> {
    let mut rng = rng.clone();
    rng.random_ratio(1, 8).then(|| rng.random_range(0..nodes))
}

/// One seed in four of those with three members has a fourth node and loses one or two. Drawn from a
/// copy: all other seeds are what they were without this.
fn draw_losses(rng: &SmallRng, members: usize, faulty_ns: u64) -> Vec<(u64, Loss)> {
    let mut rng = rng.clone();
    if members != 3 || !rng.random_ratio(1, 4) {
        return Vec::new();
    }
    let kinds = [Loss::Wiped, Loss::Wiped, Loss::Retired, Loss::Away];
    let times = [2 * S..faulty_ns / 3, faulty_ns / 2..faulty_ns - 2 * S];
    let count = rng.random_range(1..=2);
    times.into_iter().take(count).map(|at| (rng.random_range(at), pick(&mut rng, &kinds))).collect()
}
