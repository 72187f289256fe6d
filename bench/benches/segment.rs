//! Cutting a TUN super-packet into segments with finished checksums: copied out, and made in place.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringtail_dataplane::bench_support::super_packet;
use ringtail_dataplane::packet::segment::plan;
use std::hint::black_box;

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("segment");
    for (name, segments, gso_size) in [("48 of 1368", 48, 1368u16), ("lone 1368", 1, 1368)] {
        let (vnet, packet) = super_packet(usize::from(gso_size) * segments - 200, gso_size);
        let mut out = vec![0; 2048];
        group.throughput(Throughput::Elements(segments as u64));
        group.bench_function(format!("write {name}"), |b| {
            b.iter(|| {
                let Ok(plan) = plan(black_box(&vnet), black_box(&packet)) else {
                    return 0;
                };
                (0..plan.len())
                    .map(|i| plan.write(i, &packet, &mut out))
                    .sum::<usize>()
            });
        });
        let mut staged = packet.clone();
        group.bench_function(format!("stage {name}"), |b| {
            b.iter(|| {
                let Ok(plan) = plan(black_box(&vnet), black_box(&packet)) else {
                    return 0;
                };
                (0..plan.len())
                    .map(|i| black_box(plan.stage(i, &mut staged)).len())
                    .sum::<usize>()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
