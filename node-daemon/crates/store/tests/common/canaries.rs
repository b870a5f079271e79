//! Rules that the store breaks on purpose, and whether that is noticed.

thread_local! {
    static CANARY: std::cell::Cell<Option<tercet_store::Canary>> =
        const { std::cell::Cell::new(None) };
}

/// The rule to break: this thread's, or the environment's (then these tests must fail).
pub fn canary() -> Option<tercet_store::Canary> {
    use tercet_store::Canary;
    if let Some(canary) = CANARY.get() {
        return Some(canary);
    }
    let name = std::env::var("TERCET_CANARY").ok()?;
    Some(match name.as_str() {
        "skip-flush" => Canary::SkipFlush,
        "torn-tail-for-damage" => Canary::TornTailForDamage,
        "reuse-freed-early" => Canary::ReuseFreedEarly,
        "cut-early" => Canary::CutEarly,
        "forget-drop" => Canary::ForgetDrop,
        "ignore-checksums" => Canary::IgnoreChecksums,
        "repair-other-version" => Canary::RepairOtherVersion,
        "finish-unsettled" => Canary::FinishUnsettled,
        "no-hole-stamps" => Canary::NoHoleStamps,
        other => panic!("no canary {other}"),
    })
}

/// Whether the checks of `body` notice that this rule is broken, and do not fail otherwise.
pub fn assert_caught(canary: tercet_store::Canary, body: impl Fn()) {
    let started = std::time::Instant::now();
    body();
    CANARY.set(Some(canary));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&body));
    CANARY.set(None);
    assert!(result.is_err(), "{canary:?} was not noticed");
    super::evidence(&format!("store_canary_{canary:?}"), 1, 0, started);
}
