//! One timeline per rule of the WireGuard paper's sections 5 and 6. The clock is jumped to where
//! the session wants to be called.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use rand::Rng;

use super::state::SessionState;
use super::*;
use crate::noise::{self, Gate, Standing, Verdict};

/// What a session said by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Initiation,
    Keepalive,
    /// It has no keys any more, or gave up.
    Down,
}

/// Lets time pass from one moment to another and lists what was said when, in seconds.
fn pass(end: &mut End, from: f64, until: f64) -> Vec<(f64, Said)> {
    let mut said = Vec::new();
    let mut now = secs(from);
    while let Some(next) = end.session.poll_timeout()
        && next <= secs(until).now
    {
        let offset = next.max(now.now) - *START;
        now = at(offset);
        let (outcome, message) = end.step(now);
        let seconds = offset.as_secs_f64();
        if let Some(message) = message {
            assert_eq!(outcome.handshake, message[0] == 1);
            said.push((
                seconds,
                match (message[0], message.len()) {
                    (1, 148) => Said::Initiation,
                    (4, KEEPALIVE_LEN) => Said::Keepalive,
                    other => panic!("{other:?}"),
                },
            ));
        }
        assert_ne!(outcome.change, Change::Up);
        if outcome.change == Change::Down {
            said.push((seconds, Said::Down));
        }
    }
    said
}

fn times(said: &[(f64, Said)], what: Said) -> Vec<f64> {
    let of_kind = said.iter().filter(|(_, said)| *said == what);
    of_kind.map(|(at, _)| *at).collect()
}

/// Nothing of that kind is said between these moments.
#[track_caller]
fn assert_silent(what: Said, end: &mut End, from: f64, until: f64) {
    assert_eq!(times(&pass(end, from, until), what), [0.0; 0]);
}

/// There are no keys to seal with any more, or yet.
#[track_caller]
fn assert_expired(end: &mut End, seconds: f64) {
    let refused = end.try_seal(secs(seconds), &ipv4(50)).unwrap_err();
    assert_eq!(refused, DropReason::SessionExpired);
}

#[track_caller]
fn assert_near(got: f64, from: f64, to: f64) {
    assert!(
        got >= from - 1e-6 && got <= to + 1e-6,
        "{got} in {from}..={to}"
    );
}

/// The answer of `b` to an initiation of `a`.
fn answered(at: Moment, a: &mut End, b: &mut End) -> Vec<u8> {
    let initiation = a.initiate(at);
    b.handshake(at, &initiation).unwrap().1
}

/// Carries one packet from `a` to `b`.
fn carry(seconds: f64, a: &mut End, b: &mut End) {
    let packet = ipv4(100);
    let datagram = a.seal(secs(seconds), &packet);
    assert_eq!(b.open(secs(seconds), &[&datagram]).packets, [packet]);
}

#[test]
fn an_initiation_is_repeated_after_five_seconds_and_jitter_for_ninety_seconds() {
    let (mut a, _) = pair(OURS);
    assert_eq!(a.session.poll_timeout(), None, "an idle session sleeps");
    let first = a.initiate(secs(0.0));
    let said = pass(&mut a, 0.0, 1000.0);
    let initiations = times(&said, Said::Initiation);
    assert_eq!(initiations.len(), 17);
    let mut last = 0.0;
    let mut gaps = Vec::new();
    for at in initiations {
        assert_near(at - last, 5.0, 5.334);
        gaps.push(((at - last) * 1000.0).round().to_string());
        last = at;
    }
    gaps.dedup();
    assert!(gaps.len() > 5, "jitter: {gaps:?}");
    let (down, what) = said[said.len() - 1];
    assert_eq!(what, Said::Down);
    assert_near(down, 90.0, 90.0 + 5.334);
    assert!(!a.session.initiating());
    assert_eq!(a.session.poll_timeout(), None, "and sleeps again");
    assert_eq!(a.engine.own.indexes.len(), 0, "its index is free");
    let again = a.initiate(secs(1000.0));
    assert_ne!(
        first[4..40],
        again[4..40],
        "another index, another ephemeral key"
    );
}

#[test]
fn new_data_begins_the_ninety_seconds_anew() {
    let (mut a, _) = pair(OURS);
    a.initiate(secs(0.0));
    assert_silent(Said::Down, &mut a, 0.0, 60.0);
    // A packet that waits asks again; none is sent sooner for it.
    assert_eq!(a.try_initiate(secs(60.0), false), None);
    let said = pass(&mut a, 60.0, 1000.0);
    assert_near(times(&said, Said::Down)[0], 150.0, 156.0);
}

#[test]
fn an_initiation_for_what_cannot_be_opened_is_made_once() {
    let (mut a, mut b) = pair(OURS);
    let first = a.initiate_once(secs(0.0));
    assert!(first.is_some());
    assert_eq!(a.initiate_once(secs(1.0)), None, "it is outstanding");
    assert_eq!(pass(&mut a, 0.0, 1000.0), [], "not repeated, and no news");
    assert!(!a.session.initiating());
    assert_eq!(a.engine.own.indexes.len(), 0, "its index is free");

    // Data meanwhile makes an attempt of it.
    assert!(a.initiate_once(secs(1000.0)).is_some());
    assert_eq!(a.try_initiate(secs(1001.0), false), None);
    let said = pass(&mut a, 1001.0, 2000.0);
    assert_near(times(&said, Said::Initiation)[0], 1005.0, 1005.334);
    assert_near(times(&said, Said::Down)[0], 1091.0, 1097.0);

    let initiation = a.initiate_once(secs(3000.0)).unwrap();
    let (_, response) = b.handshake(secs(3000.0), &initiation).unwrap();
    let (outcome, _) = a.handshake(secs(3000.0), &response).unwrap();
    assert_eq!(outcome.change, Change::Up);
    assert_eq!(a.initiate_once(secs(3004.9)), None, "five seconds apart");
    assert!(a.initiate_once(secs(3005.0)).is_some());
}

