//! A leak check of timing, after "Dude, is my code constant time?" (Reparaz, Balasch, Verbauwhede,
//! 2017): two classes of inputs in random order, and Welch's t between their times.
//!
//! `cargo bench -p ringtail-bench --bench aead_timing`, on a quiet machine. A |t| that stays below
//! 4.5 shows no leak; one that is above it and grows with the number of measurements shows one. The
//! last row is a control, a comparison that stops at the first difference: it must be found.

use std::hint::black_box;
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use ringtail_dataplane::aead::{Aead, Backend, HEADER_LEN, Key, Open, Seal};

const MEASUREMENTS: usize = 40_000;
const PACKETS: usize = 9;
const TEXT_LEN: usize = 300;
const LEN: usize = 32 + TEXT_LEN;
type Batch = [[u8; LEN]; PACKETS];

/// Mean and variance of a stream of numbers (Welford).
#[derive(Clone, Copy, Default)]
struct Moments {
    n: f64,
    mean: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, x: f64) {
        self.n += 1.0;
        let off = x - self.mean;
        self.mean += off / self.n;
        self.squares += off * (x - self.mean);
    }

    fn error(&self) -> f64 {
        self.squares / (self.n - 1.0) / self.n
    }
}

/// Welch's t between two classes, whose inputs `prepare` makes untimed. Times above the 90th
/// percentile are left out: they are the machine's, not the code's.
#[expect(clippy::disallowed_methods, reason = "a bench reads the clock")]
fn t<I>(mut prepare: impl FnMut(&mut StdRng, bool) -> I, mut work: impl FnMut(&mut I)) -> f64 {
    let mut rng = StdRng::seed_from_u64(1);
    let mut times: Vec<(bool, f64)> = Vec::with_capacity(MEASUREMENTS);
    for _ in 0..MEASUREMENTS {
        let class = rng.random();
        let mut input = prepare(&mut rng, class);
        let start = Instant::now();
        work(black_box(&mut input));
        times.push((class, start.elapsed().as_secs_f64()));
        black_box(&input);
    }
    let mut sorted: Vec<f64> = times.iter().map(|(_, time)| *time).collect();
    sorted.sort_by(f64::total_cmp);
    let limit = sorted[MEASUREMENTS * 9 / 10];
    let mut classes = [Moments::default(); 2];
    // The first thousand warm up.
    for (class, time) in times
        .into_iter()
        .skip(1000)
        .filter(|(_, time)| *time <= limit)
    {
        classes[usize::from(class)].add(time);
    }
    let [a, b] = classes;
    (a.mean - b.mean) / (a.error() + b.error()).sqrt()
}

fn seal(aead: Aead, key: &Key, batch: &mut Batch) {
    let mut counter = 0..;
    aead.seal(&mut batch.each_mut().map(|message| Seal {
        key,
        receiver: 1,
        counter: counter.next().unwrap_or_default(),
        message,
    }));
}

fn open(aead: Aead, key: &Key, batch: &mut Batch) {
    let mut counter = 0..;
    aead.open(&mut batch.each_mut().map(|message| Open {
        key,
        counter: counter.next().unwrap_or_default(),
        message,
        ok: false,
    }));
}

#[expect(clippy::print_stdout, reason = "the result")]
fn report(what: &str, t: f64) {
    let verdict = if t.abs() < 4.5 {
        "no leak seen"
    } else {
        "DIFFERENT"
    };
    println!("{what:<60} t = {t:8.2}  {verdict}");
}

fn main() {
    for aead in Backend::ALL.iter().copied().filter_map(Aead::force) {
        let name = aead.backend().name();
        let fixed_key = Key::new(&[7; 32]);

        // Key and text: all zero against random.
        let prepare = |rng: &mut StdRng, class: bool| {
            let mut bytes = [0; 32];
            let mut batch = Box::new([[0; LEN]; PACKETS]);
            let mut spare = [0; LEN];
            for message in batch.iter_mut() {
                // The same work for both classes, so that caches are alike.
                let into = if class { message } else { &mut spare };
                rng.fill_bytes(into);
            }
            let mut other = [0; 32];
            rng.fill_bytes(if class { &mut bytes } else { &mut other });
            black_box((spare, other));
            (Key::new(&bytes), batch)
        };
        let value = t(prepare, |(key, batch)| seal(aead, key, batch));
        report(&format!("{name}: seal, zero or random key and text"), value);

        // A wrong tag, in its first or its last byte, of the packet in the middle.
        let mut sealed: Batch = [[9; LEN]; PACKETS];
        seal(aead, &fixed_key, &mut sealed);
        let wrong = |_: &mut StdRng, class: bool| {
            let mut batch = Box::new(sealed);
            batch[PACKETS / 2][if class { LEN - 1 } else { LEN - 16 }] ^= 1;
            batch
        };
        let value = t(wrong, |batch| open(aead, &fixed_key, batch));
        report(
            &format!("{name}: open, first or last byte of a tag wrong"),
            value,
        );

        // The tag of another key's text, which differs everywhere, or in one bit.
        let wrong = |rng: &mut StdRng, class: bool| {
            let mut batch = Box::new(sealed);
            let mut noise = [0; 16];
            rng.fill_bytes(&mut noise);
            let tag = &mut batch[PACKETS / 2][LEN - 16..];
            if !class {
                noise = [0; 16];
                noise[7] = 1;
            }
            tag.iter_mut()
                .zip(noise)
                .for_each(|(byte, noise)| *byte ^= noise);
            batch
        };
        let value = t(wrong, |batch| open(aead, &fixed_key, batch));
        report(
            &format!("{name}: open, one bit or all of a tag wrong"),
            value,
        );
    }

    // The control: what a comparison that stops early looks like to this test.
    let sealed = [9u8; LEN];
    let wrong = |_: &mut StdRng, class: bool| {
        let mut message = Box::new(sealed);
        message[if class { LEN - 1 } else { HEADER_LEN }] ^= 1;
        message
    };
    let value = t(wrong, |message| {
        for _ in 0..20 {
            black_box(
                black_box(&message[..])
                    .iter()
                    .zip(&sealed)
                    .all(|(a, b)| a == b),
            );
        }
    });
    report(
        "control: a comparison that stops at the first difference",
        value,
    );
}
