//! Blocks that go bad (rule C4), in a part of the seeds: a bit of one flips, or the device cannot
//! read it any more.
//!
//! A block of every volume goes bad on one node only, for ever the same one: what two replicas lost
//! at once nobody can repair, so no seed has this and a node that is lost for good. It goes bad where
//! a start does not look for it: a bad record, or payload behind the last mark, is R1's, and
//! `Fault::Rot` does that. The rule is about peers that lag, so these seeds have slow devices, large
//! writes (whose blocks are in place at once), and a liking for blocks that another node has in
//! another version just now. What is demanded: reads are right or fail; once all is healed every
//! block is repaired, and a whole pass of scrub on every node meets nothing bad.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_proto::Place;
use tercet_shard::{ScrubPace, Shard};

use crate::mix::{Fault, MS, Mix, S};
use crate::probes::Probe;
use crate::world::World;

/// Of so many seeds one has blocks that go bad.
const SEEDS: u32 = 4;
/// Makes its choices apart from all others, so that the other seeds are what they were.
const SALT: u64 = 0xdeca_0000_0000_0000;
/// Between two blocks that go bad, on average.
const EVERY_NS: u64 = 150 * MS;
/// A block that was seen goes bad so much later, if it still is what it was: a mark covers it (R1).
const LATER_NS: u64 = 300 * MS;
/// Blocks that are looked at for one that another node has in another version.
const LOOKS: usize = 24;
/// Slow devices of such a seed, besides what it has.
const SLOW: usize = 3;
/// Writes of such a seed are as large as this.
const OP_BLOCKS_MAX: u32 = 32;
/// How long repairing may take once all is healed.
const MEND_NS: u64 = 90 * S;
const LOOK_NS: u64 = 200 * MS;

/// How these seeds are scrubbed: often enough for several passes of each process.
pub const PACE: ScrubPace = ScrubPace {
    idle_bytes_per_s: 64 << 20,
    busy_bytes_per_s: 16 << 20,
    every: Duration::from_secs(4),
};

/// Of one seed.
pub struct Decay {
    /// Whether blocks go bad.
    pub on: bool,
    /// Everything is repaired: from now on no read fails.
    pub mended: bool,
    rng: SmallRng,
}

/// A block that is to go bad.
#[derive(Clone, Copy)]
struct Doomed {
    node: usize,
    life: u64,
    volume: usize,
    block: u64,
    stamp: Place,
}

impl Decay {
    /// Whether this seed has it, and what that changes of its settings.
    pub fn draw(seed: u64, mix: &mut Mix) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed ^ SALT);
        let on = mix.nodes > 1 && mix.losses.is_empty() && rng.random_ratio(1, SEEDS);
        if on {
            mix.op_blocks_max = OP_BLOCKS_MAX;
            for _ in 0..SLOW {
                mix.faults.push((rng.random_range(S..mix.faulty_ns - S), Fault::DiskSlow));
            }
            mix.faults.sort_unstable();
        }
        Self { on, mended: false, rng }
    }
}

impl World {
    /// Lets blocks go bad from time to time.
    pub fn schedule_decay(&mut self) {
        if !self.decay.on || self.healed {
            return;
        }
        let wait = self.decay.rng.random_range(MS..2 * EVERY_NS);
        self.after(wait, |world| {
            if let Some(doomed) = world.draw_doomed() {
                world.after(LATER_NS, move |world| world.go_bad(doomed));
            }
            world.schedule_decay();
        });
    }

    /// A block of a node, rather of the primary, rather one that others have otherwise.
    fn draw_doomed(&mut self) -> Option<Doomed> {
        let volume = self.decay.rng.random_range(0..self.mix.volumes);
        let serving = (0..self.nodes.len()).find(|n| self.nodes[*n].serving.contains_key(&volume));
        let any = self.decay.rng.random_range(0..self.nodes.len());
        let node = serving.filter(|_| self.decay.rng.random_ratio(3, 4)).unwrap_or(any);
        let mut found = None;
        for _ in 0..LOOKS {
            let hot = self.decay.rng.random_ratio(3, 4);
            let blocks =
                if hot { self.mix.hot_blocks.min(self.mix.blocks) } else { self.mix.blocks };
            let block = self.decay.rng.random_range(0..blocks);
            if block % self.nodes.len() as u64 != node as u64 {
                continue;
            }
            let Some(stamp) = self.may_go_bad(node, volume, block) else { continue };
            let life = self.nodes[node].life;
            found = Some(Doomed { node, life, volume, block, stamp });
            let others = (0..self.nodes.len()).filter(|other| *other != node);
            let differs = |other| self.stamp_of(other, volume, block).is_some_and(|s| s != stamp);
            if others.into_iter().any(differs) {
                break;
            }
        }
        found
    }

    fn stamp_of(&self, node: usize, volume: usize, block: u64) -> Option<Place> {
        self.nodes[node].shard()?.stamp_of(self.volumes[volume].id, block)
    }

    /// The stamp of a block that is in place, durable and needed by no start.
    fn may_go_bad(&self, node: usize, volume: usize, block: u64) -> Option<Place> {
        let swift =
            self.nodes[node].device.slow == 1 && self.nodes[node].device.stuck_until <= self.now;
        if self.rotten.is_some() || self.nodes[node].paused > 0 || !swift {
            return None;
        }
        let shard = self.nodes[node].shard()?;
        let id = self.volumes[volume].id;
        shard.storage().replica(id).filter(|state| state.incomplete.is_none())?;
        shard.place_of(id, block)?;
        let stamp = self.stamp_of(node, volume, block)?;
        (stamp != Place::EMPTY).then_some(stamp)
    }

    fn go_bad(&mut self, doomed: Doomed) {
        let Doomed { node, life, volume, block, stamp } = doomed;
        if self.healed || self.nodes[node].life != life {
            return;
        }
        if self.may_go_bad(node, volume, block) != Some(stamp) {
            return;
        }
        let id = self.volumes[volume].id;
        let Some(place) = self.nodes[node].shard().and_then(|s| s.place_of(id, block)) else {
            return;
        };
        let flip = self.decay.rng.random_ratio(1, 2);
        self.nodes[node].device.decay(place, flip.then_some(&mut self.decay.rng));
        self.probe(Probe::BlockWentBad);
        self.tell(|world| {
            let name = &world.nodes[node].name;
            format!("{name}: block {block} of volume {volume}, at {place}, goes bad (C4)")
        });
    }

    /// Every node scrubs all that it has, and meets nothing bad.
    pub fn mend(&mut self) {
        if !self.decay.on {
            return;
        }
        let scrubs = |world: &Self| -> Vec<_> {
            let shards = world.nodes.iter().map(|node| node.shard());
            shards.map(|shard| shard.map(Shard::scrub_status).unwrap_or_default()).collect()
        };
        let before = scrubs(self);
        let mended = self.wait_until(MEND_NS, LOOK_NS, |world| {
            scrubs(world).iter().zip(&before).all(|(now, before)| {
                // One pass may have begun before the last block was repaired.
                now.passes >= before.passes + 2 && now.last_pass_bad_blocks == 0
            })
        });
        if !mended {
            let (now, state) = (scrubs(self), self.state_story());
            self.violate(format!("bad blocks are not repaired (C4): {now:?}\n{state}"));
        }
        self.decay.mended = true;
    }
}
