//! Our engine against boringtun's: one super-packet of 45 datagrams each way, a lone packet, and
//! super-packets of many peers in random order. Cutting is part of sealing in both.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use ringtail_dataplane::Engine;
use ringtail_dataplane::bench_support::{Sessions, super_packet};
use ringtail_dataplane::tun::vnet::VnetHdr;
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

/// A packet of so many full segments.
fn packet(segments: usize) -> (VnetHdr, Vec<u8>) {
    super_packet(usize::from(MSS) * segments, MSS)
}

fn shapes(c: &mut Criterion) {
    for segments in [45, 1] {
        let mut group = c.benchmark_group(format!("engine/{segments} of 1420"));
        group.throughput(Throughput::Elements(segments as u64));
        let (vnet, fresh) = packet(segments);
        for (name, engine) in ENGINES {
            let mut sessions = sessions(engine, 1);
            let mut packet = fresh.clone();
            group.bench_function(format!("seal {name}"), |b| {
                b.iter(|| sessions.seal(0, &vnet, &mut packet).0.len());
            });
            // Sealing and opening take turns, so both are borrowed from one cell.
            let sessions = std::cell::RefCell::new(sessions);
            group.bench_function(format!("open {name}"), |b| {
                b.iter_batched(
                    || {
                        let mut packet = fresh.clone();
                        let mut sessions = sessions.borrow_mut();
                        let (datagrams, stride) = sessions.seal(0, &vnet, &mut packet);
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
    let (vnet, mut packet) = packet(segments);
    for peers in [1, 100, 10_000] {
        let mut group = c.benchmark_group(format!("engine/random of {peers} peers"));
        group.throughput(Throughput::Elements(segments as u64));
        for (name, engine) in ENGINES {
            let mut sessions = sessions(engine, peers);
            let mut rng = StdRng::seed_from_u64(1);
            group.bench_function(format!("seal and open {name}"), |b| {
                b.iter(|| {
                    let peer = rng.random_range(0..peers) as usize;
                    let (datagrams, stride) = sessions.seal(peer, &vnet, &mut packet);
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
