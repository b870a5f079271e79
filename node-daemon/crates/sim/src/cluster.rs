//! The API server, its Volume objects, and the agents that stand between it and the engines.
//!
//! Compare-and-swap is atomic, whatever else goes wrong: answers get lost, requests are executed
//! long after their asker gave up, watches lag behind, the server is away for seconds. A step that
//! the vectors call illegal is a violation: the CRD would refuse it, and no engine may ask for it.

use std::collections::BTreeMap;

use rand::Rng;
use tercet_proto::{
    Config, ConfigState, Epoch, Member, NewReplica, Primary, ReplicaId, Source, Token, VolumeId,
};
use tercet_replication::api::{
    Attachment, Control, ControlDone, ControlError, Input, SwapOutcome, VolumeView,
};
use uuid::Uuid;

use crate::mix::MS;
use crate::phases::Sums;
use crate::probes::Probe;
use crate::world::World;

/// Between two attempts of an agent to reach the API server.
const RETRY_NS: u64 = 200 * MS;

/// After how long an agent calls a swap's outcome unknown.
const SWAP_TIMEOUT_NS: u64 = 1_500 * MS;

/// How late a swap may be executed after that, at most.
const SWAP_LATE_NS: u64 = 3_000 * MS;

/// Between two attempts of an operator's or a CSI request.
const ASK_NS: u64 = 400 * MS;

/// The API server beside its objects.
#[derive(Default)]
pub struct Cluster {
    /// Whether nobody reaches it.
    pub away: bool,
    /// The answer of the swap that is executed now is lost.
    pub answer_lost: bool,
    /// What each node's watch has shown last, by volume: version and object.
    seen: BTreeMap<(usize, usize), (u64, VolumeView)>,
}

/// A Volume object and what the operator knows of it.
pub struct Volume {
    /// `spec.uuid`.
    pub id: VolumeId,
    /// The object.
    pub view: VolumeView,
    version: u64,
    /// The nodes on which it was placed at first.
    pub homes: Vec<usize>,
    /// The replica on each node, once it has been reported.
    pub replicas: Vec<Option<ReplicaId>>,
    /// Which of them have been reported complete (S3).
    complete: Vec<bool>,
    /// What its replicas said of their chunks last.
    pub sums: Sums,
    /// What it is a clone of.
    pub source: Option<Source>,
}

/// What a request to an engine was for.
#[derive(Clone, Debug)]
pub enum Asked {
    /// A replica of that volume.
    Replica(usize),
    /// A replica of that volume that takes another's place.
    Learner(usize),
    /// The snapshot of that number.
    Snapshot(usize),
    /// The deletion of the snapshot of that number.
    SnapshotDelete(usize),
    /// Sums of a volume, for the comparison at the end.
    Sums(usize),
    /// Something whose answer does not matter.
    Nothing,
}

impl World {
    /// Makes the objects; replicas and first configurations follow.
    pub fn make_volumes(&mut self) {
        for volume in 0..self.mix.volumes {
            let hosts = &self.mix.host_volumes;
            let attachments = (0..hosts.len())
                .filter(|host| hosts[*host].contains(&volume))
                .map(attachment)
                .collect();
            let homes = (0..self.mix.members).collect();
            self.make_volume(attachments, homes, None);
        }
    }

    /// Makes an object, and replicas on these nodes.
    pub fn make_volume(
        &mut self,
        attachments: Vec<Attachment>,
        homes: Vec<usize>,
        source: Option<Source>,
    ) -> usize {
        let number = self.volumes.len();
        let view = VolumeView {
            attachments,
            size_blocks: self.mix.blocks,
            generation: 1,
            ..VolumeView::default()
        };
        let id = VolumeId::from_bytes(self.id_bytes());
        let replicas = vec![None; self.mix.nodes];
        let complete = vec![false; self.mix.nodes];
        let sums = Sums::new();
        let places = homes.clone();
        self.volumes.push(Volume { id, view, version: 1, homes, replicas, complete, sums, source });
        for node in places {
            self.after(MS, move |world| world.create_replica(number, node));
        }
        number
    }

    /// The number of a volume.
    pub fn volume_number(&self, id: VolumeId) -> usize {
        self.volumes.iter().position(|volume| volume.id == id).expect("a volume of this run")
    }

