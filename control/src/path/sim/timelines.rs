//! The timelines of `protocol/paths.md` §17 and traps of §18, changed where §15 and §15.1 change
//! them: rounds are followed by quick Pings at 100, 200, 400 and 800 ms; announcing has a timer of
//! its own; a candidate is validated before it is best; an unanswered heartbeat means Fallback after
//! a second already; and one Ping by relay measures the detour.

use std::net::SocketAddr;
use std::time::Duration;

use ringtail_dataplane::PeerId;

use super::script::{C1, Out, REGION, Script, Z, addr, ms, twin};
use super::shard::PEER;
use super::world::failed;
use crate::disco::Message;
use crate::path::{
    Config, Drop, Event, FailedTest, LinkChange, Reason, RestunReason, Route, StateName, Story,
    Validate,
};

const C2: &str = "198.51.100.2:41641";

fn fast() -> Config {
    Config {
        validate: Validate::Fast,
        ..Config::default()
    }
}

fn patient() -> Config {
    Config {
        retry_limit: 0,
        ..Config::default()
    }
}

fn ping(at: &str) -> Out {
    Out::Ping(addr(at))
}

/// A script that is direct to C1 by fast validation, with a round trip of `rtt`.
fn direct(rtt: Duration, endpoints: &[&str]) -> Script {
    let mut script = Script::new(fast(), endpoints);
    script.answer(C1, rtt);
    script.data();
    script.run_to(rtt);
    assert_eq!(script.best(), Some(addr(C1)));
    script
}

fn story(event: &Event) -> Option<&Story> {
    let Event::Story { what, .. } = event else {
        return None;
    };
    Some(what)
}

fn states(script: &Script) -> Vec<(u128, StateName, Reason)> {
    let state = |(at, event): &(Duration, Event)| {
        let Story::Path { state, reason, .. } = story(event)? else {
            return None;
        };
        Some((at.as_millis(), *state, *reason))
    };
    script.events.iter().filter_map(state).collect()
}

#[test]
fn t1_rounds_follow_data_and_end_45_s_after_it() {
    let mut script = Script::new(patient(), &[C1, C2]);
    script.data();
    // Pings leave before the CallMeMaybe: our NAT is open when the peer reacts.
    let first = [Out::RelayPing, ping(C1), ping(C2), Out::CallMeMaybe];
    assert_eq!(script.sent(0, 1), first);
    script.run_to(ms(1000));
    assert_eq!(script.times(&ping(C1)), [0, 100, 200, 400, 800]);
    assert_eq!(script.times(&ping(C1)), script.times(&ping(C2)));
    script.data();
    script.run_to(ms(5999));
    assert_eq!(script.sent(801, 5999), []);
    script.run_to(ms(7000));
    assert_eq!(script.sent(5999, 6001), first[1..]);
    for second in (3..120).step_by(3) {
        script.run_to(ms(second * 1000 - 1));
        script.refresh();
    }
    let rounds: Vec<u128> = script.times(&Out::CallMeMaybe);
    assert_eq!(rounds, [0, 6000, 12000, 18000, 24000, 30000, 36000, 42000]);
    assert_eq!(script.times(&ping(C1)).last(), Some(&42_800));
    assert_eq!(script.status().state, StateName::Relay);
}

#[test]
fn t2_old_endpoints_are_looked_up_before_they_are_announced_but_not_waited_for_long() {
    for answered in [true, false] {
        let mut script = Script::new(patient(), &[C1]);
        script.run_to(ms(30_000));
        script.data();
        assert!(script.sent(30_000, 30_001).contains(&ping(C1)));
        let wanted = (ms(30_000), Event::RestunWanted(RestunReason::Stale));
        assert!(script.events.contains(&wanted));
        script.run_to(ms(30_080));
        assert_eq!(script.times(&Out::CallMeMaybe), []);
        if answered {
            script.refresh();
        }
        script.run_to(ms(31_000));
        // Tailscale waits for the whole check, three seconds if a relay is dead.
        let at = if answered { 30_080 } else { 30_150 };
        assert_eq!(script.times(&Out::CallMeMaybe), [at]);
    }
}

