//! Small spaces, whole, and a broken rule in each of them; `model run` and `model canaries` do the
//! rest.

use tercet_model::local::Broken;
use tercet_model::space::{SAFE, named};

#[test]
fn a_takeover_loses_nothing_and_reaches_what_it_should() {
    let space = named("takeover").expect("a space");
    let explored = space.explore(Broken::default(), 1, None);
    assert_eq!(explored.found.get(SAFE), None, "nothing is wrong");
    for name in space.reaches {
        assert!(explored.found.contains_key(name), "never reached: {name}");
    }
    assert!(explored.states > 5_000, "only {} states", explored.states);
}

#[test]
fn a_hand_over_loses_nothing() {
    let explored = named("hand-over").expect("a space").explore(Broken::default(), 1, None);
    assert_eq!(explored.found.get(SAFE), None, "nothing is wrong");
    for name in ["a takeover serves", "a write after a takeover is seen"] {
        assert!(explored.found.contains_key(name), "never reached: {name}");
    }
}

#[cfg(feature = "canary")]
#[test]
fn broken_rules_have_counterexamples() {
    use tercet_model::canaries::BIRDS;
    let names = [
        "AckBeforeMajority",
        "AckAfterPromise",
        "AdoptOwn",
        "ReadWithoutLease",
        "ServeAfterGiveBack",
    ];
    for name in names {
        let bird = BIRDS.iter().find(|bird| bird.name == name).expect("a canary");
        let space = named(bird.space).expect("a space");
        let explored = space.explore(Broken { canary: Some(bird.canary) }, 1, None);
        assert!(explored.found.contains_key(SAFE), "{name} is not caught");
    }
}