    /// Asks an engine for something on the operator's or the CSI controller's behalf.
    pub fn ask(&mut self, node: usize, control: Control, what: Asked) {
        let life = self.nodes[node].life;
        let wait = self.delay();
        self.after(wait, move |world| {
            world.on_node(node, life, move |world| {
                world.nodes[node].token_last += 1;
                let token = Token(world.nodes[node].token_last);
                world.nodes[node].asked.insert(token, what);
                world.input(node, Input::Control(token, control));
            });
        });
    }

    fn create_replica(&mut self, volume: usize, node: usize) {
        let object = &self.volumes[volume];
        if object.view.config.is_some() || object.complete[node] {
            return; // what is incomplete when the first configuration comes says so to the primary
        }
        let new = NewReplica {
            volume: self.volumes[volume].id,
            replica: ReplicaId::on_shard(Uuid::from_bytes(self.id_bytes()), 0),
            name: format!("volume{volume}"),
            size_blocks: self.mix.blocks,
            source: self.volumes[volume].source,
            incomplete: true,
        };
        self.ask(node, Control::CreateReplica(new), Asked::Replica(volume));
        self.after(ASK_NS, move |world| world.create_replica(volume, node));
    }

    /// `Output::ControlDone`.
    pub fn agent_control_done(
        &mut self,
        node: usize,
        token: Token,
        result: Result<ControlDone, ControlError>,
    ) {
        let Some(asked) = self.nodes[node].asked.remove(&token) else {
            self.violate(format!("an answer to {token:?} that was not asked or was answered"));
            return;
        };
        match (asked, result) {
            (Asked::Replica(volume), Ok(ControlDone::Replica { replica, incomplete })) => {
                self.replica_made(volume, node, replica, incomplete);
            }
            (Asked::Snapshot(number), result) => self.snapshot_answered(number, &result),
            (Asked::SnapshotDelete(number), result) => self.snapshot_deleted(number, &result),
            (Asked::Sums(volume), result) => self.sums_answered(volume, node, result),
            (Asked::Learner(volume), Ok(ControlDone::Replica { replica, .. })) => {
                self.learner_made(volume, node, replica);
            }
            (Asked::Replica(_) | Asked::Learner(_) | Asked::Nothing, _) => {}
        }
    }

    fn replica_made(&mut self, volume: usize, node: usize, id: ReplicaId, incomplete: bool) {
        if incomplete && self.volumes[volume].replicas[node].is_none() {
            self.probe(Probe::CloneIncomplete);
            let name = &self.nodes[node].name;
            self.tell(|_| format!("{name}: volume {volume} awaits its snapshot (S3)"));
        }
        self.volumes[volume].complete[node] = !incomplete;
        let known = self.volumes[volume].replicas[node].replace(id);
        if let Some(known) = known.filter(|known| *known != id) {
            self.violate(format!("volume {volume}: replica {known} became {id} (T9)"));
        }
        let object = &self.volumes[volume];
        let homes = object.homes.clone();
        let complete: Vec<usize> = homes.iter().copied().filter(|n| object.complete[*n]).collect();
        let enough = complete.len() * 2 > homes.len(); // S3
        let missing = homes.iter().any(|n| object.replicas[*n].is_none());
        if object.view.config.is_some() || missing || !enough {
            return;
        }
        if complete.len() < homes.len() {
            self.probe(Probe::ConfiguredIncomplete);
        }
        let primary = complete[self.rng.random_range(0..complete.len())];
        let members = homes
            .into_iter()
            .map(|n| Member {
                node: self.nodes[n].name.clone(),
                replica: self.volumes[volume].replicas[n].expect("all have reported"),
            })
            .collect();
        let primary = Primary {
            node: self.nodes[primary].name.clone(),
            instance: self.nodes[primary].instance,
        };
        self.tell(|_| format!("operator: first configuration of volume {volume} (T9)"));
        self.volumes[volume].view.config = Some(Config {
            epoch: Epoch(1),
            state: ConfigState::Recovering,
            primary,
            members,
            previous_members: None,
            learners: Vec::new(),
            single_copy: None,
            restored: None,
        });
        self.changed(volume);
        self.clone_configured(volume);
    }