#[test]
fn t3_one_point_is_no_reason_to_switch_and_ten_are() {
    let mut script = direct(ms(10), &[C1, C2]);
    script.answer(C2, Duration::from_micros(9950));
    script.run_with_data(ms(70_000), ms(500));
    assert!(
        script.times(&ping(C2)).iter().any(|at| *at > 50_000),
        "a round each minute"
    );
    assert_eq!(script.best(), Some(addr(C1)));
    script.answer(C2, ms(9));
    script.run_with_data(ms(140_000), ms(500));
    assert_eq!(script.best(), Some(addr(C2)));
}

#[test]
fn t3_with_validation_the_old_path_is_used_until_the_new_one_passes() {
    let mut script = Script::new(Config::default(), &[C1, C2]);
    script.answer(C1, ms(10));
    script.run_with_data(ms(30_000), ms(500));
    script.answer(C2, ms(8));
    script.run_with_data(ms(90_000), ms(500));
    assert_eq!(script.best(), Some(addr(C2)));
    let both: Vec<_> = script
        .decisions
        .iter()
        .filter(|(at, _)| *at > ms(1000))
        .collect();
    assert!(
        both.iter()
            .all(|(_, decision)| decision.trust_until.is_some())
    );
}

#[test]
fn t4_without_pongs_both_after_a_second_and_none_five_seconds_after_the_ping() {
    let mut script = direct(ms(10), &[C1]);
    script.silence(C1);
    script.run_with_data(ms(20_000), ms(50));
    let seen: Vec<_> = states(&script).into_iter().skip(1).collect();
    // The heartbeat at 3 s is the first Ping without Pong. Tailscale: Both at 6.5 s, none at 8 s.
    let wanted = [
        (10, StateName::Direct, Reason::Validated),
        (4000, StateName::Fallback, Reason::Silent),
        (8000, StateName::Probing, Reason::PingTimeout),
    ];
    assert_eq!(seen, wanted);
    let direct_until = script
        .decisions
        .iter()
        .filter_map(|(_, d)| d.trust_until)
        .max();
    assert_eq!(direct_until, Some(script.start + ms(6510)));
    let relay_only: Vec<_> = script
        .decisions
        .iter()
        .filter(|(at, _)| *at >= ms(8000))
        .map(|(_, d)| d.udp)
        .collect();
    assert_eq!(relay_only, [None]);
}

#[test]
fn t4_an_idle_path_loses_its_trust_and_keeps_its_address() {
    let mut script = direct(ms(10), &[C1]);
    script.run_to(ms(120_000));
    // The last heartbeat is the one at 45 s.
    let last = states(&script).last().copied();
    assert_eq!(last, Some((51_510, StateName::Fallback, Reason::Idle)));
    assert_eq!(script.best(), Some(addr(C1)));
    script.data();
    script.run_to(ms(120_010));
    assert_eq!(script.status().state, StateName::Direct);
}

#[test]
fn t5_a_good_path_is_left_alone_and_another_is_compared_each_minute() {
    const HOUR: u64 = 3_600_000;
    for (rtt, rounds) in [(4, 0..=0), (6, 57..=60)] {
        let mut script = direct(ms(rtt), &[C1, C2]);
        let before = script.times(&ping(C2)).len();
        while script.now - script.start < ms(HOUR) {
            let next = script.now - script.start + ms(20_000);
            script.refresh();
            script.run_with_data(next, ms(2000));
            assert_eq!(script.status().state, StateName::Direct);
        }
        let seen = script.times(&ping(C2)).len() - before;
        assert!(rounds.contains(&seen), "{rtt} ms: {seen} rounds");
    }
}

#[test]
fn t6_a_call_is_answered_by_pings_to_all_and_by_no_call() {
    let mut script = Script::new(patient(), &[C1, C2]);
    script.data();
    script.run_to(ms(1000));
    script.call(&[C1, C2]);
    assert_eq!(script.sent(1000, 1001), [ping(C1), ping(C2)]);
    script.run_to(ms(5900));
    assert_eq!(script.times(&Out::CallMeMaybe), [0]);
}

#[test]
fn a_call_does_not_silence_our_own_announcing() {
    // Tailscale: the call restarts the 5 s limit, no Ping is due, and so nothing is announced.
    let mut script = Script::new(patient(), &[C1]);
    script.data();
    script.run_to(ms(4000));
    script.call(&[C1]);
    script.run_to(ms(5500));
    script.data();
    assert_eq!(script.sent(5500, 5501), [Out::CallMeMaybe]);
}

