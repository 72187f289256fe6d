//! What one peer that joins and one that leaves cost among 1,000 and 10,000: the control side, which
//! makes the tables, and a shard, which takes them over while packets wait.

#![expect(clippy::disallowed_methods, reason = "any moment to count from")]

use std::hint::black_box;
use std::net::IpAddr;
use std::time::Instant;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use ringtail_dataplane::bench_support::Neighbours;
use ringtail_dataplane::{PeerConfig, PeerId, Prefix};

const SHARDS: usize = 2;

/// A peer with an address of each family.
fn peer(id: u32) -> PeerConfig {
    let mut public_key = [0x5a; 32];
    public_key[..4].copy_from_slice(&id.to_le_bytes());
    let v4 = IpAddr::V4((0x6440_0000 + id).into());
    let v6 = IpAddr::V6(((0xfd7a << 112) | u128::from(id)).into());
    let alone = |addr, bits| Prefix { addr, bits };
    PeerConfig {
        allowed_ips: vec![alone(v4, 32), alone(v6, 128)],
        ..PeerConfig::new(PeerId(id), public_key)
    }
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("peers");
    for count in [1_000, 10_000] {
        let mut all = Neighbours::new(Instant::now(), SHARDS);
        all.change((0..count).map(peer).collect(), &[]);
        all.hear();
        let new = peer(count);
        group.bench_function(format!("control, one of {count} joins and leaves"), |b| {
            b.iter_batched(
                || vec![new.clone()],
                |joins| {
                    all.change(joins, &[]);
                    all.change(Vec::new(), &[new.id]);
                },
                BatchSize::SmallInput,
            );
        });
        // The other shard takes over the same; who joins is this one's.
        let mine = (count..)
            .map(peer)
            .find(|new| {
                all.change(vec![new.clone()], &[]);
                let owned = all.hear() > 0 && all.owns(new.id);
                all.change(Vec::new(), &[new.id]);
                all.hear();
                owned
            })
            .unwrap_or_else(|| peer(count));
        group.bench_function(
            format!("control and shard, one of {count} joins and leaves"),
            |b| {
                b.iter_batched(
                    || vec![mine.clone()],
                    |joins| {
                        all.change(joins, &[]);
                        let joined = all.hear();
                        all.change(Vec::new(), &[mine.id]);
                        black_box(joined + all.hear())
                    },
                    BatchSize::SmallInput,
                );
            },
        );
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
