//! Two sessions joined by hand, under a clock that the tests move: every message is carried over,
//! lost or doubled by the test. What holds for both kinds of sessions is tested with both.

mod basics;
mod network;
mod rules;

use std::sync::LazyLock;

use x25519_dalek::{PublicKey, StaticSecret};

use super::*;

const OURS: config::Engine = config::Engine::Ringtail;
const MTU: usize = 1420;
/// What a keep-alive is long.
const KEEPALIVE_LEN: usize = 32;

static START: LazyLock<Instant> = LazyLock::new(crate::sys::now);

/// So long after the tests' beginning.
fn at(offset: Duration) -> Moment {
    Moment {
        now: *START + offset,
        wall: Duration::from_secs(1_700_000_000) + offset,
    }
}

fn secs(seconds: f64) -> Moment {
    at(Duration::from_secs_f64(seconds))
}

fn private(n: u8) -> Zeroizing<[u8; 32]> {
    Zeroizing::new([n; 32])
}

fn public(n: u8) -> [u8; 32] {
    *PublicKey::from(&StaticSecret::from([n; 32])).as_bytes()
}

fn rng(n: u8) -> StdRng {
    StdRng::seed_from_u64(u64::from(n))
}

fn peer_config(key: u8, keepalive: Option<u16>) -> PeerConfig {
    PeerConfig {
        id: PeerId(u32::from(key)),
        public_key: public(key),
        preshared_key: Some(Zeroizing::new([9; 32])),
        allowed_ips: vec![],
        persistent_keepalive: keepalive,
        outsider: false,
    }
}

/// An end with the private key `own`.
fn end(kind: config::Engine, own: u8, peer: &PeerConfig) -> End {
    let start = at(Duration::ZERO).now;
    End::new(kind, &private(own), MTU, own, rng(own), start, peer)
}

impl End {
    fn initiate_once(&mut self, at: Moment) -> Option<Vec<u8>> {
        let mut out = [0; MESSAGE_LEN_MAX];
        let made = self.session.initiate_once(&mut self.engine, at, &mut out);
        assert!(made.is_none() || made == Some(crate::noise::INITIATION_LEN));
        made.map(|len| out[..len].to_vec())
    }

    fn machine(&mut self) -> &mut Machine {
        match &mut self.session {
            Session::Ours(machine) => machine,
            Session::Boringtun(_) => panic!("a session of ours"),
        }
    }
}

/// Two ends with the private keys 1 and 2.
fn pair(kind: config::Engine) -> (End, End) {
    (
        end(kind, 1, &peer_config(2, None)),
        end(kind, 2, &peer_config(1, None)),
    )
}

/// An IPv4 packet of `len` bytes with an unassigned protocol.
fn ipv4(len: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; len];
    packet[..20].copy_from_slice(&[
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 253, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
    packet
}

/// Runs a whole handshake that `a` starts, without any time passing.
fn shake(at: Moment, a: &mut End, b: &mut End) {
    let initiation = a.initiate(at);
    let (outcome, response) = b.handshake(at, &initiation).unwrap();
    assert_eq!((outcome.handshake, outcome.change), (true, Change::Same));
    let (outcome, keepalive) = a.handshake(at, &response).unwrap();
    assert_eq!((outcome.handshake, outcome.change), (false, Change::Up));
    assert!(a.ready(at) && !a.session.initiating());
    let got = b.open(at, &[&keepalive]);
    assert_eq!((got.report.datagrams, got.report.change), (1, Change::Up));
    assert!(b.ready(at));
}

/// Both begin, and both answers are written: of `a`, and of `b`.
fn cross(at: Moment, a: &mut End, b: &mut End) -> [Vec<u8>; 2] {
    let (from_a, from_b) = (a.initiate(at), b.initiate(at));
    let (_, of_a) = a.handshake(at, &from_b).unwrap();
    let (_, of_b) = b.handshake(at, &from_a).unwrap();
    [of_a, of_b]
}

/// A pair with keys from second 0, begun by `a`.
fn joined(kind: config::Engine) -> (End, End) {
    let (mut a, mut b) = pair(kind);
    shake(secs(0.0), &mut a, &mut b);
    (a, b)
}

/// The tables of this room's doc and of [`crate::noise`]'s name tests that exist.
#[test]
fn the_tables_of_the_papers_rules_name_tests_that_exist() {
    let session = [
        ("rules", include_str!("rules.rs")),
        ("basics", include_str!("basics.rs")),
        ("network", include_str!("network.rs")),
        ("window", include_str!("../window.rs")),
        ("keypair", include_str!("../keypair.rs")),
        ("model", include_str!("../model.rs")),
        ("peer", include_str!("../../peer/tests.rs")),
    ];
    let noise = [
        ("mod", include_str!("../../noise/tests/mod.rs")),
        ("known", include_str!("../../noise/tests/known.rs")),
        ("gate", include_str!("../../noise/tests/gate.rs")),
        ("cookies", include_str!("../../noise/tests/cookies.rs")),
        ("refusals", include_str!("../../noise/tests/refusals.rs")),
        ("oracle", include_str!("../../noise/tests/oracle.rs")),
        ("tai64n", include_str!("../../noise/tai64n.rs")),
        ("session", include_str!("rules.rs")),
    ];
    let tables: [(_, &[(&str, &str)]); 2] = [
        (include_str!("../mod.rs"), &session),
        (include_str!("../../noise/mod.rs"), &noise),
    ];
    for (doc, sources) in tables {
        let rows = doc.lines().filter_map(|line| line.strip_prefix("//! | "));
        let rows: Vec<&str> = rows.filter(|row| row.contains('`')).collect();
        assert!(rows.len() > 15, "there is a table");
        for row in rows {
            let (_, tests) = row.split_once(" | ").expect("two columns");
            for name in tests.split('`').skip(1).step_by(2) {
                let (file, test) = match name.split_once("::") {
                    Some(path) => path,
                    // All tests of a file, or one of the first.
                    None if sources.iter().any(|(file, _)| *file == name) => (name, "…"),
                    None => (sources[0].0, name),
                };
                let source = sources.iter().find(|source| source.0 == file);
                let (_, source) = source.unwrap_or_else(|| panic!("no file for {name}"));
                let function = match test.strip_suffix('…') {
                    Some(start) => format!("#[test]\nfn {start}"),
                    None => format!("#[test]\nfn {test}("),
                };
                let source = source.replace("\n    ", "\n");
                assert!(source.contains(&function), "no test {name}");
            }
        }
    }
}
