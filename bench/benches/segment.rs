//! Cutting a TUN super-packet into segments with finished checksums: copied out, and made in place.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringtail_dataplane::packet::build::{Builder, Tcp};
use ringtail_dataplane::tun::segment::plan;
use ringtail_dataplane::tun::vnet::{GSO_TCPV4, VnetHdr};
use std::hint::black_box;
use std::net::SocketAddr;

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("segment");
    let src = SocketAddr::from(([100, 64, 0, 1], 40_000));
    let dst = SocketAddr::from(([100, 64, 0, 2], 5201));
    let tcp = Tcp {
        seq: 1,
        ack: 1,
        flags: 0x18,
        window: 500,
        options: &[1; 12],
    };
    for (name, segments, gso_size) in [("48 of 1368", 48, 1368u16), ("lone 1368", 1, 1368)] {
        let payload = vec![0x5a; usize::from(gso_size) * segments - 200];
        let packet = Builder::new(src, dst).tcp(&tcp, &payload);
        let vnet = VnetHdr::new(GSO_TCPV4, 52, gso_size, 20, 16);
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