#[test]
fn a_persistent_keepalive_tries_without_end() {
    let mut a = end(OURS, 1, &peer_config(2, Some(25)));
    let said = pass(&mut a, 0.0, 3600.0);
    let initiations = times(&said, Said::Initiation);
    assert_near(initiations[0], 0.0, 0.0);
    let gaps: Vec<f64> = initiations.windows(2).map(|two| two[1] - two[0]).collect();
    // It begins anew one interval after each attempt's last initiation.
    assert!(
        gaps.iter().all(|gap| *gap <= 25.0),
        "an hour of it: {gaps:?}"
    );
    let attempts = gaps.iter().filter(|gap| **gap > 5.4).count();
    assert!((28..36).contains(&attempts), "{attempts}");
    assert_near(
        times(&said, Said::Down).len() as f64,
        attempts as f64,
        attempts as f64 + 1.0,
    );
}

#[test]
fn the_initiator_that_sends_rekeys_after_two_minutes_and_the_responder_does_not() {
    let (mut a, mut b) = joined(OURS);
    for seconds in [1.0, 60.0, 119.9] {
        carry(seconds, &mut a, &mut b);
        carry(seconds, &mut b, &mut a);
    }
    assert_silent(Said::Initiation, &mut a, 119.9, 119.99);
    carry(120.0, &mut b, &mut a);
    carry(120.0, &mut a, &mut b);
    carry(121.0, &mut b, &mut a);
    let said = pass(&mut a, 120.0, 124.9);
    assert_near(times(&said, Said::Initiation)[0], 120.0, 120.0);
    assert_eq!(said.len(), 1, "{said:?}");
    assert_silent(Said::Initiation, &mut b, 120.0, 123.9);
    // Unanswered it is repeated; an initiator that is idle would not have begun.
    assert_near(
        times(&pass(&mut a, 124.9, 131.0), Said::Initiation)[0],
        125.0,
        125.334,
    );
    let (mut idle, _) = joined(OURS);
    assert_eq!(pass(&mut idle, 0.0, 1000.0), [(180.0, Said::Down)]);
}

#[test]
fn a_keepalive_after_two_minutes_rekeys_too() {
    let mut a = end(OURS, 1, &peer_config(2, Some(25)));
    let mut b = end(OURS, 2, &peer_config(1, None));
    shake(secs(0.0), &mut a, &mut b);
    let said = pass(&mut a, 0.0, 126.0);
    assert_eq!(
        times(&said, Said::Keepalive),
        [25.0, 50.0, 75.0, 100.0, 125.0]
    );
    assert_eq!(times(&said, Said::Initiation), [125.0]);
}

#[test]
fn the_initiator_that_receives_rekeys_after_165_seconds_once() {
    let (mut a, mut b) = joined(OURS);
    // Nothing was sent for two minutes: that would ask for new keys as well.
    carry(164.9, &mut b, &mut a);
    assert_silent(Said::Initiation, &mut a, 0.0, 164.95);
    carry(165.0, &mut b, &mut a);
    let said = pass(&mut a, 165.0, 165.0);
    assert_eq!(times(&said, Said::Initiation), [165.0]);
    // Without an answer the retries go on; more data does not ask for more.
    carry(166.0, &mut b, &mut a);
    assert_eq!(pass(&mut a, 166.0, 169.9), []);
    let (mut c, mut d) = joined(OURS);
    carry(170.0, &mut c, &mut d);
    assert_silent(Said::Initiation, &mut d, 170.0, 170.0);
}

#[test]
fn keys_are_not_used_after_three_minutes() {
    let (mut a, mut b) = joined(OURS);
    carry(179.9, &mut a, &mut b);
    let late = a.seal(secs(179.9), &ipv4(50));
    assert!(a.ready(secs(179.9)) && !a.ready(secs(180.0)));
    assert_expired(&mut a, 180.0);
    let got = b.open(secs(180.0), &[&late]);
    assert_eq!(got.dropped, [DropReason::SessionExpired]);
    assert_eq!(times(&pass(&mut b, 179.9, 200.0), Said::Down), [180.0]);
}

/// Puts the sealing counter of the current keypair to a value.
fn set_counter(end: &mut End, next: u64) {
    let current = end.machine().keys.current.as_ref().unwrap();
    let now = current.sealing.next_counter();
    end.use_up(next - now);
}

#[test]
fn after_two_to_the_sixty_messages_whoever_sends_rekeys() {
    for initiator in [true, false] {
        let (mut a, mut b) = joined(OURS);
        let (sender, receiver) = if initiator {
            (&mut a, &mut b)
        } else {
            (&mut b, &mut a)
        };
        set_counter(sender, REKEY_AFTER_MESSAGES - 2);
        carry(10.0, sender, receiver);
        assert_eq!(pass(sender, 10.0, 11.0), []);
        carry(11.0, sender, receiver);
        assert_eq!(pass(sender, 11.0, 12.0), [(11.0, Said::Initiation)]);
    }
}

#[test]
fn the_last_counter_is_below_reject_after_messages() {
    let (mut a, mut b) = joined(OURS);
    set_counter(&mut a, REJECT_AFTER_MESSAGES - 1);
    carry(10.0, &mut a, &mut b);
    assert!(!a.ready(secs(10.0)));
    assert_expired(&mut a, 10.0);
    assert_eq!(pass(&mut a, 10.0, 11.0), [(10.0, Said::Initiation)]);
}

#[test]
fn data_that_is_not_answered_for_ten_seconds_is_answered_by_a_keepalive() {
    let (mut a, mut b) = joined(OURS);
    carry(1.0, &mut a, &mut b);
    assert_eq!(pass(&mut b, 1.0, 100.0), [(11.0, Said::Keepalive)]);
    // What is sent in time makes it needless, and a keep-alive asks for none.
    let (mut a, mut b) = joined(OURS);
    carry(1.0, &mut a, &mut b);
    carry(5.0, &mut b, &mut a);
    assert_eq!(pass(&mut b, 5.0, 14.9), []);
    let keepalive = pass(&mut a, 5.0, 16.0);
    assert_eq!(keepalive, [(15.0, Said::Keepalive)]);
    // A keep-alive that arrives is not answered.
    let (mut a, mut b) = joined(OURS);
    carry(1.0, &mut a, &mut b);
    let (_, keepalive) = b.step(secs(11.0));
    assert_eq!(
        a.open(secs(11.0), &[&keepalive.unwrap()]).report.datagrams,
        1
    );
    assert_eq!(pass(&mut a, 11.0, 100.0), []);
}

