//! The gate's refusals, in their order, under virtual time.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::super::cookie::COOKIE_LIFE;
use super::super::gate::{
    CHALLENGES_AGAIN_BURST, CHALLENGES_BURST, KNOWN_BURST, KNOWN_PER_SECOND, LOAD_LASTS,
};
use super::*;
use crate::stats::DropReason;

/// What becomes of noise that passes.
const PASSED: DropReason = DropReason::HandshakeInvalid;

struct Lab {
    now: Instant,
    rng: StdRng,
    gate: Gate,
    a: End,
    b: End,
    reply: [u8; 64],
}

fn from(n: u32) -> SocketAddr {
    SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + n), 4000))
}

impl Lab {
    fn new() -> Lab {
        let mut rng = seeded();
        let (a, b) = ends(&mut rng, false);
        let now = now();
        let local = LocalKeys::new(b.local.private.as_bytes());
        Lab {
            now,
            gate: Gate::new(now, Some(Arc::new(local)), &mut rng),
            rng,
            a,
            b,
            reply: [0; 64],
        }
    }

    fn handle(&mut self, from: SocketAddr, message: &[u8]) -> Verdict {
        self.handle_as(Standing::Stranger, from, message)
    }

    /// A message that is drawn as soon as it comes, if it may be.
    fn handle_as(&mut self, standing: Standing, from: SocketAddr, message: &[u8]) -> Verdict {
        self.reply = [0; 64];
        let verdict = self
            .gate
            .handle(self.now, from, standing, message, &mut self.rng);
        let Verdict::Unproven(class) = verdict else {
            return verdict;
        };
        let written = self.gate.challenge(
            self.now,
            from,
            class,
            message,
            &mut self.rng,
            &mut self.reply,
        );
        assert_eq!(self.reply != [0; 64], written.is_ok());
        written.map_or_else(Verdict::Drop, |()| verdict)
    }

    /// Whether it is taken for an initiation to look at.
    fn passes(&mut self, from: SocketAddr, message: &[u8]) -> bool {
        matches!(self.handle(from, message), Verdict::Initiation(_))
    }

    /// Whether it is answered by a cookie.
    fn is_challenged(&mut self, from: SocketAddr, message: &[u8]) -> bool {
        matches!(self.handle(from, message), Verdict::Unproven(_))
    }

    fn answer(&mut self, message: &[u8]) -> Verdict {
        self.handle_as(Standing::Awaited, from(1), message)
    }

    fn refusal(&mut self, message: &[u8]) -> DropReason {
        let verdict = self.handle(from(1), message);
        let Verdict::Drop(reason) = verdict else {
            panic!("{verdict:?}");
        };
        reason
    }

    /// Noise with a right MAC1.
    fn noise<const LEN: usize>(&mut self, kind: u8) -> [u8; LEN] {
        let mut message = [0; LEN];
        self.rng.fill(&mut message[4..]);
        message[0] = kind;
        put_mac1(&self.a.remote, &mut message);
        message
    }

    /// A response that nobody asked for.
    fn forged_response(&mut self) -> [u8; 92] {
        self.noise(2)
    }

    /// The cheapest thing that makes load.
    fn forged(&mut self) -> [u8; 148] {
        self.noise(1)
    }

    /// Sends until the gate is under load.
    fn flood(&mut self) {
        let message = self.forged();
        for _ in 0..LOAD_BURST {
            assert_eq!(self.refusal(&message), PASSED);
            assert!(!self.gate.under_load(self.now));
        }
        assert!(self.is_challenged(from(9), &message));
        assert!(self.gate.under_load(self.now));
    }

    /// Gets a cookie for an address by being refused there.
    fn cookie(&mut self, from: SocketAddr) -> Cookie {
        let (initiated, message) = self.a.initiate(&mut self.rng, None);
        assert!(self.is_challenged(from, &message));
        let receiver = u32::from_le_bytes(self.reply[4..8].try_into().unwrap());
        assert_eq!(receiver, initiated.index());
        consume_cookie_reply(&self.a.remote, &self.reply, initiated.mac1()).unwrap()
    }

