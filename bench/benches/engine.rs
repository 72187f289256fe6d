//! Our engine against boringtun's: one super-packet of 45 datagrams each way, a lone packet, and
//! super-packets of many peers in random order. Cutting is part of sealing in both.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use ringtail_dataplane::Engine;
use ringtail_dataplane::bench_support::{Sessions, super_packet};
use ringtail_dataplane::packet::vnet::VnetHdr;
use std::time::Instant;

const MTU: usize = 1420;
/// Payload of a full segment behind 52 bytes of headers.
const MSS: u16 = 1368;
const ENGINES: [(&str, Engine); 2] = [
    ("ringtail", Engine::Ringtail),
    ("boringtun", Engine::Boringtun),
];

#[expect(clippy::disallowed_methods, reason = "any moment to count from")]
fn sessions(engine: Engine, peers: u32) -> Sessions {
    Sessions::new(engine, Instant::now(), peers, MTU)
}

/// A packet of so many full segments, as often as it is wanted: boringtun cuts it in place.
struct Source {
    vnet: VnetHdr,
    headers: [u8; 52],
    packet: Vec<u8>,
}

impl Source {
    fn new(segments: usize) -> Source {
        let (vnet, packet) = super_packet(usize::from(MSS) * segments, MSS);
        let headers = *packet.first_chunk().expect("the headers are there");
        Source {
            vnet,
            headers,
            packet,
        }
    }

    /// The sealed datagrams, and the length of each but the last.
    fn seal<'a>(&mut self, sessions: &'a mut Sessions, peer: usize) -> (&'a mut [u8], usize) {
        self.packet[..self.headers.len()].copy_from_slice(&self.headers);
        let sealed = sessions.seal(peer, &self.vnet, &mut self.packet);
        assert!(sealed.0.len() > self.packet.len(), "all of it");
        sealed
    }
}

fn shapes(c: &mut Criterion) {
    for segments in [45, 1] {
        let mut group = c.benchmark_group(format!("engine/{segments} of 1420"));
        group.throughput(Throughput::Elements(segments as u64));
        let mut source = Source::new(segments);
        for (name, engine) in ENGINES {
            let mut sessions = sessions(engine, 1);
            group.bench_function(format!("seal {name}"), |b| {
                b.iter(|| source.seal(&mut sessions, 0).0.len());
            });
            // Sealing and opening take turns, so both are borrowed from one cell.
            let sessions = std::cell::RefCell::new(sessions);
            group.bench_function(format!("open {name}"), |b| {
                b.iter_batched(
                    || {
                        let mut sessions = sessions.borrow_mut();
                        let (datagrams, stride) = source.seal(&mut sessions, 0);
                        (datagrams.to_vec(), stride)
                    },
                    |(mut datagrams, stride)| sessions.borrow_mut().open(0, &mut datagrams, stride),
                    BatchSize::PerIteration,
                );
            });
        }
        group.finish();
    }
}

fn peers(c: &mut Criterion) {
    let segments = 45;
    let mut source = Source::new(segments);
    for peers in [1, 100, 10_000] {
        let mut group = c.benchmark_group(format!("engine/random of {peers} peers"));
        group.throughput(Throughput::Elements(segments as u64));
        for (name, engine) in ENGINES {
            let mut sessions = sessions(engine, peers);
            let mut rng = StdRng::seed_from_u64(1);
            group.bench_function(format!("seal and open {name}"), |b| {
                b.iter(|| {
                    let peer = rng.random_range(0..peers) as usize;
                    let (datagrams, stride) = source.seal(&mut sessions, peer);
                    let mut datagrams = datagrams.to_vec();
                    sessions.open(peer, &mut datagrams, stride)
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, shapes, peers);
criterion_main!(benches);