#[test]
fn data_that_goes_on_is_answered_by_a_keepalive_every_ten_seconds() {
    let (mut a, mut b) = joined(OURS);
    let mut said = Vec::new();
    for tenth in 10..350 {
        let seconds = f64::from(tenth) / 10.0;
        carry(seconds, &mut a, &mut b);
        said.extend(pass(&mut b, seconds, seconds + 0.09));
    }
    assert_eq!(said, [11.0, 21.0, 31.0].map(|at| (at, Said::Keepalive)));
}

#[test]
fn a_persistent_keepalive_is_sent_when_nothing_else_was() {
    let mut a = end(OURS, 1, &peer_config(2, None));
    let mut b = end(OURS, 2, &peer_config(1, None));
    shake(secs(0.0), &mut a, &mut b);
    let mut kept = peer_config(2, Some(20));
    let plain = peer_config(2, None);
    assert!(a.session.reconfigure(secs(1.0).now, &plain, &kept));
    assert_eq!(
        pass(&mut a, 1.0, 45.0),
        [1.0, 21.0, 41.0].map(|at| (at, Said::Keepalive)),
        "at once, then by the interval"
    );
    // Anything authentic puts it off, either way.
    let datagram = b.seal(secs(50.0), &ipv4(40));
    assert_eq!(a.open(secs(50.0), &[&datagram]).packets.len(), 1);
    let said = pass(&mut a, 50.0, 81.0);
    assert_eq!(
        times(&said, Said::Keepalive),
        [60.0, 80.0],
        "a passive one, and the interval after it"
    );
    kept.persistent_keepalive = Some(0);
    assert!(a.session.reconfigure(secs(81.0).now, &plain, &kept));
    assert_silent(Said::Keepalive, &mut a, 81.0, 115.0);
}

#[test]
fn data_that_gets_no_answer_makes_a_handshake() {
    // Fresh keys: after the paper's fifteen seconds, of which QUIET_LIMIT is a part.
    let (mut a, _) = joined(OURS);
    a.seal(secs(0.0), &ipv4(40));
    let said = pass(&mut a, 0.0, 19.0);
    assert_near(times(&said, Said::Initiation)[0], 15.0, 15.334);
    // Older ones: after QUIET_LIMIT, counted from the first packet.
    let (mut a, mut b) = joined(OURS);
    for tenth in 0..29 {
        a.seal(secs(30.0 + f64::from(tenth) / 10.0), &ipv4(40));
    }
    let said = pass(&mut a, 32.8, 37.0);
    assert_near(times(&said, Said::Initiation)[0], 33.0, 33.0);
    // An answer of any kind ends the wait.
    let (mut a2, mut b2) = joined(OURS);
    carry(30.0, &mut a2, &mut b2);
    carry(32.0, &mut b2, &mut a2);
    assert_silent(Said::Initiation, &mut a2, 32.0, 100.0);
    // A handshake too.
    carry(40.0, &mut a, &mut b);
    let initiation = b.initiate(secs(41.0));
    a.handshake(secs(41.0), &initiation).unwrap();
    a.machine().initiated.take();
    a.machine().alarms.clear(timers::Alarm::Retransmit);
    assert_silent(Said::Initiation, &mut a, 41.0, 60.0);
}

#[test]
fn keys_are_erased_after_nine_minutes_without_new_ones() {
    let (mut a, mut b) = joined(OURS);
    carry(1.0, &mut a, &mut b);
    assert_eq!(a.engine.own.indexes.len(), 1);
    pass(&mut a, 1.0, 539.9);
    assert!(a.machine().keys.current.is_some());
    pass(&mut a, 539.9, 540.0);
    assert!(a.machine().keys.is_empty());
    assert_eq!(a.engine.own.indexes.len(), 0);
    assert_eq!(a.session.poll_timeout(), None);
    // New keys put it off.
    let (mut a, mut b) = joined(OURS);
    shake(secs(100.0), &mut b, &mut a);
    pass(&mut a, 100.0, 639.0);
    assert!(!a.machine().keys.is_empty());
    pass(&mut a, 639.0, 640.0);
    assert!(a.machine().keys.is_empty());
}

#[test]
fn the_responder_does_not_seal_before_the_initiator_has() {
    let (mut a, mut b) = pair(OURS);
    let response = answered(secs(0.0), &mut a, &mut b);
    assert!(!b.ready(secs(0.0)));
    assert_expired(&mut b, 0.0);
    let (_, keepalive) = a.handshake(secs(0.0), &response).unwrap();
    b.open(secs(0.0), &[&keepalive]);
    // With keys from before it goes on with those.
    let response = answered(secs(20.0), &mut a, &mut b);
    let old = b.seal(secs(20.0), &ipv4(40));
    let (_, keepalive) = a.handshake(secs(20.0), &response).unwrap();
    assert_eq!(a.open(secs(20.0), &[&old]).packets.len(), 1);
    assert_eq!(b.open(secs(20.0), &[&keepalive]).report.change, Change::Up);
    let new = b.seal(secs(20.0), &ipv4(40));
    assert_ne!(old[4..8], new[4..8]);
}

#[test]
fn a_bad_message_does_not_confirm_the_next_keys() {
    let (mut a, mut b) = pair(OURS);
    let response = answered(secs(0.0), &mut a, &mut b);
    let (_, mut keepalive) = a.handshake(secs(0.0), &response).unwrap();
    keepalive[31] ^= 1;
    let got = b.open(secs(0.0), &[&keepalive]);
    assert_eq!(got.report, OpenReport::default());
    assert_eq!(got.dropped, [DropReason::OpenFailed]);
    assert!(!b.ready(secs(0.0)));
}