    fn initiate(&mut self, cookie: Option<&Cookie>) -> [u8; 148] {
        self.a.initiate(&mut self.rng, cookie).1
    }
}

#[test]
fn an_initiation_passes_with_its_makers_name() {
    let mut lab = Lab::new();
    let message = lab.initiate(None);
    let Verdict::Initiation(peeked) = lab.handle(from(1), &message) else {
        panic!("not taken");
    };
    assert_eq!(peeked.peer(), lab.a.local.public());
    assert!(consume_initiation(&peeked, &lab.b.remote).is_ok());
}

#[test]
fn responses_and_cookie_replies_pass_with_the_index_they_name() {
    let mut lab = Lab::new();
    let mut message = lab.forged_response();
    message[8..12].copy_from_slice(&[1, 2, 3, 4]);
    put_mac1(&lab.a.remote, &mut message);
    assert!(matches!(
        lab.answer(&message),
        Verdict::Response(0x0403_0201)
    ));
    assert_eq!(lab.refusal(&message), DropReason::UnknownIndex);
    let mut message = [0; 64];
    message[..8].copy_from_slice(&[3, 0, 0, 0, 5, 6, 7, 8]);
    assert!(matches!(
        lab.answer(&message),
        Verdict::CookieReply(0x0807_0605)
    ));
    assert_eq!(lab.refusal(&message), DropReason::UnknownIndex);
}

#[test]
fn each_refusal_has_its_reason() {
    let mut lab = Lab::new();
    let message = lab.initiate(None);
    for len in (0..=200).filter(|len| *len != 148) {
        let mut cut = message.to_vec();
        cut.resize(len, 0);
        assert_eq!(lab.refusal(&cut), DropReason::MessageLength, "{len}");
    }
    for kind in [0u8, 4, 5, 255] {
        let mut other = message;
        other[0] = kind;
        assert_eq!(lab.refusal(&other), DropReason::UnknownMessage);
    }
    for reserved in 1..4 {
        let mut other = message;
        other[reserved] = 1;
        assert_eq!(lab.refusal(&other), DropReason::UnknownMessage);
    }
    let mut damaged = message;
    damaged[50] ^= 1;
    assert_eq!(lab.refusal(&damaged), DropReason::HandshakeMac);
    put_mac1(&lab.a.remote, &mut damaged);
    assert_eq!(lab.refusal(&damaged), DropReason::HandshakeInvalid);
    damaged[8..40].fill(0);
    put_mac1(&lab.a.remote, &mut damaged);
    assert_eq!(lab.refusal(&damaged), DropReason::HandshakeLowOrder);
    lab.gate.set_local(None);
    assert_eq!(lab.refusal(&message), DropReason::HandshakeNoKey);
}

#[test]
fn a_new_private_key_counts_at_once() {
    let mut lab = Lab::new();
    let old = lab.initiate(None);
    let local = Arc::new(LocalKeys::new(&[7; 32]));
    lab.gate.set_local(Some(Arc::clone(&local)));
    assert_eq!(lab.refusal(&old), DropReason::HandshakeMac);
    lab.a.remote = Remote::new(&lab.a.local, local.public(), None);
    let new = lab.initiate(None);
    assert!(lab.passes(from(1), &new));
}

#[test]
fn the_key_before_ours_counts_for_a_while_under_load_too() {
    for load in [false, true] {
        let mut lab = Lab::new();
        if load {
            lab.flood();
        }
        let until = lab.now + Duration::from_secs(30);
        let old = Previous::new(lab.b.local.private.as_bytes(), until);
        let new = LocalKeys::new(&[7; 32]);
        let to_new = Remote::new(&lab.a.local, new.public(), None);
        lab.gate.set_local(Some(Arc::new(new)));
        lab.gate.set_previous(Some(Arc::new(old)));
        for key_of_the_peer in [None, Some(to_new)] {
            if let Some(remote) = key_of_the_peer {
                lab.a.remote = remote;
            }
            // The cookie is sealed under the key that the message was for.
            let cookie = load.then(|| lab.cookie(from(1)));
            let message = lab.initiate(cookie.as_ref());
            assert!(lab.passes(from(1), &message));
        }
        lab.a.remote = Remote::new(&lab.a.local, lab.b.local.public(), None);
        lab.now = until;
        let late = lab.initiate(None);
        assert_eq!(lab.refusal(&late), DropReason::HandshakeMac);
    }
}

