//! Cookies at both ends, under virtual time.

use std::net::SocketAddr;

use super::*;
use crate::noise::cookie::Baker;

fn from() -> SocketAddr {
    "192.0.2.1:1000".parse().unwrap()
}

struct Kitchen {
    now: Instant,
    rng: StdRng,
    a: End,
    b: End,
    baker: Baker,
    jar: Jar,
}

impl Kitchen {
    fn new() -> Kitchen {
        let mut rng = seeded();
        let (a, b) = ends(&mut rng, false);
        Kitchen {
            now: start(),
            rng,
            a,
            b,
            baker: Baker::default(),
            jar: Jar::default(),
        }
    }

    /// An initiation with the cookie of the jar.
    fn initiate(&mut self) -> [u8; 148] {
        let cookie = self.jar.cookie(self.now).cloned();
        let (initiated, message) = self.a.initiate(&mut self.rng, cookie.as_ref());
        self.jar.sent(initiated.mac1());
        message
    }

    /// The cookie reply to a message.
    fn reply(&mut self, message: &[u8], from: SocketAddr) -> [u8; 64] {
        let mut reply = [0; 64];
        let mac1 = message[message.len() - 32..][..16].try_into().unwrap();
        self.baker.reply(
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
        self.jar.receive(self.now, &self.a.remote, reply)
    }

    fn check(&mut self, message: &[u8], from: SocketAddr) -> bool {
        self.baker.check(self.now, from, message, &mut self.rng)
    }
}

#[test]
fn a_cookie_proves_one_address_and_port_only() {
    let mut kitchen = Kitchen::new();
    for source in ["192.0.2.1:1000", "[2001:db8::1]:1000"] {
        let source: SocketAddr = source.parse().unwrap();
        let message = kitchen.initiate();
        let reply = kitchen.reply(&message, source);
        assert_eq!(reply[..8], [3, 0, 0, 0, 9, 0, 0, 0]);
        kitchen.receive(&reply).unwrap();
        let message = kitchen.initiate();
        assert!(kitchen.check(&message, source));
        for other in [
            "192.0.2.1:1001",
            "192.0.2.2:1000",
            "[2001:db8::1]:1001",
            "[2001:db8::2]:1000",
        ] {
            assert!(!kitchen.check(&message, other.parse().unwrap()), "{other}");
        }
        // Every byte under MAC2, and MAC2 itself.
        for at in 0..148 {
            let mut damaged = message;
            damaged[at] ^= 1;
            assert!(!kitchen.check(&damaged, source), "byte {at}");
        }
    }
}

#[test]
fn a_cookie_is_good_for_two_minutes_at_the_initiator() {
    let mut kitchen = Kitchen::new();
    assert_eq!(kitchen.jar.cookie(kitchen.now), None);
    let message = kitchen.initiate();
    assert_eq!(message[132..], [0; 16], "no cookie, no MAC2");
    let reply = kitchen.reply(&message, from());
    kitchen.receive(&reply).unwrap();
    for (after_ms, good) in [(0, true), (119_999, true), (120_000, false)] {
        let later = kitchen.now + Duration::from_millis(after_ms);
        assert_eq!(kitchen.jar.cookie(later).is_some(), good, "{after_ms}");
    }
}

#[test]
fn the_secret_changes_every_two_minutes_and_old_cookies_die_with_it() {
    let mut kitchen = Kitchen::new();
    let message = kitchen.initiate();
    let reply = kitchen.reply(&message, from());
    kitchen.receive(&reply).unwrap();
    let message = kitchen.initiate();
    kitchen.now += Duration::from_millis(119_999);
    assert!(kitchen.check(&message, from()));
    kitchen.now += Duration::from_millis(1);
    assert!(!kitchen.check(&message, from()));
    kitchen.now -= Duration::from_millis(1);
    assert!(!kitchen.check(&message, from()), "it does not come back");
}

#[test]
fn a_reply_counts_only_for_the_last_message_and_once() {
    let mut kitchen = Kitchen::new();
    let first = kitchen.initiate();
    let to_first = kitchen.reply(&first, from());
    let second = kitchen.initiate();
    assert_eq!(
        kitchen.receive(&to_first).unwrap_err(),
        Error::Authentication
    );
    assert_eq!(kitchen.jar.cookie(kitchen.now), None);
    let to_second = kitchen.reply(&second, from());
    kitchen.receive(&to_second).unwrap();
    assert_eq!(
        kitchen.receive(&to_second).unwrap_err(),
        Error::NoCookieExpected
    );
    assert!(kitchen.jar.cookie(kitchen.now).is_some());
}

#[test]
fn nobody_is_given_a_cookie_that_did_not_ask() {
    let mut kitchen = Kitchen::new();
    let (_, message) = kitchen.a.initiate(&mut kitchen.rng, None);
    let reply = kitchen.reply(&message, from());
    assert_eq!(
        kitchen.receive(&reply).unwrap_err(),
        Error::NoCookieExpected
    );
}

#[test]
fn every_damaged_byte_of_a_reply_is_refused() {
    let mut kitchen = Kitchen::new();
    let message = kitchen.initiate();
    let reply = kitchen.reply(&message, from());
    for at in 0..64 {
        let mut damaged = reply;
        damaged[at] ^= 0x10;
        let expected = match at {
            0..4 => Err(Error::Kind),
            // The index found the jar; nothing else depends on it.
            4..8 => continue,
            _ => Err(Error::Authentication),
        };
        assert_eq!(kitchen.receive(&damaged), expected, "byte {at}");
    }
    kitchen.receive(&reply).unwrap();
}

#[test]
fn a_reply_of_another_responder_is_refused() {
    let mut kitchen = Kitchen::new();
    let message = kitchen.initiate();
    kitchen.b.local = LocalKeys::new(&[5; 32]);
    let reply = kitchen.reply(&message, from());
    assert_eq!(kitchen.receive(&reply).unwrap_err(), Error::Authentication);
}