/// Some of what a generator gives as long as it is not replaced.
fn stream(mut rng: StdRng) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// True if the ephemeral key of the outstanding initiation is in there.
fn ephemeral_is_in(end: &mut End, stream: &[u8]) -> bool {
    let state = end.machine().initiated.as_ref().unwrap().export();
    // Behind the index and MAC1.
    let ephemeral = &state[20..52];
    stream.windows(32).any(|bytes| bytes == ephemeral)
}

#[test]
fn the_generator_does_not_keep_the_ephemeral_keys_it_gave() {
    let (mut a, mut b) = pair(OURS);
    let [of_a, of_b] = [1, 2].map(|own| stream(rng(own)));
    let initiation = a.initiate(secs(0.0));
    assert!(ephemeral_is_in(&mut a, &of_a), "the first of them");
    a.initiate(secs(1.0));
    assert!(!ephemeral_is_in(&mut a, &of_a));
    // An answer takes one too.
    b.handshake(secs(1.0), &initiation).unwrap();
    b.initiate(secs(7.0));
    assert!(!ephemeral_is_in(&mut b, &of_b));
}

#[test]
fn an_initiation_that_is_not_newer_is_a_replay() {
    let (mut a, mut b) = pair(OURS);
    let first = a.initiate(secs(0.0));
    let second = a.initiate(secs(1.0));
    b.handshake(secs(1.0), &second).unwrap();
    for old in [&second, &first] {
        assert_eq!(
            b.handshake(secs(2.0), old).unwrap_err(),
            DropReason::HandshakeReplayed
        );
    }
    // Not even after the keys are erased.
    pass(&mut b, 2.0, 2000.0);
    assert_eq!(
        b.handshake(secs(2000.0), &first).unwrap_err(),
        DropReason::HandshakeReplayed
    );
    // A clock that was set back does not keep us from making newer ones.
    let mut back = secs(2001.0);
    back.wall = Duration::from_secs(1000);
    let third = a.initiate(back);
    b.handshake(secs(2001.0), &third).unwrap();
}

#[test]
fn initiations_less_than_twenty_milliseconds_apart_are_not_answered() {
    let (mut a, mut b) = pair(OURS);
    let messages = [0.0, 1.0, 2.0].map(|seconds| a.initiate(secs(seconds)));
    assert!(b.handshake(secs(3.0), &messages[0]).is_ok());
    assert_eq!(
        b.handshake(secs(3.0199), &messages[1]).unwrap_err(),
        DropReason::HandshakeTooSoon
    );
    assert!(
        b.handshake(secs(3.02), &messages[1]).is_ok(),
        "it was not used up"
    );
    assert!(b.handshake(secs(3.05), &messages[2]).is_ok());
}

#[test]
fn no_initiation_follows_a_handshake_message_within_five_seconds() {
    let (mut a, mut b) = pair(OURS);
    let initiation = a.initiate(secs(0.0));
    b.handshake(secs(1.0), &initiation).unwrap();
    // `b` has data, but `a` will complete its handshake any moment; if not, `b` begins.
    assert_eq!(b.try_initiate(secs(2.0), false), None);
    assert_eq!(pass(&mut b, 2.0, 6.5), [(6.0, Said::Initiation)]);
    // A handshake that completes in between makes it needless.
    let (mut a, mut b) = pair(OURS);
    let initiation = a.initiate(secs(0.0));
    let (_, response) = b.handshake(secs(1.0), &initiation).unwrap();
    assert_eq!(b.try_initiate(secs(2.0), false), None);
    let (_, keepalive) = a.handshake(secs(2.5), &response).unwrap();
    b.open(secs(3.0), &[&keepalive]);
    assert_eq!(pass(&mut b, 3.0, 100.0), []);
}

fn from() -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], 7))
}

/// The gate of the end with the private key 2.
fn gate() -> Gate {
    let local = Arc::new(LocalKeys::new(&private(2)));
    Gate::new(secs(0.0).now, Some(local), &mut rng(4))
}

/// The cookie reply that a gate makes once a message has come too often.
fn challenge(gate: &mut Gate, at: Moment, message: &[u8]) -> [u8; 64] {
    let (mut rng, mut reply) = (rng(5), [0; 64]);
    let challenged = (0..2000).find_map(|_| {
        let verdict = gate.handle(at.now, from(), Standing::Stranger, message, &mut rng);
        if let Verdict::Unproven(novelty) = verdict {
            Some(novelty)
        } else {
            None
        }
    });
    let novelty = challenged.expect("too many");
    gate.challenge(at.now, from(), novelty, message, &mut rng, &mut reply)
        .unwrap();
    reply
}

#[test]
fn a_cookie_goes_into_the_next_message_for_two_minutes() {
    let (mut a, b) = pair(OURS);
    let mut gate = gate();
    let initiation = a.initiate(secs(0.0));
    assert_eq!(initiation[132..], [0; 16], "no cookie yet");
    let reply = challenge(&mut gate, secs(0.0), &initiation);
    let mut forged = reply;
    forged[40] ^= 1;
    assert!(a.handshake(secs(0.1), &forged).is_err());
    let (outcome, _) = a.handshake(secs(0.1), &reply).unwrap();
    assert_eq!(outcome, Outcome::default(), "it is not used at once");
    assert!(
        a.handshake(secs(0.1), &reply).is_err(),
        "one message, one cookie"
    );
    let (outcome, retry) = a.step(secs(5.4));
    assert!(outcome.handshake);
    let retry = retry.unwrap();
    assert_ne!(retry[132..], [0; 16]);
    let passed = gate.handle(
        secs(5.4).now,
        from(),
        Standing::Stranger,
        &retry,
        &mut rng(6),
    );
    assert!(matches!(passed, Verdict::Initiation(_)), "{passed:?}");
    assert_ne!(a.initiate(secs(119.0))[132..], [0; 16]);
    assert_eq!(a.initiate(secs(120.1))[132..], [0; 16], "too old");
    drop(b);
}

#[test]
fn a_peer_with_a_key_of_low_order_is_never_spoken_to() {
    let mut config = peer_config(2, Some(25));
    config.public_key = [0; 32];
    let mut a = end(OURS, 1, &config);
    assert_eq!(a.try_initiate(secs(0.0), true), None);
    assert_eq!(pass(&mut a, 0.0, 300.0), []);
    assert_eq!(a.engine.own.indexes.len(), 0);
}