#[test]
fn under_load_only_a_cookie_opens_the_gate() {
    let mut lab = Lab::new();
    lab.flood();
    let cookie = lab.cookie(from(1));
    let message = lab.initiate(Some(&cookie));
    assert!(lab.is_challenged(from(2), &message));
    assert!(lab.passes(from(1), &message));
    // A damaged MAC2 is no cookie; a damaged MAC1 is not even answered.
    for at in 132..148 {
        let mut damaged = message;
        damaged[at] ^= 1;
        assert!(lab.is_challenged(from(1), &damaged));
        damaged[116] ^= 1;
        assert_eq!(lab.refusal(&damaged), DropReason::HandshakeMac);
    }
}

#[test]
fn a_cookie_dies_with_the_secret() {
    let mut lab = Lab::new();
    lab.flood();
    let cookie = lab.cookie(from(1));
    lab.now += COOKIE_LIFE - Duration::from_millis(1);
    lab.flood();
    let message = lab.initiate(Some(&cookie));
    assert!(lab.passes(from(1), &message));
    lab.now += Duration::from_millis(1);
    assert!(lab.is_challenged(from(1), &message));
}

#[test]
fn without_load_nobody_needs_a_cookie_and_no_source_is_limited() {
    let mut lab = Lab::new();
    for _ in 0..LOAD_BURST {
        let message = lab.forged();
        assert_eq!(lab.refusal(&message), PASSED);
    }
    // Exactly the allowed rate, for a while.
    for _ in 0..2 * LOAD_PER_SECOND {
        lab.now += Duration::from_secs(1) / LOAD_PER_SECOND;
        let message = lab.forged();
        assert_eq!(lab.refusal(&message), PASSED);
    }
}

#[test]
fn wrong_macs_make_no_load() {
    let mut lab = Lab::new();
    let mut message = lab.forged();
    message[70] ^= 1;
    for _ in 0..10 * LOAD_BURST {
        assert_eq!(lab.refusal(&message), DropReason::HandshakeMac);
    }
    assert!(!lab.gate.under_load(lab.now));
}

#[test]
fn load_lasts_a_second_beyond_the_last_message_too_many() {
    let mut lab = Lab::new();
    lab.flood();
    let message = lab.initiate(None);
    lab.now += LOAD_LASTS - Duration::from_millis(1);
    assert!(lab.gate.under_load(lab.now));
    assert!(lab.is_challenged(from(1), &message));
    lab.now += Duration::from_millis(1);
    assert!(!lab.gate.under_load(lab.now));
    assert!(lab.passes(from(1), &message));
    // It begins anew when the messages go on.
    lab.now += Duration::from_secs(1) * LOAD_BURST / LOAD_PER_SECOND;
    lab.flood();
}

#[test]
fn under_load_a_source_has_five_messages_and_twenty_a_second() {
    let mut lab = Lab::new();
    lab.flood();
    let cookie = lab.cookie(from(1));
    let message = lab.initiate(Some(&cookie));
    let mut taken = 0;
    let mut elapsed = Duration::ZERO;
    while elapsed < Duration::from_secs(2) {
        lab.flood_on();
        let verdict = lab.handle(from(1), &message);
        if matches!(verdict, Verdict::Initiation(_)) {
            taken += 1;
        } else {
            assert!(matches!(
                verdict,
                Verdict::Drop(DropReason::HandshakeLimited)
            ));
        }
        if elapsed < Duration::from_millis(10) {
            assert_eq!(taken, 1 + elapsed.as_millis());
            assert!(taken <= 5);
        }
        let step = Duration::from_millis(if elapsed < Duration::from_millis(4) {
            1
        } else {
            7
        });
        elapsed += step;
        lab.now += step;
    }
    assert!((43..=45).contains(&taken), "{taken}");
    // Another source has its own.
    let other = lab.cookie(from(2));
    let message = lab.initiate(Some(&other));
    assert!(lab.passes(from(2), &message));
}

