//! Internet checksum of one packet: ours against the plain 16-bit loop.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ringtail_dataplane::packet::checksum;
use std::hint::black_box;

/// RFC 1071 as written, for comparison.
fn plain(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks_exact(2) {
        sum = sum.wrapping_add(u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    }
    let sum = (sum >> 16) + (sum & 0xffff);
    !u16::try_from((sum >> 16) + (sum & 0xffff)).unwrap_or(0)
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    let bytes = vec![0x5a; 65_536];
    for len in [40, 200, 1400, 8900, 65_000] {
        group.throughput(Throughput::Bytes(len as u64));
        let slice = &bytes[..len];
        group.bench_with_input(BenchmarkId::new("ours", len), slice, |b, slice| {
            b.iter(|| checksum::of(black_box(slice)));
        });
        group.bench_with_input(BenchmarkId::new("plain", len), slice, |b, slice| {
            b.iter(|| plain(black_box(slice)));
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
