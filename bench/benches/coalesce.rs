//! Merging opened packets for the TUN, per packet, with checksum verification.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringtail_dataplane::coalesce::Coalescer;
use ringtail_dataplane::packet::build::{Builder, Tcp};
use ringtail_dataplane::packet::header::Headers;
use std::hint::black_box;
use std::net::SocketAddr;

/// 96 TCP packets of 1368 bytes of `flows` connections, taking turns.
fn tcp(flows: u16) -> Vec<Vec<u8>> {
    (0..96u16)
        .map(|i| {
            let src = SocketAddr::from(([100, 64, 0, 1], 40_000 + i % flows));
            let dst = SocketAddr::from(([100, 64, 0, 2], 5201));
            let seq = u32::from(i / flows) * 1368;
            let tcp = Tcp {
                seq,
                ack: 1,
                flags: 0x10,
                window: 500,
                options: &[1; 12],
            };
            Builder::new(src, dst).tcp(&tcp, &[0x5a; 1368])
        })
        .collect()
}

/// 96 UDP packets of `flows` flows, taking turns.
fn udp(flows: u16, len: usize) -> Vec<Vec<u8>> {
    (0..96u16)
        .map(|i| {
            let src = SocketAddr::from(([100, 64, 0, 1], 40_000 + i % flows));
            let dst = SocketAddr::from(([100, 64, 0, 2], 5201));
            Builder::new(src, dst).udp(&vec![0x5a; len])
        })
        .collect()
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("coalesce");
    for (name, packets) in [
        ("tcp 1 flow", tcp(1)),
        ("tcp 4 flows", tcp(4)),
        ("udp 1 flow 1380", udp(1, 1380)),
        ("udp 1 flow 200", udp(1, 200)),
        ("udp 96 flows 200", udp(96, 200)),
    ] {
        let mut coalescer = Coalescer::new();
        group.throughput(Throughput::Elements(packets.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                for packet in &packets {
                    let packet = black_box(packet);
                    if let Ok(headers) = Headers::parse(packet) {
                        let _ = coalescer.push(&headers, packet, 0);
                    }
                }
                let batch = coalescer.take();
                let writes = batch.len();
                coalescer.recycle(batch);
                writes
            });
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