#[test]
fn calls_cause_one_round_per_second_but_new_addresses_are_asked_at_once() {
    let mut script = Script::new(patient(), &[]);
    script.call(&[C1]);
    script.run_to(ms(60));
    script.call(&[C1, C2]);
    assert_eq!(script.sent(60, 61), [ping(C2)]);
    script.run_to(ms(950));
    let before = script.sent(0, 950).len();
    script.call(&[C1, C2]);
    assert_eq!(script.sent(0, 951).len(), before);
    script.run_to(ms(1010));
    assert_eq!(script.sent(999, 1010), [ping(C1), ping(C2)]);
}

#[test]
fn t7_what_a_newer_call_does_not_name_is_removed_even_if_it_is_best() {
    let mut script = Script::new(fast(), &[]);
    script.answer(C1, ms(10));
    script.call(&[C1, C2]);
    script.run_to(ms(500));
    assert_eq!(script.best(), Some(addr(C1)));
    script.call(&[C2]);
    assert_eq!(script.best(), None);
    assert_eq!(
        states(&script).last().map(|state| state.2),
        Some(Reason::Withdrawn)
    );
    let left: Vec<SocketAddr> = script.status().candidates.iter().map(|c| c.0).collect();
    assert_eq!(left, [addr(C2)]);
}

#[test]
fn t8_a_new_source_of_pings_is_answered_pinged_back_and_forgotten_after_45_s() {
    let mut script = Script::new(patient(), &[C1]);
    script.receive_ping(Z);
    // Tailscale pings it with the next data or tick.
    assert_eq!(script.sent(0, 1), [ping(Z), Out::Pong(addr(Z))]);
    script.run_to(ms(45_000));
    script.data();
    assert!(script.sent(45_000, 45_001).contains(&ping(Z)));
    script.run_with_data(ms(56_000), ms(1000));
    assert!(
        script
            .status()
            .candidates
            .iter()
            .all(|(at, _)| *at != addr(Z))
    );
}

#[test]
fn t9_a_ping_seen_before_is_not_answered_again() {
    let mut script = Script::new(patient(), &[]);
    let ping = script.their_ping();
    assert_eq!(script.receive(addr(Z), &ping), Ok(()));
    assert_eq!(script.receive(addr(Z), &ping), Err(Drop::DuplicatePing));
    assert_eq!(script.times(&Out::Pong(addr(Z))), [0]);
}

#[test]
fn t10_a_pong_of_a_removed_candidate_changes_nothing() {
    let mut script = Script::new(fast(), &[]);
    script.answer(C1, ms(100));
    script.call(&[C1]);
    script.run_to(ms(50));
    script.call(&[C2]);
    script.run_to(ms(400));
    assert_eq!(script.best(), None);
}

#[test]
fn t11_eight_silent_rounds_hold_the_peer_and_a_call_allows_one_round() {
    let mut script = Script::new(Config::default(), &[C1]);
    let mut held_at = None;
    for second in 0..90 {
        script.refresh();
        script.run_with_data(ms(second * 1000 + 1000), ms(100));
        if script.status().state == StateName::Held {
            held_at.get_or_insert(second);
        }
    }
    assert_eq!(held_at, Some(40), "8 rounds of 5 s");
    assert_eq!(script.times(&Out::CallMeMaybe).len(), 8);
    script.call(&[C1]);
    assert_eq!(script.status().state, StateName::Probing);
    assert_eq!(script.sent(90_000, 90_001), [ping(C1)]);
    script.run_with_data(ms(97_000), ms(100));
    assert_eq!(script.status().state, StateName::Held);
    assert_eq!(script.sent(90_801, 97_000), []);
    assert_eq!(script.times(&Out::CallMeMaybe).len(), 8);
    // Pings of the peer are answered all the same, and pinged back.
    script.receive_ping(Z);
    assert!(script.sent(97_000, 97_001).contains(&Out::Pong(addr(Z))));
    // Five minutes, give or take a tenth, then another eight; then ten.
    script.run_with_data(ms(800_000), ms(1000));
    let holds: Vec<u128> = states(&script)
        .into_iter()
        .filter(|(_, state, reason)| {
            *state == StateName::Held && *reason == Reason::RetryLimit
                || *reason == Reason::HoldOver
        })
        .map(|(at, _, _)| at)
        .collect();
    assert!(
        (270_000..=330_000).contains(&(holds[1] - holds[0])),
        "{holds:?}"
    );
    script.run_with_data(ms(1_200_000), ms(1000));
    let over = |state: &(u128, StateName, Reason)| {
        state.1 == StateName::Relay && state.2 == Reason::HoldOver
    };
    let again = states(&script).into_iter().filter(over).count();
    assert_eq!(again, 2, "the second time of holding is twice as long");
}