#[test]
fn without_the_same_preshared_key_there_is_no_session_and_a_new_one_counts_from_the_next() {
    let (mut a, mut b) = joined(OURS);
    let old = peer_config(2, None);
    let mut new = peer_config(2, None);
    new.preshared_key = Some(Zeroizing::new([8; 32]));
    assert!(a.session.reconfigure(secs(1.0).now, &old, &new));
    carry(1.0, &mut a, &mut b);
    let response = answered(secs(6.0), &mut a, &mut b);
    assert_eq!(
        a.handshake(secs(6.0), &response).unwrap_err(),
        DropReason::HandshakeInvalid
    );
    carry(7.0, &mut a, &mut b);
    assert_eq!(
        DropReason::from(noise::Error::Authentication),
        DropReason::HandshakeInvalid
    );
}

#[test]
fn crossing_rekeys_lose_nothing_that_is_under_way() {
    let (mut a, mut b) = joined(OURS);
    // Sealed under the first keys and late.
    let late = [a.seal(secs(10.0), &ipv4(50)), b.seal(secs(10.0), &ipv4(50))];
    let now = secs(10.0);
    let [of_a, of_b] = cross(now, &mut a, &mut b);
    a.handshake(now, &of_b).unwrap();
    b.handshake(now, &of_a).unwrap();
    assert_eq!(b.open(now, &[&late[0]]).packets.len(), 1);
    assert_eq!(a.open(now, &[&late[1]]).packets.len(), 1);
    carry(10.0, &mut a, &mut b);
    carry(10.0, &mut b, &mut a);
    assert_eq!(a.engine.own.indexes.len(), 3);
}

#[test]
fn rekeys_that_cross_again_lose_nothing_that_is_sealed_before_the_answers() {
    let (mut a, mut b) = pair(OURS);
    let [of_a, of_b] = cross(secs(0.0), &mut a, &mut b);
    let (_, from_a) = a.handshake(secs(0.0), &of_b).unwrap();
    let (_, from_b) = b.handshake(secs(0.0), &of_a).unwrap();
    a.open(secs(0.0), &[&from_b]);
    b.open(secs(0.0), &[&from_a]);
    // Each began what it seals with, so both ask for new keys.
    carry(120.0, &mut a, &mut b);
    carry(120.0, &mut b, &mut a);
    let [from_a, from_b] = [&mut a, &mut b].map(|end| end.step(secs(120.0)).1.unwrap());
    let (_, of_a) = a.handshake(secs(120.02), &from_b).unwrap();
    let (_, of_b) = b.handshake(secs(120.02), &from_a).unwrap();
    let late = [&mut a, &mut b].map(|end| end.seal(secs(120.03), &ipv4(50)));
    a.handshake(secs(120.04), &of_b).unwrap();
    b.handshake(secs(120.04), &of_a).unwrap();
    assert_eq!(a.open(secs(120.05), &[&late[1]]).packets.len(), 1);
    assert_eq!(b.open(secs(120.05), &[&late[0]]).packets.len(), 1);
    // Nor do more and more keys stay, or any beyond their time.
    assert_eq!(a.engine.own.indexes.len(), 4);
    pass(&mut a, 120.05, 660.1);
    assert!(a.machine().keys.is_empty());
    assert_eq!(a.engine.own.indexes.len(), 0);
}

#[test]
fn a_plain_rekey_after_crossing_ones_loses_nothing_that_is_sealed_before_it_completes() {
    let (mut a, mut b) = joined(OURS);
    let now = secs(10.0);
    let [of_a, of_b] = cross(now, &mut a, &mut b);
    let (_, from_a) = a.handshake(now, &of_b).unwrap();
    let (_, from_b) = b.handshake(now, &of_a).unwrap();
    a.open(now, &[&from_b]);
    b.open(now, &[&from_a]);
    let initiation = a.initiate(secs(130.0));
    let (_, response) = b.handshake(secs(130.02), &initiation).unwrap();
    a.handshake(secs(130.04), &response).unwrap();
    let late = b.seal(secs(130.05), &ipv4(50));
    assert_eq!(a.open(secs(130.07), &[&late]).packets.len(), 1);
}

/// Takes an end's session out of it.
fn export(end: &mut End, config: &PeerConfig, at: Moment) -> SessionState {
    let empty = end.engine.session(at.now, config);
    let session = std::mem::replace(&mut end.session, empty);
    end.engine.export(at.now, session).unwrap()
}

/// Moves the session of the end with the private key `own` to another process.
fn move_on(end: &mut End, own: u8, config: &PeerConfig, at: Moment) {
    let state = export(end, config, at);
    let mut heir = self::end(OURS, own, config);
    heir.session = heir.engine.import(at.now, config, &state).unwrap();
    *end = heir;
}

#[test]
fn an_exported_session_goes_on_elsewhere() {
    let (mut a, mut b) = joined(OURS);
    carry(1.0, &mut a, &mut b);
    let in_flight = b.seal(secs(2.0), &ipv4(60));
    let seen = b.seal(secs(2.0), &ipv4(61));
    assert_eq!(a.open(secs(2.0), &[&seen]).packets.len(), 1);
    // An initiation is outstanding too.
    let response = answered(secs(2.0), &mut a, &mut b);
    let deadlines = a.session.poll_timeout();

    let now = secs(3.0);
    let config = peer_config(2, None);
    let state = export(&mut a, &config, now);
    assert_eq!(a.engine.own.indexes.len(), 0, "nothing is left behind");
    let mut heir = end(OURS, 1, &config);
    heir.session = heir.engine.import(now.now, &config, &state).unwrap();
    assert!(
        heir.engine.import(now.now, &config, &state).is_none(),
        "its indexes are in use"
    );
    assert_eq!(heir.session.poll_timeout(), deadlines);

    assert_eq!(heir.open(now, &[&seen]).dropped, [DropReason::Replayed]);
    assert_eq!(heir.open(now, &[&in_flight]).packets.len(), 1);
    let datagram = heir.seal(now, &ipv4(70));
    assert_eq!(b.open(now, &[&datagram]).packets.len(), 1, "counters go on");
    let (outcome, keepalive) = heir.handshake(now, &response).unwrap();
    assert_eq!(outcome.change, Change::Up);
    assert_eq!(b.open(now, &[&keepalive]).report.change, Change::Up);
    carry(3.0, &mut heir, &mut b);
}

