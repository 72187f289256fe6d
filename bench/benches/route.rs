//! Allowed-IPs: lookups in small and large tables, building, changing and emptying a large one.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringtail_dataplane::route::Table;
use ringtail_dataplane::{PeerId, Prefix};
use std::hint::black_box;
use std::net::IpAddr;

/// Prefixes of the scale test: 2,000 peers.
const PREFIXES: usize = 130_560;
const PEERS: u32 = 2_000;

/// Host routes of an overlay and a few subnets, both families.
fn overlay(n: usize) -> Vec<(PeerId, Prefix)> {
    (0..n)
        .map(|i| {
            let i = u32::try_from(i).unwrap_or(0);
            let (addr, bits) = match i % 8 {
                0 => (IpAddr::V4((0x0a00_0000 | (i << 8)).into()), 24),
                1..=3 => (IpAddr::V6(((0xfd7a << 112) | u128::from(i)).into()), 128),
                _ => (IpAddr::V4((0x6440_0000 + i).into()), 32),
            };
            (PeerId(i % PEERS), Prefix { addr, bits })
        })
        .collect()
}

/// Random prefixes of random lengths: every length in use.
fn random(n: usize) -> Vec<(PeerId, Prefix)> {
    let mut rng = StdRng::seed_from_u64(1);
    (0..n)
        .map(|_| {
            let addr = IpAddr::V4(rng.random::<u32>().into());
            (
                PeerId(rng.random_range(0..PEERS)),
                Prefix {
                    addr,
                    bits: rng.random_range(8..=32),
                },
            )
        })
        .collect()
}

fn table(prefixes: &[(PeerId, Prefix)]) -> Table {
    let mut table = Table::default();
    for (peer, prefix) in prefixes {
        table.insert(*prefix, *peer);
    }
    table
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("route");
    for (name, prefixes) in [
        ("overlay of 10", overlay(10)),
        ("overlay of 130560", overlay(PREFIXES)),
        ("random of 130560", random(PREFIXES)),
    ] {
        let table = table(&prefixes);
        let mut rng = StdRng::seed_from_u64(2);
        let addrs: Vec<IpAddr> = (0..4096)
            .map(|_| prefixes[rng.random_range(0..prefixes.len())].1.addr)
            .collect();
        let mut next = 0;
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("lookup, {name}"), |b| {
            b.iter(|| {
                next = (next + 1) % addrs.len();
                table.lookup(black_box(addrs[next]))
            });
        });
        group.bench_function(format!("repeated address, {name}"), |b| {
            let mut cursor = table.cursor();
            b.iter(|| cursor.lookup(black_box(addrs[0])));
        });
    }
    let prefixes = overlay(PREFIXES);
    group.sample_size(10);
    group.throughput(Throughput::Elements(PREFIXES as u64));
    group.bench_function("build 130560", |b| b.iter(|| table(&prefixes)));
    group.bench_function("build 130560, empty it", |b| {
        b.iter(|| {
            let mut table = table(&prefixes);
            for (peer, prefix) in &prefixes {
                table.remove(*prefix, *peer);
            }
            drop(black_box(table));
        });
    });
    // As for a peer that joins while every shard reads the table as it was.
    let table = table(&prefixes);
    let prefix = Prefix {
        addr: IpAddr::from([100, 127, 255, 254]),
        bits: 32,
    };
    group.throughput(Throughput::Elements(1));
    group.bench_function("copy of 130560, one more", |b| {
        b.iter(|| {
            let mut copy = table.clone();
            copy.insert(black_box(prefix), PeerId(PEERS));
            copy
        });
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
