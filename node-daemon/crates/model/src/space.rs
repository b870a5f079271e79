//! The named spaces: bounds, and how each is explored.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::local::{Book, Broken};
use crate::tell::told;
use crate::world::{Action, Bounds, State, World};

/// A part of all states, complete within its bounds.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// How it is called.
    pub name: &'static str,
    /// Too long for each `make test`.
    pub long: bool,
    /// What happens in it.
    pub bounds: Bounds,
    /// What has to be reached in it, or it shows nothing.
    pub reaches: &'static [&'static str],
}

/// Nothing happens but what messages and the agents do.
const QUIET: Bounds = Bounds {
    writes: 1,
    ticks: 0,
    repeats: false,
    slow_grants: false,
    slow_disks: false,
    active: false,
    ..Bounds::NOTHING
};
const TAKEOVER: Bounds = Bounds { takeovers: 1, ..QUIET };
const LEASE: Bounds = Bounds { takeovers: 1, leases: 1, grants: 2, ..QUIET };
const CRASH: Bounds = Bounds { takeovers: 1, leases: 1, crashes: 1, ..QUIET };

const SERVES: &str = "a takeover serves";
const WRITES: &str = "a write after a takeover is seen";
const TWO: &str = "two serve, in two epochs";
const CATCHES_UP: &str = "a member catches up";
const DROPS: &str = "a write that nobody saw is dropped";
const READS: &str = "a read after a takeover";

const fn space(name: &'static str, bounds: Bounds, reaches: &'static [&'static str]) -> Space {
    Space { name, long: false, bounds, reaches }
}

const fn long(name: &'static str, bounds: Bounds, reaches: &'static [&'static str]) -> Space {
    Space { name, long: true, bounds, reaches }
}

/// Every space; docs/testing-model.md says what each is for.
pub const SPACES: &[Space] = &[
    space("retry", Bounds { ticks: 2, repeats: true, ..QUIET }, &[]),
    space("takeover", TAKEOVER, &[SERVES, WRITES, TWO, DROPS]),
    space("repeats", Bounds { repeats: true, ..TAKEOVER }, &[SERVES, WRITES, TWO, DROPS]),
    space("two-writes", Bounds { writes: 2, ..TAKEOVER }, &[SERVES, WRITES, TWO, DROPS]),
    space("slow-disk", Bounds { slow_disks: true, ..TAKEOVER }, &[SERVES, WRITES, TWO, DROPS]),
    space(
        "lost-answer",
        Bounds { lost_answers: 1, active: true, ..TAKEOVER },
        &[SERVES, WRITES, TWO, DROPS],
    ),
    space("hand-over", Bounds { hand_overs: 1, grants: 1, ..QUIET }, &[SERVES, WRITES]),
    space("hand-over-time", Bounds { hand_overs: 1, ticks: 1, ..QUIET }, &[SERVES, WRITES]),
    long("hand-over-race", Bounds { hand_overs: 1, ..TAKEOVER }, &[SERVES, WRITES, TWO]),
    space("lease", LEASE, &[SERVES, WRITES, TWO, READS]),
    long("lease-crash", Bounds { grants: 2, ..CRASH }, &[SERVES, WRITES, CATCHES_UP, READS]),
    long("crash", CRASH, &[SERVES, WRITES, TWO, CATCHES_UP, DROPS]),
    long("wiped", Bounds { wipes: 1, ..CRASH }, &[SERVES, WRITES]),
    long("restored", Bounds { restores: 1, takeovers: 2, ..QUIET }, &[SERVES, WRITES]),
    long("two-takeovers", Bounds { takeovers: 2, ..QUIET }, &[SERVES, WRITES, TWO, DROPS]),
];

/// The space of that name.
pub fn named(name: &str) -> Option<&'static Space> {
    SPACES.iter().find(|space| space.name == name)
}

/// What of a space was explored.
#[derive(Debug)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// States made, met again ones included.
    pub generated: usize,
    /// Steps of the longest way.
    pub depth: usize,
    /// Different states of single nodes.
    pub locals: usize,
    /// Different messages.
    pub packets: usize,
    /// How long it took.
    pub seconds: f64,
    /// What was found, and how it came about.
    pub found: BTreeMap<&'static str, Vec<String>>,
    /// Whether everything was explored.
    pub complete: bool,
}

/// The model as stateright wants it.
pub struct Checked {
    book: Book,
    bounds: Bounds,
}

impl Checked {
    /// The space with these bounds, with a rule broken where the build can.
    pub fn new(bounds: Bounds, broken: Broken) -> Self {
        Self { book: Book::new(broken), bounds }
    }

    fn world(&self) -> World<'_> {
        World { book: &self.book, bounds: self.bounds }
    }
}

/// What never is, by name.
pub const SAFE: &str = "nothing lost, nothing stale, one primary, legal steps";

impl Model for Checked {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.world().begin()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.world().actions(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.world().next(state, &action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SAFE, |_, state: &State| state.wrong.is_none()),
            Property::sometimes(SERVES, |_, state: &State| state.serves_after_takeover()),
            Property::sometimes(WRITES, |_, state: &State| state.written_after_takeover()),
            Property::sometimes(TWO, |_, state: &State| state.two_serve()),
            Property::sometimes(CATCHES_UP, |_, state: &State| state.caught_up()),
            Property::sometimes(DROPS, |_, state: &State| state.dropped()),
            Property::sometimes(READS, |_, state: &State| state.read_after_takeover()),
        ]
    }
}

impl Space {
    /// Explores all of it, or until something is wrong, or for so long.
    pub fn explore(&self, broken: Broken, threads: usize, at_most: Option<Duration>) -> Explored {
        let started = Instant::now();
        let checked = Checked::new(self.bounds, broken);
        let mut builder =
            checked.checker().threads(threads).finish_when(HasDiscoveries::AnyFailures);
        if let Some(at_most) = at_most {
            builder = builder.timeout(at_most);
        }
        let checker = builder.spawn_bfs().join();
        let seconds = started.elapsed().as_secs_f64();
        let book = &checker.model().book;
        let mut found = BTreeMap::new();
        for (name, path) in checker.discoveries() {
            let mut steps: Vec<_> = Vec::new();
            for (state, action) in path.into_vec() {
                if let Some(action) = action {
                    steps.push(told(&action, book));
                } else if let Some(wrong) = &state.wrong {
                    steps.push(format!("{wrong:?}"));
                }
            }
            found.insert(name, steps);
        }
        Explored {
            states: checker.unique_state_count(),
            generated: checker.state_count(),
            depth: checker.max_depth(),
            locals: book.locals(),
            packets: book.packets.count(),
            seconds,
            complete: at_most.is_none_or(|at_most| seconds < at_most.as_secs_f64()),
            found,
        }
    }
}