#[test]
fn all_keys_of_an_exported_session_keep_their_parts() {
    let (mut a, mut b) = pair(OURS);
    let late = [0.0, 20.0, 40.0, 60.0].map(|seconds| {
        shake(secs(seconds), &mut a, &mut b);
        [(); 2].map(|()| a.seal(secs(seconds), &ipv4(50)))
    });
    let response = answered(secs(80.0), &mut a, &mut b);
    let (_, keepalive) = a.handshake(secs(80.0), &response).unwrap();
    move_on(&mut b, 2, &peer_config(1, None), secs(80.0));
    assert_eq!(b.engine.own.indexes.len(), 5);
    for [first, _] in &late {
        assert_eq!(b.open(secs(81.0), &[first]).packets.len(), 1);
    }
    let index = u32::from_le_bytes(*late[3][0][4..].first_chunk().unwrap());
    let current = b.machine().keys.current.as_ref().unwrap();
    assert_eq!(current.local_index, index, "not the next one yet");
    assert_eq!(b.open(secs(81.0), &[&keepalive]).report.change, Change::Up);
    // The oldest has gone for it, and no other.
    let [oldest, younger @ ..] = &late;
    let dropped = b.open(secs(81.0), &[&oldest[1]]).dropped;
    assert_eq!(dropped, [DropReason::UnknownIndex]);
    for [_, second] in younger {
        assert_eq!(b.open(secs(81.0), &[second]).packets.len(), 1);
    }
    carry(81.0, &mut b, &mut a);
}

#[test]
fn an_exported_session_knows_replays_and_takes_and_gives_cookies() {
    let (mut a, mut b) = pair(OURS);
    let (of_a, of_b) = (peer_config(2, None), peer_config(1, None));
    let first = a.initiate(secs(0.0));
    let second = a.initiate(secs(1.0));
    b.handshake(secs(3.0), &first).unwrap();
    move_on(&mut b, 2, &of_b, secs(3.01));
    let mut refusal = |seconds, message: &[u8]| b.handshake(secs(seconds), message).err();
    assert_eq!(refusal(3.0199, &second), Some(DropReason::HandshakeTooSoon));
    assert_eq!(refusal(4.0, &first), Some(DropReason::HandshakeReplayed));
    // The reply to a message that was sent before, and the cookie from before.
    let mut gate = gate();
    let reply = challenge(&mut gate, secs(4.0), &second);
    move_on(&mut a, 1, &of_a, secs(4.0));
    a.handshake(secs(4.0), &reply).unwrap();
    move_on(&mut a, 1, &of_a, secs(5.0));
    // A clock that was set back.
    let mut back = secs(6.0);
    back.wall = Duration::from_secs(1000);
    let third = a.initiate(back);
    assert_ne!(third[132..], [0; 16]);
    assert_eq!(refusal(6.0, &second), None);
    assert_eq!(refusal(7.0, &third), None, "newer than the second");
    move_on(&mut a, 1, &of_a, secs(123.9));
    assert_ne!(a.initiate(secs(123.95))[132..], [0; 16]);
    assert_eq!(a.initiate(secs(124.1))[132..], [0; 16], "too old");
}

#[test]
fn a_key_of_an_age_that_no_instant_has_is_not_imported_as_a_younger_one() {
    let (mut a, _) = joined(OURS);
    let (config, now) = (peer_config(2, None), secs(1.0));
    let mut state = export(&mut a, &config, now);
    state.keypairs[0].age = Duration::MAX;
    assert!(a.engine.import(now.now, &config, &state).is_none());
    assert_eq!(a.engine.own.indexes.len(), 0);
    state.keypairs[0].age = Duration::from_secs(1);
    state.answered = Some(Duration::MAX);
    a.session = a.engine.import(now.now, &config, &state).unwrap();
    assert_eq!(a.machine().answered, None);
}

#[test]
fn what_is_exported_is_imported_to_the_last_bit() {
    let config = peer_config(2, Some(25));
    let mut a = end(OURS, 1, &config);
    let mut b = end(OURS, 2, &peer_config(1, None));
    for seconds in [0.0, 10.0, 20.0, 30.0] {
        shake(secs(seconds), &mut a, &mut b);
        carry(seconds, &mut a, &mut b);
        carry(seconds, &mut b, &mut a);
    }
    carry(31.0, &mut b, &mut a);
    let initiation = b.initiate(secs(40.0));
    a.handshake(secs(40.0), &initiation).unwrap();
    let initiation = a.initiate(secs(41.0));
    let mut gate = gate();
    let reply = challenge(&mut gate, secs(41.0), &initiation);
    a.handshake(secs(42.0), &reply).unwrap();
    a.initiate(secs(43.0));
    let machine = a.machine();
    machine.late_rekey = true;
    machine.another_keepalive = true;
    for (seconds, alarm) in (50..).zip(timers::Alarm::ALL) {
        machine.alarms.set(alarm, secs(f64::from(seconds)).now);
    }

    let state = export(&mut a, &config, secs(44.0));
    assert_eq!(state.keypairs.len(), 5);
    assert!(state.initiated.is_some() && state.attempt.is_some() && state.up);
    assert!(state.handshake_sent.is_some() && state.answered.is_some());
    assert!(state.newest.is_some() && state.stamped.is_some() && state.keepalive.is_some());
    assert!(state.cookies.last_mac1.is_some() && state.cookies.cookie.is_some());
    a.session = a.engine.import(secs(45.0).now, &config, &state).unwrap();
    assert!(export(&mut a, &config, secs(45.0)) == state);
}

