//! One end of a tunnel without a data plane around it: an engine with a single session, whose
//! messages are vectors. For the tests, and through [`crate::fuzzing`] for `dataplane/oracle`.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use zeroize::Zeroizing;

use super::{Engine, MESSAGE_LEN_MAX, Moment, OpenReport, Opened, Outcome, Session};
use crate::config;
use crate::packet::header::Headers;
use crate::packet::segment::plan;
use crate::packet::vnet::VnetHdr;
use crate::stats::DropReason;
use crate::types::PeerConfig;

/// One end of a tunnel.
#[expect(missing_debug_implementations, reason = "keys")]
pub struct End {
    pub(super) engine: Engine,
    pub(super) session: Session,
    pub(super) opened: Opened,
}

/// What opening datagrams gave.
#[derive(Debug)]
pub struct Got {
    /// How many were good, keep-alives included.
    pub report: OpenReport,
    /// The packets in them, without their padding.
    pub packets: Vec<Vec<u8>>,
    /// Why each of the others was dropped.
    pub dropped: Vec<DropReason>,
}

impl End {
    /// An end with its private key, on one shard, and its peer; packets are padded up to `mtu`
    /// bytes at most.
    #[must_use]
    pub fn new(
        kind: config::Engine,
        private_key: &Zeroizing<[u8; 32]>,
        mtu: usize,
        shard: u8,
        rng: StdRng,
        now: Instant,
        peer: &PeerConfig,
    ) -> End {
        let mut engine = Engine::new(kind, private_key, mtu, shard, rng);
        let session = engine.session(now, peer);
        End {
            engine,
            session,
            opened: Opened::new(kind),
        }
    }

    /// True if it has keys to seal with.
    #[must_use]
    pub fn ready(&self, at: Moment) -> bool {
        self.session.ready(at.now)
    }

    /// True while an initiation of its own waits for its response.
    #[must_use]
    pub fn initiating(&self) -> bool {
        self.session.initiating()
    }

    /// When [`End::step`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.session.poll_timeout()
    }

    /// An initiation, unless one went out a moment ago; `again` makes another although one is
    /// outstanding.
    pub fn try_initiate(&mut self, at: Moment, again: bool) -> Option<Vec<u8>> {
        let mut out = [0; MESSAGE_LEN_MAX];
        let len = self
            .session
            .initiate(&mut self.engine, at, again, &mut out)?;
        Some(out[..len].to_vec())
    }

    /// An initiation, although one may be outstanding.
    ///
    /// # Panics
    /// If one went out a moment ago.
    pub fn initiate(&mut self, at: Moment) -> Vec<u8> {
        self.try_initiate(at, true).expect("an initiation")
    }

    /// Handles a handshake message; what it is answered with may be empty.
    ///
    /// # Errors
    /// The reason to drop it.
    pub fn handshake(
        &mut self,
        at: Moment,
        message: &[u8],
    ) -> Result<(Outcome, Vec<u8>), DropReason> {
        let mut out = [0; MESSAGE_LEN_MAX];
        let outcome =
            self.session
                .handle_handshake(&mut self.engine, at, message, None, &mut out)?;
        let len = outcome.message.unwrap_or(0);
        Ok((outcome, out[..len].to_vec()))
    }

    /// One step of time: at most one message.
    pub fn step(&mut self, at: Moment) -> (Outcome, Option<Vec<u8>>) {
        let mut out = [0; MESSAGE_LEN_MAX];
        let outcome = self
            .session
            .handle_timeout(&mut self.engine, at, Duration::ZERO, &mut out);
        (outcome, outcome.message.map(|len| out[..len].to_vec()))
    }

    /// Opens datagrams of one length (the last may be shorter) for one index as one run.
    ///
    /// # Panics
    /// If there is none, or the first has no index.
    pub fn open(&mut self, at: Moment, datagrams: &[&[u8]]) -> Got {
        let index = datagrams[0][4..].first_chunk().expect("an index");
        let index = u32::from_le_bytes(*index);
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

    /// Seals packets of one length (the last may be shorter) as one batch.
    ///
    /// # Errors
    /// The reason to drop them.
    ///
    /// # Panics
    /// If boringtun's kind has no keys, or seals fewer.
    pub fn try_seal_run(
        &mut self,
        at: Moment,
        packets: &[&[u8]],
    ) -> Result<Vec<Vec<u8>>, DropReason> {
        let mut run = Vec::new();
        let mut stride = None;
        for packet in packets {
            let plan = plan(&VnetHdr::PLAIN, packet)?;
            let len = self.engine.sealed_len(plan.segment_len(0));
            // What staging does not write is not zero by chance; and boringtun wants more room.
            let mut out = vec![0xaa; len + MESSAGE_LEN_MAX];
            let mut packet = packet.to_vec();
            let staged = self
                .session
                .stage(&mut self.engine, &plan, &mut packet, 0..1, &mut out);
            assert_eq!((staged.segments, staged.bytes), (1, len));
            run.extend_from_slice(&out[..len]);
            stride.get_or_insert(len);
        }
        let stride = stride.unwrap_or(1);
        self.session
            .seal(&mut self.engine, at.now, &mut run, stride)?;
        Ok(run.chunks(stride).map(<[u8]>::to_vec).collect())
    }

    /// Seals one packet.
    ///
    /// # Errors
    /// As [`End::try_seal_run`].
    pub fn try_seal(&mut self, at: Moment, packet: &[u8]) -> Result<Vec<u8>, DropReason> {
        self.try_seal_run(at, &[packet])
            .map(|mut sealed| sealed.remove(0))
    }

    /// Seals one packet.
    ///
    /// # Panics
    /// If there are no keys.
    pub fn seal(&mut self, at: Moment, packet: &[u8]) -> Vec<u8> {
        self.try_seal(at, packet).expect("there are keys")
    }

    /// Goes on as if that many messages had been sealed under the current keys; boringtun's kind
    /// and an end without keys do nothing.
    pub fn use_up(&mut self, counters: u64) {
        match &mut self.session {
            Session::Ours(machine) => machine.use_up(counters),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(_) => {}
        }
    }
}