#[test]
fn a_held_peer_wakes_when_something_changes() {
    type Change = fn(&mut Script);
    let changes: [(&str, Change); 5] = [
        ("endpoints of the peer", |script| {
            script.setup.endpoints.push(addr(C2));
            let setup = script.setup.clone();
            script.set_peers(&[setup]);
        }),
        ("home of the peer", |script| {
            script.setup.home = Some(REGION);
            let mut setup = script.setup.clone();
            setup.home = None;
            script.set_peers(&[setup]);
        }),
        ("own endpoints", |script| {
            script
                .paths
                .set_own_endpoints(script.now, vec![addr("203.0.113.77:1")]);
        }),
        ("link", |script| {
            script
                .paths
                .handle_link_change(script.now, LinkChange::Minor)
        }),
        ("user ping", |script| {
            assert!(script.paths.ping(script.now, PEER).is_some());
        }),
    ];
    for (name, change) in changes {
        let mut script = Script::new(Config::default(), &[C1]);
        script.run_with_data(ms(60_000), ms(500));
        assert_eq!(script.status().state, StateName::Held, "{name}");
        change(&mut script);
        assert_eq!(script.status().state, StateName::Probing, "{name}");
    }
}

#[test]
fn t12_eight_of_ten_earn_a_second_burst_and_nine_pass_it() {
    let mut script = Script::new(Config::default(), &[C1]);
    // Ping 0 begins; 1 to 10 are the first burst, 11 to 20 the second.
    script.answer_some(C1, ms(10), |count, _| ![3, 7, 15].contains(&count));
    script.data();
    script.run_to(ms(400));
    assert_eq!(script.status().state, StateName::Probing);
    script.run_to(ms(1200));
    assert_eq!(script.status().state, StateName::Direct);
}

#[test]
fn t12_five_of_ten_block_the_candidate_for_thirty_seconds() {
    let mut script = Script::new(patient(), &[C1]);
    script.answer_some(C1, ms(10), |count, _| count % 2 == 0);
    script.run_with_data(ms(20_000), ms(100));
    let fails = |script: &Script| -> Vec<(u128, FailedTest)> {
        let fail = |(at, event): &(Duration, Event)| Some((at.as_millis(), failed(story(event)?)?));
        script.events.iter().filter_map(fail).collect()
    };
    // The last of the burst leaves at 190 ms and has 200 ms.
    assert_eq!(fails(&script), [(390, FailedTest::Loss)]);
    assert_eq!(script.count(400, 20_000, &ping(C1)), 0);
    script.receive_ping(C1);
    assert_eq!(
        script.times(&Out::Pong(addr(C1))).len(),
        1,
        "still answered"
    );
    script.answer(C1, ms(10));
    script.run_with_data(ms(40_000), ms(100));
    assert_eq!(script.status().state, StateName::Direct);
    let since = states(&script).last().unwrap().0;
    assert!((30_390..36_000).contains(&since), "{since}");
}

#[test]
fn the_ninth_pong_passes_at_once_and_data_goes_both_ways_meanwhile() {
    let mut script = Script::new(Config::default(), &[C1]);
    script.answer(C1, ms(10));
    script.data();
    script.run_to(ms(1000));
    let seen = states(&script);
    let wanted = [
        (0, StateName::Probing, Reason::Data),
        (180, StateName::Direct, Reason::Validated),
    ];
    assert_eq!(seen, wanted);
    let ways: Vec<_> = script
        .decisions
        .iter()
        .map(|(at, d)| (at.as_millis(), d.udp, d.derp, d.trust_until.is_some()))
        .take(3)
        .collect();
    let (udp, derp) = (Some(addr(C1)), Some(REGION));
    let wanted = [
        (0, None, derp, false),
        (10, udp, derp, false),
        (180, udp, derp, true),
    ];
    assert_eq!(ways, wanted);
    assert_eq!(script.sent(10, 11)[0], Out::LargePing(addr(C1), 1312));
}

