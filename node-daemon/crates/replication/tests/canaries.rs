//! Rules broken on purpose, one at a time: the random schedules have to notice each of these within
//! the stated number of seeds. The others are for the simulator, which knows hosts and disks better.
//! Run with `--features canary`.
#![cfg(feature = "canary")]

mod harness;

use harness::ms;
use harness::schedule::run;
use tercet_replication::options::Canary;

/// Seeds within which a canary has to be caught.
const SEEDS_MAX: u64 = 250;

macro_rules! canary {
    ($test:ident, $canary:ident) => {
        #[test]
        fn $test() {
            let caught = (0..SEEDS_MAX).find(|seed| {
                let broken = || {
                    run(*seed, |options| {
                        options.canary = Some(Canary::$canary);
                        // Safety is never a matter of this time; a short one gives more takeovers.
                        options.timing.missing_after = ms(300);
                    })
                };
                std::panic::catch_unwind(broken).is_err()
            });
            let seed = caught.expect(concat!(stringify!($canary), " is not caught"));
            println!("{} is caught by seed {seed}", stringify!($canary));
        }
    };
}

canary!(w4_acknowledge_before_the_majority, AckBeforeMajority);
canary!(w5_apply_an_unmatched_suffix, ApplyUnmatchedSuffix);
canary!(l1_read_without_lease, ReadWithoutLease);
canary!(t4_seal_without_waiting, SealWithoutWait);
canary!(h2_queue_on_a_secondary, QueueOnSecondary);
canary!(h4_keep_associations, KeepAssociations);
canary!(h3_serve_a_reconnected_host_early, ServeReconnectEarly);
canary!(t5_adopt_the_own_tail, AdoptOwn);
canary!(t1_resume_the_old_epoch, ResumeOldEpoch);
canary!(l5_serve_after_the_lease_was_given_back, ServeAfterGiveBack);

#[test]
fn t4_acknowledge_after_the_promise() {
    let broken = || {
        harness::stories::late_acknowledgement(|options| {
            options.canary = Some(Canary::AckAfterPromise);
        });
    };
    assert!(std::panic::catch_unwind(broken).is_err(), "AckAfterPromise is not caught");
}
