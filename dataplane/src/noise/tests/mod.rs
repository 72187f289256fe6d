//! The tests of the whole room, by subject. `refusals` has what must not pass, `oracle` and
//! `known` have the peers that agree with us.

mod cookies;
mod gate;
mod known;
mod oracle;
mod refusals;

use std::convert::Infallible;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, TryCryptoRng, TryRng};

use super::handshake::ConsumedInitiation;
use super::*;
use crate::seeded;
/// Any moment to count from; virtual time goes on by addition.
use crate::sys::now;

/// A source of randomness that says what it is told to.
struct Dictated(Vec<u8>);

impl TryRng for Dictated {
    type Error = Infallible;
    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        unreachable!("only bytes are asked for")
    }
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        unreachable!("only bytes are asked for")
    }
    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        out.copy_from_slice(&self.0.drain(..out.len()).collect::<Vec<u8>>());
        Ok(())
    }
}

impl TryCryptoRng for Dictated {}

/// One end and what it knows of the other.
struct End {
    local: LocalKeys,
    remote: Remote,
}

/// Two ends with random keys.
fn ends(rng: &mut StdRng, preshared: bool) -> (End, End) {
    let (a, b) = (LocalKeys::new(&rng.random()), LocalKeys::new(&rng.random()));
    let preshared: Option<[u8; 32]> = preshared.then(|| rng.random());
    let towards_b = Remote::new(&a, b.public(), preshared.as_ref());
    let towards_a = Remote::new(&b, a.public(), preshared.as_ref());
    let end = |local, remote| End { local, remote };
    (end(a, towards_b), end(b, towards_a))
}

fn stamp(secs: u64) -> Tai64n {
    Tai64n::next(Duration::from_secs(secs), None)
}

impl End {
    fn initiate(&self, rng: &mut StdRng, cookie: Option<&Cookie>) -> (Initiated, [u8; 148]) {
        let mut out = [0; 148];
        let index = rng.random();
        let initiated = initiation(
            &self.local,
            &self.remote,
            index,
            stamp(7),
            cookie,
            rng,
            &mut out,
        )
        .expect("usable keys");
        assert_eq!(initiated.index(), index);
        (initiated, out)
    }

    fn receive(&self, message: &[u8]) -> Result<ConsumedInitiation, Error> {
        let peeked = peek_initiation(&self.local, message)?;
        consume_initiation(&peeked, &self.remote)
    }

    fn respond(&self, rng: &mut StdRng, message: &[u8]) -> (TransportKeys, [u8; 92]) {
        let received = self.receive(message).expect("a good initiation");
        let mut out = [0; 92];
        let index = rng.random();
        let (keys, _mac1) = response(&self.remote, received, index, None, rng, &mut out)
            .expect("usable ephemeral key");
        (keys, out)
    }

    fn finish(&self, initiated: &Initiated, message: &[u8]) -> Result<TransportKeys, Error> {
        consume_response(&self.local, &self.remote, initiated, message)
    }
}

fn assert_joined(a: &TransportKeys, b: &TransportKeys) {
    assert_eq!(*a.send, *b.receive);
    assert_eq!(*a.receive, *b.send);
    assert_ne!(*a.send, *a.receive);
    assert_eq!(
        (a.local_index, a.remote_index),
        (b.remote_index, b.local_index)
    );
}

#[test]
fn both_ends_agree_on_keys_with_and_without_a_preshared_key() {
    let mut rng = seeded();
    for preshared in [false, true] {
        for _ in 0..5 {
            let (a, b) = ends(&mut rng, preshared);
            let (initiated, message) = a.initiate(&mut rng, None);
            let peeked = peek_initiation(&b.local, &message).unwrap();
            assert_eq!(peeked.peer(), a.local.public());
            let received = consume_initiation(&peeked, &b.remote).unwrap();
            assert_eq!(received.timestamp(), stamp(7));
            assert_eq!(received.sender_index(), initiated.index());
            let (theirs, answer) = b.respond(&mut rng, &message);
            assert_joined(&a.finish(&initiated, &answer).unwrap(), &theirs);
        }
    }
}

#[test]
fn two_responses_to_one_initiation_differ_in_everything_secret() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, true);
    let (initiated, message) = a.initiate(&mut rng, None);
    let (first, answer) = b.respond(&mut rng, &message);
    let (second, _) = b.respond(&mut rng, &message);
    assert_ne!(*first.send, *second.send);
    assert_ne!(*first.receive, *second.receive);
    assert_joined(&a.finish(&initiated, &answer).unwrap(), &first);
}

#[test]
fn an_outstanding_initiation_survives_export_and_import() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, true);
    let (initiated, message) = a.initiate(&mut rng, None);
    let (theirs, answer) = b.respond(&mut rng, &message);
    let moved = Initiated::import(&initiated.export());
    assert_eq!(moved.index(), initiated.index());
    assert_eq!(moved.mac1(), initiated.mac1());
    assert_joined(&a.finish(&moved, &answer).unwrap(), &theirs);
}

#[test]
fn a_changed_private_or_preshared_key_counts_from_the_next_handshake() {
    let mut rng = seeded();
    let (mut a, mut b) = ends(&mut rng, false);
    b.local = LocalKeys::new(&rng.random());
    b.remote = Remote::new(&b.local, a.local.public(), None);
    a.remote = Remote::new(&a.local, b.local.public(), Some(&[9; 32]));
    b.remote.set_preshared(Some(&[9; 32]));
    let (initiated, message) = a.initiate(&mut rng, None);
    let (theirs, answer) = b.respond(&mut rng, &message);
    assert_joined(&a.finish(&initiated, &answer).unwrap(), &theirs);
}

#[test]
fn secrets_stay_out_of_debug_output() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, true);
    let (initiated, message) = a.initiate(&mut rng, None);
    let peeked = peek_initiation(&b.local, &message).unwrap();
    let (keys, _) = b.respond(&mut rng, &message);
    let text = format!(
        "{:?} {:?} {initiated:?} {peeked:?} {keys:?} {:?}",
        a.local,
        a.remote,
        Cookie([0xab; 16])
    );
    // Whatever a byte array prints as has commas between; so would a derived Debug. An index may end as a
    // byte of the cookie does.
    assert!(!text.contains("171, 171") && !text.contains('['), "{text}");
    assert!(text.len() < 250, "{text}");
}
