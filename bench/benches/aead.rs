//! ChaCha20-Poly1305 of whole batches: every backend that this machine can run, beside ring called
//! packet by packet.
//!
//! `cargo bench -p ringtail-bench --bench aead` times each shape on its own with criterion.
//! `cargo bench -p ringtail-bench --bench aead -- --ratios` prints a table of ratios to ring within
//! a minute: each shape is timed in turns of ours and ring's, and the fastest turn of each counts,
//! so that neither the clock's frequency nor a busy machine favours one.

use std::hint::black_box;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ringtail_dataplane::aead::{
    Aead, Backend, HEADER_LEN, Key, MESSAGE_LEN_MIN, Open, Seal, TAG_LEN,
};

const KEY: [u8; 32] = [7; 32];
const BATCHES: [usize; 6] = [1, 2, 4, 16, 45, 128];

/// Lengths of the texts of a batch.
struct Shape {
    name: String,
    lengths: Vec<usize>,
}

/// Equal lengths, and a mix as of a busy server: small, middling and full packets.
fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for len in [64, 200, 1420, 8900] {
        for batch in BATCHES {
            shapes.push(Shape {
                name: format!("{len} x {batch}"),
                lengths: vec![len; batch],
            });
        }
    }
    for batch in BATCHES {
        let mix = [1420, 52, 1420, 300, 1420, 1420, 120, 800];
        shapes.push(Shape {
            name: format!("mixed x {batch}"),
            lengths: mix.into_iter().cycle().take(batch).collect(),
        });
    }
    shapes
}

/// The messages of a batch, with what ring and ours need to work on them.
struct Messages {
    ours: Key,
    ring: LessSafeKey,
    buffers: Vec<Vec<u8>>,
    sealed: Vec<Vec<u8>>,
}

fn nonce(counter: usize) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&(counter as u64).to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Messages {
    fn new(shape: &Shape) -> Messages {
        let ring = UnboundKey::new(&CHACHA20_POLY1305, &KEY).expect("a key of 32 bytes");
        let buffer = |len: &usize| vec![0x5a; MESSAGE_LEN_MIN + len];
        let mut messages = Messages {
            ours: Key::new(&KEY),
            ring: LessSafeKey::new(ring),
            buffers: shape.lengths.iter().map(buffer).collect(),
            sealed: Vec::new(),
        };
        messages.seal_by_ring();
        messages.sealed = messages.buffers.clone();
        messages
    }

    fn restore(&mut self) {
        for (buffer, sealed) in self.buffers.iter_mut().zip(&self.sealed) {
            buffer.copy_from_slice(sealed);
        }
    }

    fn seal_by_ring(&mut self) {
        for (i, message) in self.buffers.iter_mut().enumerate() {
            let text_end = message.len() - TAG_LEN;
            let (text, room) = message.split_at_mut(text_end);
            let tag = self.ring.seal_in_place_separate_tag(
                nonce(i),
                Aad::empty(),
                &mut text[HEADER_LEN..],
            );
            room.copy_from_slice(tag.expect("short enough").as_ref());
        }
    }

    fn open_by_ring(&mut self) {
        for (i, message) in self.buffers.iter_mut().enumerate() {
            let text = &mut message[HEADER_LEN..];
            let opened = self.ring.open_in_place(nonce(i), Aad::empty(), text);
            black_box(opened.expect("sealed by ring"));
        }
    }

    fn seals(&mut self) -> Vec<Seal<'_>> {
        let packets = self.buffers.iter_mut().zip(0..);
        packets
            .map(|(message, counter)| Seal {
                key: &self.ours,
                receiver: 1,
                counter,
                message,
            })
            .collect()
    }

    fn opens(&mut self) -> Vec<Open<'_>> {
        let packets = self.buffers.iter_mut().zip(0..);
        packets
            .map(|(message, counter)| Open {
                key: &self.ours,
                counter,
                message,
                ok: false,
            })
            .collect()
    }
}

fn bench(c: &mut Criterion) {
    for shape in shapes() {
        let mut messages = Messages::new(&shape);
        let bytes = shape.lengths.iter().sum::<usize>() as u64;

        let mut group = c.benchmark_group(format!("seal {}", shape.name));
        group.throughput(Throughput::Bytes(bytes));
        for aead in backends() {
            let id = BenchmarkId::from_parameter(aead.backend().name());
            group.bench_function(id, |b| {
                let mut batch = messages.seals();
                b.iter(|| aead.seal(black_box(&mut batch)));
            });
        }
        let id = BenchmarkId::from_parameter("plain ring");
        group.bench_function(id, |b| b.iter(|| messages.seal_by_ring()));
        group.finish();

        // Opening needs a sealed message each time; putting it back is not timed.
        let mut group = c.benchmark_group(format!("open {}", shape.name));
        group.throughput(Throughput::Bytes(bytes));
        for aead in backends() {
            let id = BenchmarkId::from_parameter(aead.backend().name());
            group.bench_function(id, |b| {
                b.iter_custom(|rounds| {
                    (0..rounds)
                        .map(|_| {
                            messages.restore();
                            let mut batch = messages.opens();
                            timed(|| aead.open(black_box(&mut batch)))
                        })
                        .sum()
                });
            });
        }
        let id = BenchmarkId::from_parameter("plain ring");
        group.bench_function(id, |b| {
            b.iter_custom(|rounds| {
                (0..rounds)
                    .map(|_| {
                        messages.restore();
                        timed(|| messages.open_by_ring())
                    })
                    .sum()
            });
        });
        group.finish();
    }
}

fn backends() -> impl Iterator<Item = Aead> {
    Backend::ALL.iter().copied().filter_map(Aead::force)
}

#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
fn timed(work: impl FnOnce()) -> std::time::Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// The table of `--ratios`.
#[expect(clippy::print_stdout, reason = "the result")]
fn ratios() {
    println!("time per packet, and its ratio to ring called packet by packet");
    println!("shape, backend: seal ns, ratio; open ns, ratio");
    for shape in shapes() {
        let mut messages = Messages::new(&shape);
        let packets = shape.lengths.len() as f64;
        let bytes = shape.lengths.iter().sum::<usize>();
        let turns = (20_000_000 / (bytes + 500 * shape.lengths.len())).clamp(50, 2000);
        for aead in backends() {
            // Ring's and ours, sealing and opening.
            let mut best = [f64::INFINITY; 4];
            let mut keep = |i: usize, time: std::time::Duration| {
                best[i] = best[i].min(time.as_secs_f64() * 1e9 / packets);
            };
            for _ in 0..turns {
                keep(0, timed(|| messages.seal_by_ring()));
                let mut batch = messages.seals();
                keep(1, timed(|| aead.seal(&mut batch)));
                messages.restore();
                keep(2, timed(|| messages.open_by_ring()));
                messages.restore();
                let mut batch = messages.opens();
                keep(3, timed(|| aead.open(&mut batch)));
            }
            let [ring_seal, seal, ring_open, open] = best;
            println!(
                "{:>12}, {:>6}: {seal:8.0} {:.3}; {open:8.0} {:.3}",
                shape.name,
                aead.backend().name(),
                seal / ring_seal,
                open / ring_open,
            );
        }
    }
}

criterion_group!(benches, bench);

fn main() {
    if std::env::args().any(|arg| arg == "--ratios") {
        ratios();
    } else {
        benches();
        Criterion::default().configure_from_args().final_summary();
    }
}