    /// The object has a new version: watches will show it.
    pub fn changed(&mut self, volume: usize) {
        self.volumes[volume].version += 1;
        for node in 0..self.mix.nodes {
            let lag = self.mix.watch_lag_ns;
            let wait = self.rng.random_range(MS..=lag);
            let (version, view) = (self.volumes[volume].version, self.volumes[volume].view.clone());
            self.after(wait, move |world| world.watched(node, volume, version, view));
        }
    }

    /// Whether a node's agent reaches the API server.
    pub fn api_reaches(&self, node: usize) -> bool {
        let (node, api) = (node, self.api_site());
        !self.cluster.away && self.net.is_open(node, api)
    }

    fn watched(&mut self, node: usize, volume: usize, version: u64, view: VolumeView) {
        if !self.nodes[node].powered || !self.api_reaches(node) {
            self.after(RETRY_NS, move |world| world.watched(node, volume, version, view));
            return;
        }
        let seen = self.cluster.seen.entry((node, volume)).or_default();
        if seen.0 >= version {
            return;
        }
        *seen = (version, view.clone());
        self.observe(node, volume, view);
    }

    /// A fresh engine is told what the agent's cache has.
    pub fn agent_started(&mut self, node: usize) {
        for volume in 0..self.volumes.len() {
            if let Some((_, view)) = self.cluster.seen.get(&(node, volume)).cloned() {
                self.observe(node, volume, view);
            }
        }
    }

    fn observe(&mut self, node: usize, volume: usize, view: VolumeView) {
        let (life, id) = (self.nodes[node].life, self.volumes[volume].id);
        self.on_node(node, life, move |world| world.input(node, Input::Observe(id, view)));
    }

    /// `Output::ReadConsistent`: the agent tries until it has the object, or the engine is gone.
    pub fn agent_read(&mut self, node: usize, volume: VolumeId) {
        let volume = self.volume_number(volume);
        let (boot, life) = (self.nodes[node].boot, self.nodes[node].life);
        let wait = self.delay() + MS;
        self.after(wait, move |world| world.agent_read_try(node, boot, life, volume));
    }

    fn agent_read_try(&mut self, node: usize, boot: u64, life: u64, volume: usize) {
        if self.nodes[node].boot != boot || self.nodes[node].life != life {
            return;
        }
        if !self.api_reaches(node) {
            let again = move |world: &mut Self| world.agent_read_try(node, boot, life, volume);
            self.after(RETRY_NS, again);
            return;
        }
        let view = VolumeView { consistent: true, ..self.volumes[volume].view.clone() };
        let wait = self.delay() + MS;
        self.after(wait, move |world| world.observe(node, volume, view));
    }

    /// `Output::Swap`.
    pub fn agent_swap(
        &mut self,
        node: usize,
        token: Token,
        volume: VolumeId,
        old: Config,
        new: Config,
    ) {
        let volume = self.volume_number(volume);
        self.tell(|world| {
            let name = &world.nodes[node].name;
            format!("{name}: volume {volume}: asks for {} (T3)", config_story(&new))
        });
        if let Err(why) = Config::check_step(Some(&old), Some(&new)) {
            self.violate(format!("volume {volume}: illegal step {old:?} to {new:?}: {why}"));
            return;
        }
        let swap = Swap {
            node,
            life: self.nodes[node].life,
            token,
            volume,
            old,
            new,
            until: self.now + SWAP_TIMEOUT_NS,
        };
        let wait = self.delay() + MS;
        self.after(wait, move |world| world.swap_try(swap));
    }

    fn swap_try(&mut self, swap: Swap) {
        if !self.nodes[swap.node].powered {
            return;
        }
        if !self.api_reaches(swap.node) {
            if self.now >= swap.until {
                self.swap_unknown(&swap, false);
            } else {
                self.after(RETRY_NS, move |world| world.swap_try(swap));
            }
            return;
        }
        if !self.healed && self.permille(self.mix.swap_late_permille) {
            // The request hangs on its way; its asker gives up before it is executed.
            self.swap_unknown(&swap, false);
            let wait = self.rng.random_range(MS..SWAP_LATE_NS);
            self.after(wait, move |world| {
                if world.swap_execute(&swap) {
                    world.probe(Probe::SwapLate);
                }
            });
            return;
        }
        let swapped = self.swap_execute(&swap);
        let lost = std::mem::take(&mut self.cluster.answer_lost);
        if lost || !self.healed && self.permille(self.mix.answer_lost_permille) {
            self.swap_unknown(&swap, swapped);
            return;
        }
        let view = VolumeView { consistent: true, ..self.volumes[swap.volume].view.clone() };
        let outcome = if swapped { SwapOutcome::Swapped(view) } else { SwapOutcome::Lost(view) };
        if !swapped {
            self.probe(Probe::SwapLost);
        }
        let wait = self.delay() + MS;
        self.after(wait, move |world| world.swap_answer(&swap, outcome));
    }