#[test]
fn a_shard_that_still_has_the_keys_of_an_exported_session_seals_no_more() {
    let (mut a, mut b) = joined(OURS);
    let now = secs(1.0);
    let lent = Arc::clone(a.session.lend(now.now).unwrap());
    let mut message = vec![0; 64];
    let seal = |message: &mut Vec<u8>, a: &End| a.engine.seal_lent(&lent, now.now, message, 64);
    assert_eq!(seal(&mut message, &a), Ok(()));
    assert_eq!(b.open(now, &[&message]).report.datagrams, 1);
    let state = export(&mut a, &peer_config(2, None), now);
    assert_eq!(
        state.keypairs[0].next_counter, 2,
        "behind a keep-alive and this"
    );
    let refused = seal(&mut message, &a).unwrap_err();
    assert_eq!(refused, DropReason::SessionExpired);
}

/// Tells an end that another shard sealed for it: when it hears of it, when that was, and when
/// something authentic came after it.
fn tell(end: &mut End, told: f64, sealed: f64, heard: Option<f64>) {
    let heard = heard.map(|heard| secs(heard).now);
    let End {
        engine, session, ..
    } = end;
    session.sealed_elsewhere(engine, secs(told).now, secs(sealed).now, heard);
}

#[test]
fn keys_that_are_lent_seal_what_the_peer_opens_and_are_lent_no_longer_than_they_live() {
    let (mut a, mut b) = pair(OURS);
    assert!(a.session.lend(secs(0.0).now).is_none(), "there are none");
    shake(secs(0.0), &mut a, &mut b);
    let lent = Arc::clone(a.session.lend(secs(1.0).now).unwrap());
    let mut seen = Vec::new();
    for elsewhere in [true, false, true] {
        let mut message = vec![0; 64];
        let Session::Ours(machine) = &mut a.session else {
            panic!("a session of ours");
        };
        let sealed = if elsewhere {
            // On another shard, with that one's engine.
            let stranger = end(OURS, 7, &peer_config(2, None));
            let (now, len) = (secs(1.0).now, message.len());
            stranger.engine.seal_lent(&lent, now, &mut message, len)
        } else {
            machine.seal(&mut a.engine.own, secs(1.0).now, &mut message, 64)
        };
        assert_eq!(sealed, Ok(()));
        assert_eq!(b.open(secs(1.0), &[&message]).report.datagrams, 1);
        seen.push(message[8]);
    }
    assert_eq!(seen, [1, 2, 3], "one counter for all, 0 was a keep-alive's");
    assert!(a.session.lend(secs(179.9).now).is_some());
    assert!(a.session.lend(secs(180.0).now).is_none());
    let mut late = vec![0; 64];
    let refused = a
        .engine
        .seal_lent(&lent, secs(180.0).now, &mut late, 64)
        .unwrap_err();
    assert_eq!(refused, DropReason::SessionExpired);
}

#[test]
fn data_sealed_elsewhere_that_gets_no_answer_makes_a_handshake() {
    let (mut a, _) = joined(OURS);
    tell(&mut a, 30.05, 30.0, None);
    tell(&mut a, 31.05, 31.04, None);
    let said = pass(&mut a, 31.05, 34.0);
    assert_near(times(&said, Said::Initiation)[0], 33.0, 33.0);
    // Answered before the report: nothing is missing.
    let (mut a, _) = joined(OURS);
    tell(&mut a, 30.05, 30.0, Some(30.02));
    assert_silent(Said::Initiation, &mut a, 30.05, 100.0);
}

#[test]
fn data_sealed_elsewhere_stands_for_a_keepalive_and_asks_for_new_keys_in_time() {
    let (mut a, mut b) = joined(OURS);
    carry(10.0, &mut b, &mut a);
    tell(&mut a, 10.55, 10.5, None);
    assert_silent(Said::Keepalive, &mut a, 10.55, 25.0);
    // What came after it is still to be answered, ten seconds after it.
    let (mut a, mut b) = joined(OURS);
    carry(30.0, &mut b, &mut a);
    carry(31.02, &mut b, &mut a);
    tell(&mut a, 31.05, 31.0, Some(31.02));
    let said = pass(&mut a, 31.05, 60.0);
    assert_eq!(times(&said, Said::Keepalive).len(), 1);
    assert_near(times(&said, Said::Keepalive)[0], 41.02, 41.02);
    // §6.2, for the initiator only.
    let (mut a, mut b) = joined(OURS);
    tell(&mut a, 119.9, 119.9, Some(119.95));
    tell(&mut b, 120.1, 120.1, Some(120.15));
    assert_silent(Said::Initiation, &mut a, 119.9, 120.0);
    tell(&mut a, 120.1, 120.05, Some(120.07));
    assert_eq!(
        times(&pass(&mut a, 120.1, 120.2), Said::Initiation).len(),
        1
    );
    assert_silent(Said::Initiation, &mut b, 120.1, 129.0);
}

#[test]
fn data_sealed_elsewhere_puts_a_persistent_keepalive_off() {
    let mut a = end(OURS, 1, &peer_config(2, Some(2)));
    let mut b = end(OURS, 2, &peer_config(1, None));
    shake(secs(0.0), &mut a, &mut b);
    tell(&mut a, 1.05, 1.0, None);
    let said = pass(&mut a, 1.05, 6.0);
    assert_eq!(times(&said, Said::Keepalive), [3.0, 5.0]);
}

/// The end with the private key 1 goes over to 3.
fn renew(end: &mut End, seconds: f64) {
    let until = secs(seconds).now + crate::dataplane::RENEWAL;
    let previous = private(1);
    assert!(
        end.engine
            .renew_key(&private(3), 1, Some((&previous, until)))
    );
}

/// What the peer that knows it by its new key has.
fn acquainted() -> End {
    end(OURS, 2, &peer_config(3, None))
}

#[test]
fn a_renewed_key_ends_no_session_and_both_keys_are_answered_for_thirty_seconds() {
    let (mut a, mut b) = joined(OURS);
    renew(&mut a, 20.0);
    carry(20.0, &mut a, &mut b);
    carry(20.0, &mut b, &mut a);
    // Who does not know of it yet handshakes with the old key, and who does with the new one.
    shake(secs(21.0), &mut b, &mut a);
    carry(21.0, &mut a, &mut b);
    let mut b = acquainted();
    shake(secs(22.0), &mut b, &mut a);
    carry(22.0, &mut a, &mut b);
    let mut late = end(OURS, 2, &peer_config(1, None));
    let before = late.initiate(secs(49.9));
    assert!(a.handshake(secs(49.9), &before).is_ok());
    let after = late.initiate(secs(50.1));
    let refused = a.handshake(secs(50.1), &after).unwrap_err();
    assert_eq!(refused, DropReason::HandshakeMac);
    carry(50.1, &mut b, &mut a);
    // Erased.
    a.engine.keep_key(None);
    assert!(a.handshake(secs(30.0), &after).is_err());
}

