//! The vectors that hold Rust, Python and CEL together: each step is legal here, or refused for
//! the reason that the file names.

use serde::Deserialize;
use tercet_proto::{Config, IllegalStep};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vector {
    name: String,
    old: Option<Config>,
    new: Option<Config>,
    legal: bool,
    why: Option<IllegalStep>,
}

fn vectors() -> Vec<Vector> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../crds/vectors/config_steps.json");
    let text = std::fs::read_to_string(path).expect("the vectors");
    serde_json::from_str(&text).expect("a list of vectors")
}

#[test]
fn every_vector_is_judged_as_the_file_says() {
    let vectors = vectors();
    assert!(vectors.len() > 80, "only {} vectors", vectors.len());
    for vector in &vectors {
        let want = match (vector.legal, vector.why) {
            (true, None) => Ok(()),
            (false, Some(why)) => Err(why),
            _ => panic!("{}: legal and why contradict each other", vector.name),
        };
        let got = Config::check_step(vector.old.as_ref(), vector.new.as_ref());
        assert_eq!(got, want, "{}", vector.name);
    }
}

#[test]
fn every_reason_has_a_vector_and_names_are_unique() {
    let vectors = vectors();
    let all = [
        IllegalStep::TakenAway,
        IllegalStep::First,
        IllegalStep::EpochFell,
        IllegalStep::EditedEpoch,
        IllegalStep::State,
        IllegalStep::PrimaryNoMember,
        IllegalStep::Members,
        IllegalStep::TwoMembers,
        IllegalStep::PreviousMembers,
        IllegalStep::SingleCopy,
        IllegalStep::Learners,
        IllegalStep::Newcomer,
        IllegalStep::Restored,
    ];
    for why in all {
        assert!(vectors.iter().any(|v| v.why == Some(why)), "no vector for {why:?}");
    }
    let names: std::collections::BTreeSet<_> = vectors.iter().map(|v| &v.name).collect();
    assert_eq!(names.len(), vectors.len(), "two vectors of one name");
}

#[test]
fn a_configuration_survives_json() {
    for config in vectors().into_iter().filter_map(|v| v.new) {
        let text = serde_json::to_string(&config).expect("json");
        assert_eq!(serde_json::from_str::<Config>(&text).expect("config"), config);
    }
}
