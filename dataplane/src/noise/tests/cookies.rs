//! Cookies at both ends, under virtual time.

use std::net::SocketAddr;

use super::*;
use crate::noise::cookie::CookieChecker;

fn from() -> SocketAddr {
    "192.0.2.1:1000".parse().unwrap()
}

struct Ends {
    now: Instant,
    rng: StdRng,
    a: End,
    b: End,
    checker: CookieChecker,
    cookies: CookieStore,
}

impl Ends {
    fn new() -> Ends {
        let mut rng = seeded();
        let (a, b) = ends(&mut rng, false);
        Ends {
            now: now(),
            rng,
            a,
            b,
            checker: CookieChecker::default(),
            cookies: CookieStore::default(),
        }
    }

    /// An initiation with the cookie that is remembered, if any.
    fn initiate(&mut self) -> [u8; 148] {
        let cookie = self.cookies.cookie(self.now).cloned();
        let (initiated, message) = self.a.initiate(&mut self.rng, cookie.as_ref());
        self.cookies.sent(initiated.mac1());
        message
    }

    /// The cookie reply to a message.
    fn reply(&mut self, message: &[u8], from: SocketAddr) -> [u8; 64] {
        let mut reply = [0; 64];
        let mac1 = message[message.len() - 32..][..16].try_into().unwrap();
        self.checker.reply(
            self.now,
            from,
            &self.b.local,
            9,
            &mac1,
            &mut self.rng,
            &mut reply,
        );
        reply
    }

    fn receive(&mut self, reply: &[u8]) -> Result<(), Error> {
        self.cookies.receive(self.now, &self.a.remote, reply)
    }

    fn check(&mut self, message: &[u8], from: SocketAddr) -> bool {
        self.checker.check(self.now, from, message, &mut self.rng)
    }
}

#[test]
fn a_cookie_proves_one_address_and_port_only() {
    let mut ends = Ends::new();
    for source in ["192.0.2.1:1000", "[2001:db8::1]:1000"] {
        let source: SocketAddr = source.parse().unwrap();
        let message = ends.initiate();
        let reply = ends.reply(&message, source);
        assert_eq!(reply[..8], [3, 0, 0, 0, 9, 0, 0, 0]);
        ends.receive(&reply).unwrap();
        let message = ends.initiate();
        assert!(ends.check(&message, source));
        for other in [
            "192.0.2.1:1001",
            "192.0.2.2:1000",
            "[2001:db8::1]:1001",
            "[2001:db8::2]:1000",
        ] {
            assert!(!ends.check(&message, other.parse().unwrap()), "{other}");
        }
        // Every byte under MAC2, and MAC2 itself.
        for at in 0..148 {
            let mut damaged = message;
            damaged[at] ^= 1;
            assert!(!ends.check(&damaged, source), "byte {at}");
        }
    }
}

#[test]
fn a_cookie_is_good_for_two_minutes_at_the_initiator() {
    let mut ends = Ends::new();
    assert_eq!(ends.cookies.cookie(ends.now), None);
    let message = ends.initiate();
    assert_eq!(message[132..], [0; 16], "no cookie, no MAC2");
    let reply = ends.reply(&message, from());
    ends.receive(&reply).unwrap();
    for (after_ms, good) in [(0, true), (119_999, true), (120_000, false)] {
        let later = ends.now + Duration::from_millis(after_ms);
        assert_eq!(ends.cookies.cookie(later).is_some(), good, "{after_ms}");
    }
}

#[test]
fn the_secret_changes_every_two_minutes_and_old_cookies_die_with_it() {
    let mut ends = Ends::new();
    let message = ends.initiate();
    let reply = ends.reply(&message, from());
    ends.receive(&reply).unwrap();
    let message = ends.initiate();
    ends.now += Duration::from_millis(119_999);
    assert!(ends.check(&message, from()));
    ends.now += Duration::from_millis(1);
    assert!(!ends.check(&message, from()));
    ends.now -= Duration::from_millis(1);
    assert!(!ends.check(&message, from()), "it does not come back");
}

#[test]
fn a_reply_counts_only_for_the_last_message_and_once() {
    let mut ends = Ends::new();
    let first = ends.initiate();
    let to_first = ends.reply(&first, from());
    let second = ends.initiate();
    assert_eq!(ends.receive(&to_first).unwrap_err(), Error::Authentication);
    assert_eq!(ends.cookies.cookie(ends.now), None);
    let to_second = ends.reply(&second, from());
    ends.receive(&to_second).unwrap();
    assert_eq!(
        ends.receive(&to_second).unwrap_err(),
        Error::NoCookieExpected
    );
    assert!(ends.cookies.cookie(ends.now).is_some());
}

#[test]
fn nobody_is_given_a_cookie_that_did_not_ask() {
    let mut ends = Ends::new();
    let (_, message) = ends.a.initiate(&mut ends.rng, None);
    let reply = ends.reply(&message, from());
    assert_eq!(ends.receive(&reply).unwrap_err(), Error::NoCookieExpected);
}

#[test]
fn every_damaged_byte_of_a_reply_is_refused() {
    let mut ends = Ends::new();
    let message = ends.initiate();
    let reply = ends.reply(&message, from());
    for at in 0..64 {
        let mut damaged = reply;
        damaged[at] ^= 0x10;
        let expected = match at {
            0..4 => Err(Error::Kind),
            // The index found the peer; nothing else depends on it.
            4..8 => continue,
            _ => Err(Error::Authentication),
        };
        assert_eq!(ends.receive(&damaged), expected, "byte {at}");
    }
    ends.receive(&reply).unwrap();
}

#[test]
fn a_reply_of_another_responder_is_refused() {
    let mut ends = Ends::new();
    let message = ends.initiate();
    ends.b.local = LocalKeys::new(&[5; 32]);
    let reply = ends.reply(&message, from());
    assert_eq!(ends.receive(&reply).unwrap_err(), Error::Authentication);
}