impl Lab {
    /// Keeps the gate under load.
    fn flood_on(&mut self) {
        let message = self.forged();
        let mut n = 0;
        while !self
            .gate
            .under_load(self.now + LOAD_LASTS - Duration::from_millis(1))
        {
            n += 1;
            let verdict = self.handle(from(1000 + n), &message);
            assert!(!matches!(verdict, Verdict::Initiation(_)));
        }
    }
}

#[test]
fn a_whole_network_of_ipv6_is_one_source() {
    let mut lab = Lab::new();
    lab.flood();
    let host = |n: u16| -> SocketAddr {
        SocketAddr::from((std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 1, n, 0, 0, n), 9))
    };
    let mut verdicts = Vec::new();
    for n in 0..8 {
        let cookie = lab.cookie(host(n));
        let message = lab.initiate(Some(&cookie));
        verdicts.push(lab.passes(host(n), &message));
    }
    assert_eq!(verdicts.iter().filter(|taken| **taken).count(), 5);
    let elsewhere: SocketAddr = "[2001:db8:0:2::]:9".parse().unwrap();
    let cookie = lab.cookie(elsewhere);
    let message = lab.initiate(Some(&cookie));
    assert!(lab.passes(elsewhere, &message));
}

#[test]
fn an_index_has_its_share_of_answers_and_guesses_take_nothing_from_it() {
    let mut lab = Lab::new();
    let mut message = [0; 64];
    message[0] = 3;
    for n in 0..20_000u32 {
        message[4..8].copy_from_slice(&n.to_le_bytes());
        assert_eq!(lab.refusal(&message), DropReason::UnknownIndex);
    }
    message[4..8].copy_from_slice(&7u32.to_le_bytes());
    for _ in 0..KNOWN_BURST {
        assert!(matches!(lab.answer(&message), Verdict::CookieReply(7)));
    }
    let limited = DropReason::HandshakeLimited;
    assert!(matches!(lab.answer(&message), Verdict::Drop(reason) if reason == limited));
    message[4] = 8;
    assert!(matches!(lab.answer(&message), Verdict::CookieReply(8)));
    message[4] = 7;
    lab.now += Duration::from_secs(1) / KNOWN_PER_SECOND;
    assert!(matches!(lab.answer(&message), Verdict::CookieReply(7)));
}

#[test]
fn under_load_answers_that_are_awaited_pass_without_a_cookie() {
    let mut lab = Lab::new();
    lab.flood();
    let message = lab.forged_response();
    let index = u32::from_le_bytes(message[8..12].try_into().unwrap());
    assert!(matches!(lab.answer(&message), Verdict::Response(n) if n == index));
    let mut damaged = message;
    damaged[70] ^= 1;
    assert!(matches!(
        lab.answer(&damaged),
        Verdict::Drop(DropReason::HandshakeMac)
    ));
}

#[test]
fn under_load_a_known_address_has_its_share_without_a_cookie() {
    let mut lab = Lab::new();
    lab.flood();
    for peer in [1, 2] {
        let message = lab.initiate(None);
        for _ in 0..KNOWN_BURST {
            let verdict = lab.handle_as(Standing::Known, from(peer), &message);
            assert!(matches!(verdict, Verdict::Initiation(_)));
        }
        // Whoever makes the address up needs a cookie for more, and so does the peer.
        let cookie = lab.cookie(from(peer));
        let verdict = lab.handle_as(Standing::Known, from(peer), &message);
        assert!(matches!(verdict, Verdict::Unproven(Novelty::Again)));
        let message = lab.initiate(Some(&cookie));
        let verdict = lab.handle_as(Standing::Known, from(peer), &message);
        assert!(matches!(verdict, Verdict::Initiation(_)));
    }
}

