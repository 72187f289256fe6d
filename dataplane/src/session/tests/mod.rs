//! Two sessions joined by hand, under a clock that the tests move: every message is carried over,
//! lost or doubled by the test. What holds for both kinds of sessions is tested with both.

mod basics;
mod network;
mod oracle;
mod rules;

use std::sync::LazyLock;

use rand::SeedableRng;
use x25519_dalek::{PublicKey, StaticSecret};

use super::*;
use crate::packet::header::Headers;
use crate::tun::segment::plan;
use crate::tun::vnet::VnetHdr;

const MTU: usize = 1420;
/// What a keep-alive is long.
const KEEPALIVE_LEN: usize = 32;

#[expect(clippy::disallowed_methods, reason = "any moment to count from")]
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

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
    }
}

/// One end of a tunnel.
struct End {
    engine: Engine,
    session: Session,
    opened: Opened,
}

/// What opening gave.
struct Got {
    report: OpenReport,
    packets: Vec<Vec<u8>>,
    dropped: Vec<DropReason>,
}

impl End {
    fn new(kind: config::Engine, own: u8, peer: &PeerConfig) -> End {
        let mut engine = Engine::new(kind, &private(own), MTU, own, rng(own));
        let session = engine.session(at(Duration::ZERO).now, peer);
        End {
            engine,
            session,
            opened: Opened::new(kind),
        }
    }

    fn machine(&mut self) -> &mut Machine {
        match &mut self.session {
            Session::Ours(machine) => machine,
            Session::Boringtun(_) => panic!("a session of ours"),
        }
    }

    fn ready(&self, at: Moment) -> bool {
        self.session.ready(at.now)
    }

    fn try_initiate(&mut self, at: Moment, again: bool) -> Option<Vec<u8>> {
        let mut out = [0; MESSAGE_LEN_MAX];
        let len = self
            .session
            .initiate(&mut self.engine, at, again, &mut out)?;
        Some(out[..len].to_vec())
    }

    fn initiate(&mut self, at: Moment) -> Vec<u8> {
        self.try_initiate(at, true).expect("an initiation")
    }

    fn handshake(&mut self, at: Moment, message: &[u8]) -> Result<(Outcome, Vec<u8>), DropReason> {
        let mut out = [0; MESSAGE_LEN_MAX];
        let outcome =
            self.session
                .handle_handshake(&mut self.engine, at, message, None, &mut out)?;
        let len = outcome.message.unwrap_or(0);
        Ok((outcome, out[..len].to_vec()))
    }

    /// One step of time: at most one message.
    fn step(&mut self, at: Moment) -> (Outcome, Option<Vec<u8>>) {
        let mut out = [0; MESSAGE_LEN_MAX];
        let outcome = self
            .session
            .handle_timeout(&mut self.engine, at, Duration::ZERO, &mut out);
        (outcome, outcome.message.map(|len| out[..len].to_vec()))
    }

    /// Opens datagrams of one length (the last may be shorter) for one index as one run.
    fn open(&mut self, at: Moment, datagrams: &[&[u8]]) -> Got {
        let index = u32::from_le_bytes(*datagrams[0][4..].first_chunk().unwrap());
        let mut run = datagrams.concat();
        let mut dropped = Vec::new();
        let report = self.session.open(
            &mut self.engine,
            at.now,
            index,
            &mut run,
            datagrams[0].len(),
            &mut self.opened,
            |reason| dropped.push(reason),
        );
        let packets = (0..self.opened.len())
            .map(|i| {
                let packet = self.opened.packet(i, &run);
                let len = Headers::parse(packet).map_or(packet.len(), |headers| headers.total_len);
                packet[..len].to_vec()
            })
            .collect();
        Got {
            report,
            packets,
            dropped,
        }
    }

    fn try_seal(&mut self, at: Moment, packet: &[u8]) -> Result<Vec<u8>, DropReason> {
        let plan = plan(&VnetHdr::PLAIN, packet)?;
        let mut packet = packet.to_vec();
        let mut out = vec![0xaa; 3000];
        let range = 0..1;
        let staged = self
            .session
            .stage(&mut self.engine, &plan, &mut packet, range, &mut out);
        let len = self.engine.sealed_len(plan.segment_len(0));
        assert_eq!((staged.segments, staged.bytes), (1, len));
        out.truncate(len);
        self.session.seal(&mut self.engine, at.now, &mut out, len)?;
        Ok(out)
    }

    fn seal(&mut self, at: Moment, packet: &[u8]) -> Vec<u8> {
        self.try_seal(at, packet).expect("there are keys")
    }
}

/// Two ends with the private keys 1 and 2.
fn pair(kind: config::Engine) -> (End, End) {
    (
        End::new(kind, 1, &peer_config(2, None)),
        End::new(kind, 2, &peer_config(1, None)),
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