#[test]
fn a_slow_path_is_measured_against_the_relay() {
    for (rtt, relay, passes) in [(450, 100, true), (600, 100, false), (600, 250, true)] {
        let mut script = Script::new(patient(), &[C1]);
        script.relay_rtt = Some(ms(relay));
        script.answer(C1, ms(rtt));
        script.run_with_data(ms(4000), ms(100));
        assert_eq!(script.times(&Out::RelayPing), [0]);
        let direct = script.status().state == StateName::Direct;
        assert_eq!(direct, passes, "{rtt} ms against {relay} ms by relay");
    }
}

#[test]
fn any_pong_replaces_an_untrusted_best_even_a_slower_one() {
    let mut script = direct(ms(10), &[C1, C2]);
    script.silence(C1);
    script.answer(C2, ms(80));
    script.run_with_data(ms(20_000), ms(100));
    assert_eq!(script.best(), Some(addr(C2)));
    assert_eq!(script.status().state, StateName::Direct);
}

#[test]
fn private_addresses_of_foreign_networks_are_pinged_too_and_impossible_ones_never() {
    let called = [
        "192.168.77.3:1",
        "10.0.0.1:2",
        "[fe80::1]:3",
        "0.0.0.0:4",
        "224.0.0.1:5",
    ];
    let mut script = Script::new(patient(), &[]);
    script.call(&called);
    script.call(&["127.0.0.1:6", "192.168.77.3:0"]);
    let sent = script.sent(0, 1);
    assert_eq!(sent, [Out::RelayPing, ping(called[1]), ping(called[0])]);
}

#[test]
fn a_ping_by_relay_is_answered_there_with_the_fake_address_and_makes_no_candidate() {
    let mut script = Script::new(patient(), &[]);
    let their = script.their_ping();
    script.receive_relayed(&their).unwrap();
    assert_eq!(script.sent(0, 1), [Out::RelayPong(addr("127.3.3.40:7"))]);
    assert!(script.status().candidates.is_empty());
    assert_eq!(script.status().state, StateName::Relay);
}

#[test]
fn own_endpoints_that_change_are_announced_at_once_where_there_is_traffic() {
    let mut script = direct(ms(4), &[C1]);
    script.run_with_data(ms(20_000), ms(500));
    let before = script.times(&Out::CallMeMaybe).len();
    script
        .paths
        .set_own_endpoints(script.now, vec![addr("203.0.113.99:5")]);
    script.run_to(ms(20_001));
    assert_eq!(script.times(&Out::CallMeMaybe).len(), before + 1);
    let mut idle = Script::new(fast(), &[C1]);
    idle.paths
        .set_own_endpoints(idle.now, vec![addr("203.0.113.99:5")]);
    idle.run_to(ms(1000));
    assert_eq!(idle.times(&Out::CallMeMaybe), []);
}

#[test]
fn packets_from_a_new_source_move_a_quiet_path_in_one_round_trip() {
    let mut script = direct(ms(20), &[C1]);
    script.run_with_data(ms(8500), ms(100));
    script.silence(C1);
    script.answer(Z, ms(20));
    script.event(&ringtail_dataplane::Event::NewSource(PEER, addr(Z)));
    assert_eq!(script.sent(8500, 8501), [ping(Z), ping(C1)]);
    script.run_to(ms(8525));
    assert_eq!(script.best(), Some(addr(Z)));
    // The other way round: the best address answers, so packets from elsewhere move nothing.
    let mut stays = direct(ms(20), &[C1]);
    stays.run_with_data(ms(8500), ms(100));
    stays.answer(Z, ms(30));
    stays.event(&ringtail_dataplane::Event::NewSource(PEER, addr(Z)));
    stays.run_to(ms(8600));
    assert_eq!(stays.best(), Some(addr(C1)));
}