#[test]
fn cookies_are_given_out_at_a_bounded_rate_to_each_class() {
    let mut lab = Lab::new();
    lab.flood();
    let cookie = lab.cookie(from(1));
    let message = lab.forged();
    let limited = DropReason::HandshakeLimited;
    let again = (0..)
        .take_while(|_| {
            let verdict = lab.handle(from(1), &message);
            matches!(verdict, Verdict::Unproven(Novelty::Again))
        })
        .count();
    assert_eq!(again, CHALLENGES_AGAIN_BURST as usize);
    assert_eq!(lab.refusal(&message), limited);
    // Those who are new are not concerned. One got its cookie when the load began, one since.
    let mut given = 2;
    for n in 0..2 * CHALLENGES_BURST {
        let verdict = lab.gate.handle(
            lab.now,
            from(1000 + n),
            Standing::Stranger,
            &message,
            &mut lab.rng,
        );
        // Among so many some are taken for others.
        if matches!(verdict, Verdict::Unproven(Novelty::New)) {
            let (novelty, rng) = (Novelty::New, &mut lab.rng);
            let written = lab.gate.challenge(
                lab.now,
                from(1000 + n),
                novelty,
                &message,
                rng,
                &mut lab.reply,
            );
            given += u32::from(written.is_ok());
        }
    }
    assert_eq!(given, CHALLENGES_BURST);
    // Who has one is not concerned either.
    let proven = lab.initiate(Some(&cookie));
    assert!(lab.passes(from(1), &proven));
    lab.now += Duration::from_secs(5);
    lab.flood_on();
    let verdict = lab.handle(from(4), &message);
    assert!(matches!(verdict, Verdict::Unproven(Novelty::New)));
}

#[test]
fn who_was_not_seen_for_five_seconds_has_returned_and_later_is_new() {
    let mut lab = Lab::new();
    lab.flood();
    let message = lab.initiate(None);
    for class in [Novelty::New, Novelty::Again, Novelty::Again] {
        let verdict = lab.handle(from(1), &message);
        assert!(matches!(verdict, Verdict::Unproven(given) if given == class));
    }
    // As WireGuard repeats itself: no proof is asked for, once.
    let mut after = |spans: u32| {
        for _ in 0..spans {
            lab.now += Duration::from_millis(900);
            lab.flood_on();
        }
        lab.handle(from(1), &message)
    };
    assert!(matches!(after(6), Verdict::Initiation(_)));
    assert!(matches!(after(8), Verdict::Unproven(Novelty::New)));
}

/// The table has a fixed size; what does not fit is refused, and nobody gets more than the limit.
#[test]
fn a_flood_of_sources_fills_a_fixed_table() {
    use crate::noise::sources::Sources;
    let now = now();
    let mut sources = Sources::new(now, 20, 5);
    let mut allowed = 0;
    for n in 0..100_000u32 {
        allowed += usize::from(sources.allow(now, IpAddr::from(n.to_be_bytes())));
    }
    assert!(allowed <= SOURCES_MAX, "{allowed}");
    assert!(allowed > SOURCES_MAX * 9 / 10, "{allowed}");
    // A source that found its place keeps its bucket through the flood.
    let mine = (0..100_000u32)
        .map(|n| IpAddr::from(n.to_be_bytes()))
        .find(|ip| sources.allow(now, *ip))
        .unwrap();
    let more = (0..10).filter(|_| sources.allow(now, mine)).count();
    assert_eq!(more, 3, "two of five are used");
    // Later, everybody's place is free again.
    let later = now + Duration::from_millis(250);
    let fresh = IpAddr::from([203, 0, 113, 9]);
    assert!(sources.allow(later, fresh));
}

#[test]
fn time_that_stands_still_or_jumps_is_no_harm() {
    use crate::noise::sources::Sources;
    let now = now();
    let mut sources = Sources::new(now + Duration::from_secs(5), 20, 5);
    let ip = IpAddr::from([192, 0, 2, 1]);
    for _ in 0..5 {
        assert!(sources.allow(now, ip));
    }
    assert!(!sources.allow(now, ip));
    assert!(sources.allow(now + Duration::from_secs(1 << 40), ip));
}