#[test]
fn what_a_peer_shares_with_the_key_before_goes_with_it() {
    let (mut a, mut b) = joined(OURS);
    renew(&mut a, 1.0);
    let forget = |a: &mut End| a.session.forget_keys_before(&a.engine);
    forget(&mut a);
    assert!(a.machine().remote.has_shared(), "it counts still");
    a.engine.keep_key(None);
    forget(&mut a);
    assert!(!a.machine().remote.has_shared());
    carry(32.0, &mut a, &mut b);
    carry(32.0, &mut b, &mut a);
    let late = b.initiate(secs(33.0));
    let refused = a.handshake(secs(33.0), &late).unwrap_err();
    assert_eq!(refused, DropReason::HandshakeMac);
    shake(secs(34.0), &mut a, &mut acquainted());
    forget(&mut a);
    assert!(a.machine().remote.has_shared());
}

#[test]
fn a_key_that_was_renewed_twice_at_once_is_answered_by_its_last_two() {
    let (mut a, mut b) = joined(OURS);
    let (between, until) = (private(3), secs(1.0).now + crate::dataplane::RENEWAL);
    assert!(a.engine.renew_key(&private(4), 2, Some((&between, until))));
    carry(1.0, &mut a, &mut b);
    let before = b.initiate(secs(6.0));
    let refused = a.handshake(secs(6.0), &before).unwrap_err();
    assert_eq!(refused, DropReason::HandshakeMac);
    shake(secs(7.0), &mut acquainted(), &mut a);
    let mut newest = end(OURS, 2, &peer_config(4, None));
    shake(secs(8.0), &mut newest, &mut a);
    carry(8.0, &mut a, &mut newest);
}

#[test]
fn what_was_begun_with_the_key_before_is_completed_with_it() {
    let (mut a, mut b) = pair(OURS);
    let response = answered(secs(0.0), &mut a, &mut b);
    renew(&mut a, 0.0);
    let (outcome, keepalive) = a.handshake(secs(0.1), &response).unwrap();
    assert_eq!(outcome.change, Change::Up);
    b.open(secs(0.1), &[&keepalive]);
    carry(0.1, &mut a, &mut b);
    // But not by who knows the new key already.
    let (mut a, mut b) = pair(OURS);
    let response = answered(secs(0.0), &mut a, &mut b);
    renew(&mut a, 0.0);
    shake(secs(0.1), &mut acquainted(), &mut a);
    assert!(a.handshake(secs(0.2), &response).is_err());
}

#[test]
fn a_peer_that_gave_up_our_sessions_with_the_key_is_met_within_a_second() {
    let (mut a, mut b) = joined(OURS);
    renew(&mut a, 1.0);
    // It hears nothing of what we send, and learns of the new key between two initiations.
    let _lost = a.seal(secs(1.0), &ipv4(100));
    let said = pass(&mut a, 1.0, 1.6);
    let initiations = times(&said, Said::Initiation);
    assert_eq!(initiations.len(), 1);
    assert_near(initiations[0], 1.25, 1.25);
    let _lost = a.seal(secs(1.6), &ipv4(100));
    let again = a.session.poll_timeout().unwrap();
    let again = at(again - *START);
    let (outcome, initiation) = a.step(again);
    assert!(outcome.handshake && again.now < secs(2.0).now);
    let initiation = initiation.unwrap();
    let unknown = b.handshake(again, &initiation).unwrap_err();
    assert_eq!(unknown, DropReason::HandshakeUnknownPeer);
    let mut b = acquainted();
    let (_, response) = b.handshake(again, &initiation).unwrap();
    let (outcome, _) = a.handshake(again, &response).unwrap();
    assert_eq!(outcome.change, Change::Up);
    // From then on the paper's times count again.
    let _unanswered = a.seal(again, &ipv4(100));
    assert_silent(Said::Initiation, &mut a, 2.0, 16.6);
}

#[test]
fn a_renewed_key_is_met_however_long_a_response_takes() {
    for round_trip in [0.0, 0.4, 0.8, 1.5, 4.0].map(Duration::from_secs_f64) {
        let (mut a, _) = joined(OURS);
        renew(&mut a, 1.0);
        let mut b = acquainted();
        let mut now = Duration::from_secs(1);
        let mut responses = VecDeque::new();
        while !b.ready(at(now)) {
            assert!(now < Duration::from_secs(20), "{round_trip:?}");
            // It goes on sending.
            let _lost = a.seal(at(now), &ipv4(100));
            if let (_, Some(said)) = a.step(at(now))
                && said[0] == 1
            {
                let (_, response) = b.handshake(at(now + round_trip / 2), &said).unwrap();
                responses.push_back((now + round_trip, response));
            }
            while responses.front().is_some_and(|(due, _)| *due <= now) {
                let (_, response) = responses.pop_front().unwrap();
                if let Ok((_, keepalive)) = a.handshake(at(now), &response) {
                    b.open(at(now + round_trip / 2), &[&keepalive]);
                }
            }
            now += Duration::from_millis(10);
        }
    }
}

#[test]
fn an_initiation_that_is_not_authentic_takes_nobody_over_to_the_new_key() {
    let (mut a, mut b) = pair(OURS);
    let response = answered(secs(0.0), &mut a, &mut b);
    renew(&mut a, 0.0);
    let forged = end(OURS, 4, &peer_config(3, None)).initiate(secs(0.1));
    let refused = a.handshake(secs(0.1), &forged).unwrap_err();
    assert_eq!(refused, DropReason::HandshakeUnknownPeer);
    assert!(a.handshake(secs(0.2), &response).is_ok());
}
