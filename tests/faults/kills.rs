//! SIGKILL at random moments under load.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::audit::Audit;
use crate::harness::Service;
use crate::workload::{Acknowledged, CLIENTS, Load, upstream};
use crate::{beside_others, report, rounds};

#[test]
fn nothing_acknowledged_is_lost_by_kills_under_load() {
    let _turn = beside_others();
    let kills = rounds("ARTIFACT_CACHE_TEST_KILLS", 20);
    let (acknowledged, next) = (Acknowledged::default(), AtomicU64::new(0));
    let mut service = Service::new().env("FETCH__STREAM_AFTER_SECONDS", "0").start();
    let (mut orphans, mut kept, mut left) = (0, 0, 0);
    for round in 0..kills {
        // An upstream for each round: what the rounds before have stored must be served without theirs.
        let up = upstream();
        let moment = Duration::from_millis(fastrand::u64(1..150));
        let load = Load { up: &up, next: &next, acknowledged: &acknowledged };
        load.run(&mut service, |service| {
            std::thread::sleep(moment);
            service.kill();
        });
        service = service.again().start();
        let audit = Audit::of(&service, &acknowledged);
        // A blob may be left without a row for each download that was in flight, and is adopted by the next.
        audit.assert_clean(&format!("kill {round} after {moment:?}"), orphans + CLIENTS as usize);
        left += audit.orphans.saturating_sub(orphans);
        orphans = audit.orphans;
        if round % 50 == 49 {
            // The audit reads all there is, so that it would take ever longer.
            kept += acknowledged.count();
            (orphans, service) = (0, Service::new().env("FETCH__STREAM_AFTER_SECONDS", "0").start());
            acknowledged.forget();
        }
    }
    kept += acknowledged.count();
    assert!(kept > 0, "the kills came too early to show anything");
    report(format_args!("{kills} kills: {kept} acknowledged, 0 lost, {left} orphans"));
}