    fn swap_unknown(&mut self, swap: &Swap, took_place: bool) {
        self.probe(if took_place { Probe::UnknownTookPlace } else { Probe::UnknownDidNot });
        let swap = swap.clone();
        let wait = self.rng.random_range(MS..SWAP_TIMEOUT_NS);
        self.after(wait, move |world| world.swap_answer(&swap, SwapOutcome::Unknown));
    }

    fn swap_execute(&mut self, swap: &Swap) -> bool {
        let object = &mut self.volumes[swap.volume];
        if object.view.config.as_ref() != Some(&swap.old) {
            return false;
        }
        object.view.config = Some(swap.new.clone());
        let volume = swap.volume;
        self.saw_step(&swap.old, &swap.new);
        self.tell(|_| format!("API server: volume {volume} is {}", config_story(&swap.new)));
        self.changed(volume);
        true
    }

    fn swap_answer(&mut self, swap: &Swap, outcome: SwapOutcome) {
        let (node, token) = (swap.node, swap.token);
        self.tell(|world| {
            let what = match &outcome {
                SwapOutcome::Swapped(_) => "took place",
                SwapOutcome::Lost(_) => "was lost to another",
                SwapOutcome::Unknown => "has an unknown outcome",
            };
            let name = &world.nodes[node].name;
            format!("{name}: the swap to {} {what}", config_story(&swap.new))
        });
        self.on_node(node, swap.life, move |world| {
            world.input(node, Input::Swapped(token, outcome));
        });
    }

    /// `Output::Fenced`: the agent writes `status.fence` with a `test` on the epoch.
    pub fn agent_fenced(&mut self, node: usize, volume: VolumeId, epoch: Epoch, generation: u64) {
        let volume = self.volume_number(volume);
        let wait = self.delay() + MS;
        let boot = self.nodes[node].boot;
        self.after(wait, move |world| world.fence_try(node, boot, volume, epoch, generation));
    }

    fn fence_try(&mut self, node: usize, boot: u64, volume: usize, epoch: Epoch, generation: u64) {
        if self.nodes[node].boot != boot || !self.nodes[node].powered {
            return;
        }
        if !self.api_reaches(node) {
            self.after(RETRY_NS, move |world| {
                world.fence_try(node, boot, volume, epoch, generation);
            });
            return;
        }
        let object = &mut self.volumes[volume];
        if object.view.config.as_ref().is_some_and(|config| config.epoch == epoch)
            && object.view.fence.is_none_or(|fence| fence < (epoch, generation))
        {
            object.view.fence = Some((epoch, generation));
            self.tell(|_| format!("API server: volume {volume} fenced {epoch}, {generation} (H5)"));
            self.changed(volume);
        }
    }
}

#[derive(Clone)]
struct Swap {
    node: usize,
    life: u64,
    token: Token,
    volume: usize,
    old: Config,
    new: Config,
    until: u64,
}

/// One of `spec.attachments`.
pub fn attachment(host: usize) -> Attachment {
    let host_nqn = format!("nqn.2014-08.org.nvmexpress:uuid:host{host}");
    Attachment { host_nqn, read_only: false }
}

fn config_story(config: &Config) -> String {
    let names = |set: &[Member]| {
        let names: Vec<&str> = set.iter().map(|member| member.node.as_str()).collect();
        names.join(" ")
    };
    let mut text =
        format!("{{{}, {:?}, primary {}", config.epoch, config.state, config.primary.node);
    if !config.learners.is_empty() || config.previous_members.is_some() {
        let (now, before) = (names(&config.members), names(config.previous()));
        let learners = names(&config.learners);
        text = format!("{text}, members {now}, previous {before}, learners {learners}");
    }
    text + "}"
}