#[test]
fn send_errors_take_a_path_away_or_ask_for_new_sockets() {
    const ENETUNREACH: i32 = 101;
    const EPERM: i32 = 1;
    let mut script = direct(ms(10), &[C1]);
    script.event(&ringtail_dataplane::Event::SendError(
        PEER,
        addr(C1),
        ENETUNREACH,
    ));
    assert_eq!(script.best(), None);
    let mut forbidden = direct(ms(10), &[C1]);
    for _ in 0..3 {
        forbidden.event(&ringtail_dataplane::Event::SendError(PEER, addr(C1), EPERM));
    }
    assert_eq!(forbidden.best(), Some(addr(C1)));
    let wanted = |script: &Script| {
        script
            .events
            .iter()
            .filter(|(_, event)| *event == Event::RebindWanted)
            .count()
    };
    assert_eq!(wanted(&forbidden), 1);
    // What fails on the way to another peer says nothing of this one, although it is at the same
    // address.
    let mut shared = direct(ms(10), &[C1]);
    let other = twin(&shared);
    shared.set_peers(std::slice::from_ref(&other));
    for (id, best) in [(other.id, Some(addr(C1))), (PEER, None)] {
        let now = shared.now;
        shared
            .paths
            .handle_send_error(now, id, addr(C1), ENETUNREACH);
        assert_eq!(shared.best(), best);
    }
}

#[test]
fn a_major_link_change_starts_anew_at_once() {
    let mut script = direct(ms(10), &[C1]);
    script.run_with_data(ms(2000), ms(100));
    script
        .paths
        .handle_link_change(script.now, LinkChange::Major);
    script.run_to(ms(2001));
    assert_eq!(script.best(), None);
    assert!(script.sent(2000, 2001).contains(&ping(C1)));
    let wanted = Event::RestunWanted(RestunReason::LinkChange);
    assert!(script.events.iter().any(|(_, event)| *event == wanted));
}

#[test]
fn a_user_ping_says_the_way_of_its_answer() {
    let reply = |script: &Script| {
        script.events.iter().find_map(|(_, event)| match event {
            Event::PingReply { route, rtt, .. } => Some((*route, *rtt)),
            Event::PingTimeout { .. }
            | Event::Story { .. }
            | Event::RestunWanted(_)
            | Event::RebindWanted
            | Event::Reported { .. } => None,
        })
    };
    let mut script = direct(ms(10), &[C1]);
    let id = script.paths.ping(script.now, PEER).unwrap();
    script.run_to(ms(30));
    assert_eq!(reply(&script), Some((Route::Direct(addr(C1)), ms(10))));
    assert!(script.paths.ping(script.now, PeerId(9)).is_none());

    let mut silent = Script::new(fast(), &[C1]);
    let other = silent.paths.ping(silent.now, PEER).unwrap();
    silent.run_to(ms(5000));
    let timeouts = silent.events.iter().filter(|(_, event)| {
        *event
            == Event::PingTimeout {
                id: other,
                peer: PEER,
            }
    });
    assert_eq!((timeouts.count(), id), (1, other));
}

#[test]
fn rates_bound_what_we_send_and_answer() {
    let many: Vec<String> = (1..=64).map(|n| format!("198.51.100.{n}:1")).collect();
    let texts: Vec<&str> = many.iter().map(String::as_str).collect();
    let mut script = Script::new(patient(), &texts);
    script.run_with_data(ms(10_000), ms(100));
    for second in 0..10 {
        let pings = script
            .sent(second * 1000, second * 1000 + 1000)
            .into_iter()
            .filter(|out| matches!(out, Out::Ping(_)))
            .count();
        assert!(pings <= 100, "second {second}: {pings}");
    }
    let all: usize = texts
        .iter()
        .filter(|text| !script.times(&ping(text)).is_empty())
        .count();
    assert_eq!(all, 64, "every candidate has its turn");
    let mut answered = 0;
    for n in 0..200u8 {
        let tx_id = [n; 12];
        let message = Message::Ping {
            tx_id,
            node_key: None,
            padding: 0,
        };
        match script.receive(addr(Z), &message) {
            Ok(()) => answered += 1,
            Err(drop) => assert_eq!(drop, Drop::PongRate),
        }
    }
    assert_eq!(answered, 100);
}
