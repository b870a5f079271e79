//! Random schedules (`harness::schedule`) over many seeds, with every rule as it should be.

mod harness;

use harness::schedule::run;

#[test]
fn nothing_acknowledged_is_lost_and_reads_are_linearizable() {
    let seeds = std::env::var("TERCET_SEEDS").map_or(60, |n| n.parse().expect("a number"));
    let first = std::env::var("TERCET_SEED").map_or(0, |n| n.parse().expect("a number"));
    let mut completed = 0;
    for seed in first..first + seeds {
        let result = std::panic::catch_unwind(|| run(seed, |_| {}));
        completed += result.unwrap_or_else(|panic| {
            eprintln!("seed {seed} (run it alone with TERCET_SEED={seed} TERCET_SEEDS=1)");
            std::panic::resume_unwind(panic)
        });
    }
    assert!(completed > 100 * seeds as usize, "only {completed} operations in {seeds} seeds");
}
