//! Handshakes: what a responder can answer in a second, alone and behind the gate with and without
//! cookies, what a refusal costs, and boringtun's responder beside it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use ringtail_dataplane::noise::{
    CookieStore, Gate, LocalKeys, PeekedInitiation, Remote, Standing, Tai64n, Verdict,
    consume_initiation, consume_response, initiation, peek_initiation, response,
};
use x25519_dalek::{PublicKey, StaticSecret};

/// Addresses that take turns, so that none is over the limit of a source; few enough that the gate's
/// table has a place for each.
const SOURCES: u32 = 200;

struct End {
    local: LocalKeys,
    remote: Remote,
}

fn ends() -> (End, End) {
    let (a, b) = (LocalKeys::new(&[1; 32]), LocalKeys::new(&[2; 32]));
    let psk = [3; 32];
    let (to_b, to_a) = (
        Remote::new(&a, b.public(), Some(&psk)),
        Remote::new(&b, a.public(), Some(&psk)),
    );
    let end = |local, remote| End { local, remote };
    (end(a, to_b), end(b, to_a))
}

impl End {
    fn initiate(&self, cookies: &mut CookieStore, now: Instant, rng: &mut StdRng) -> [u8; 148] {
        let mut out = [0; 148];
        let stamp = Tai64n::next(Duration::from_secs(1), None);
        let cookie = cookies.cookie(now).cloned();
        let cookie = cookie.as_ref();
        let initiated = initiation(&self.local, &self.remote, 7, stamp, cookie, rng, &mut out);
        cookies.sent(initiated.expect("a usable key").mac1());
        out
    }

    fn answer(&self, peeked: &PeekedInitiation, rng: &mut StdRng) -> [u8; 92] {
        let mut out = [0; 92];
        let received = consume_initiation(peeked, &self.remote).expect("authentic");
        response(&self.remote, received, 9, None, rng, &mut out).expect("a usable key");
        out
    }
}

/// What becomes of a message; who needs a cookie gets it at once.
fn handle(
    gate: &mut Gate,
    now: Instant,
    from: SocketAddr,
    message: &[u8],
    rng: &mut StdRng,
    reply: &mut [u8; 64],
) -> Verdict {
    let verdict = gate.handle(now, from, Standing::Stranger, message, rng);
    if let Verdict::Unproven(novelty) = verdict
        && let Err(reason) = gate.challenge(now, from, novelty, message, rng, reply)
    {
        return Verdict::Drop(reason);
    }
    verdict
}

fn source(n: u32) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::from(0x0a00_0000 + n % SOURCES), 7))
}

#[expect(clippy::disallowed_methods, reason = "any moment to count from")]
fn ours(c: &mut Criterion) {
    let mut rng = StdRng::seed_from_u64(1);
    let rng = &mut rng;
    let now = Instant::now();
    let (a, b) = ends();
    let local = || Some(Arc::new(LocalKeys::new(&[2; 32])));
    let message = a.initiate(&mut CookieStore::default(), now, rng);
    let mut reply = [0; 64];
    let mut group = c.benchmark_group("handshake");
    group.throughput(Throughput::Elements(1));

    group.bench_function("responder", |bench| {
        bench.iter(|| {
            let peeked = peek_initiation(&b.local, &message).expect("for us");
            b.answer(&peeked, rng)
        });
    });
    group.bench_function("responder_behind_gate", |bench| {
        let mut gate = Gate::new(now, local(), rng);
        let mut now = now;
        bench.iter(|| {
            now += Duration::from_millis(10);
            let Verdict::Initiation(peeked) =
                handle(&mut gate, now, source(0), &message, rng, &mut reply)
            else {
                panic!("not taken")
            };
            b.answer(&peeked, rng)
        });
    });
    let mut gate = Gate::new(now, local(), rng);
    let mut proven_now = now;
    while !gate.under_load(now) {
        handle(&mut gate, now, source(0), &message, rng, &mut reply);
    }
    let messages: Vec<[u8; 148]> = (0..SOURCES)
        .map(|n| {
            // As fast as cookies are given out.
            proven_now += Duration::from_millis(1);
            let mut cookies = CookieStore::default();
            let message = a.initiate(&mut cookies, proven_now, rng);
            let verdict = handle(&mut gate, proven_now, source(n), &message, rng, &mut reply);
            assert!(matches!(verdict, Verdict::Unproven(_)));
            cookies
                .receive(proven_now, &a.remote, &reply)
                .expect("a cookie");
            a.initiate(&mut cookies, proven_now, rng)
        })
        .collect();
    let mut n = 0;
    group.bench_function("responder_with_cookies", |bench| {
        bench.iter(|| {
            // The secret lasts two minutes of this clock: it goes on by what the sources need.
            n += 1;
            if n % SOURCES == 0 {
                proven_now += Duration::from_millis(51);
            }
            let message = &messages[(n % SOURCES) as usize];
            let verdict = handle(&mut gate, proven_now, source(n), message, rng, &mut reply);
            let Verdict::Initiation(peeked) = verdict else {
                panic!("not taken: {verdict:?}")
            };
            b.answer(&peeked, rng)
        });
    });
    group.bench_function("initiator", |bench| {
        let mut out = [0; 148];
        let stamp = Tai64n::next(Duration::from_secs(1), None);
        bench.iter_batched(
            || {
                let mut rng = StdRng::seed_from_u64(5);
                let initiated = initiation(&a.local, &a.remote, 7, stamp, None, &mut rng, &mut out);
                let peeked = peek_initiation(&b.local, &out).expect("for us");
                (
                    initiated.expect("a usable key"),
                    b.answer(&peeked, &mut rng),
                )
            },
            |(initiated, answer)| {
                let mut out = [0; 148];
                let again = initiation(&a.local, &a.remote, 8, stamp, None, rng, &mut out);
                let keys = consume_response(&a.local, &a.remote, &initiated, &answer);
                (again.map(|_| out), keys.expect("an answer"))
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("refusal_wrong_mac1", |bench| {
        let mut gate = Gate::new(now, local(), rng);
        let mut message = message;
        message[20] ^= 1;
        bench.iter(|| handle(&mut gate, now, source(0), &message, rng, &mut reply));
    });
    group.bench_function("refusal_with_cookie_reply", |bench| {
        let mut gate = Gate::new(now, local(), rng);
        let mut now = now;
        while !gate.under_load(now) {
            handle(&mut gate, now, source(0), &message, rng, &mut reply);
        }
        bench.iter(|| {
            // As fast as cookies are given to who asks again.
            now += Duration::from_millis(2);
            let verdict = handle(&mut gate, now, source(0), &message, rng, &mut reply);
            assert!(matches!(verdict, Verdict::Unproven(_)));
        });
    });
    group.bench_function("refusal_wrong_cookie", |bench| {
        let mut gate = Gate::new(now, local(), rng);
        while !gate.under_load(now) {
            handle(&mut gate, now, source(0), &message, rng, &mut reply);
        }
        let mut message = message;
        rng.fill_bytes(&mut message[132..]);
        bench.iter(|| handle(&mut gate, now, source(0), &message, rng, &mut reply));
    });
    group.finish();
}

/// boringtun's responder, given initiations of boringtun's initiator: it wants rising timestamps.
fn boringtun(c: &mut Criterion) {
    let private = |n: u8| StaticSecret::from([n; 32]).to_bytes();
    let public = |n: u8| PublicKey::from(&StaticSecret::from([n; 32])).to_bytes();
    let limiter = |n: u8, limit| Arc::new(RateLimiter::new(&public(n).into(), limit));
    let tunn = |own: u8, other: u8| {
        let psk = Some([3; 32]);
        let limiter = limiter(own, u64::MAX);
        Tunn::new(
            private(own).into(),
            public(other).into(),
            psk,
            None,
            own.into(),
            Some(limiter),
        )
    };
    let mut initiator = tunn(1, 2);
    let mut next = || {
        let mut out = [0; 256];
        let TunnResult::WriteToNetwork(message) =
            initiator.format_handshake_initiation(&mut out, true)
        else {
            panic!("no message")
        };
        message.to_vec()
    };
    let answer = |responder: &mut Tunn, message: &[u8]| {
        let mut out = [0; 256];
        assert!(matches!(
            responder.decapsulate(None, message, &mut out),
            TunnResult::WriteToNetwork(_)
        ));
        out
    };
    let mut group = c.benchmark_group("handshake_boringtun");
    group.throughput(Throughput::Elements(1));
    group.bench_function("responder", |bench| {
        let mut responder = tunn(2, 1);
        bench.iter_batched(
            &mut next,
            |message| answer(&mut responder, &message),
            BatchSize::SmallInput,
        );
    });
    // What a node with many peers does: find out whose it is, then do it all again.
    group.bench_function("responder_behind_limiter", |bench| {
        let mut responder = tunn(2, 1);
        let limiter = limiter(2, u64::MAX);
        let (private, public) = (private(2).into(), public(2).into());
        bench.iter_batched(
            &mut next,
            |message| {
                let mut out = [0; 64];
                let from = Some(source(0).ip());
                match limiter.verify_packet(from, &message, &mut out) {
                    Ok(Packet::HandshakeInit(packet)) => {
                        parse_handshake_anon(&private, &public, &packet).expect("for us");
                    }
                    other => panic!("{other:?}"),
                }
                answer(&mut responder, &message)
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("refusal_with_cookie_reply", |bench| {
        let limiter = limiter(2, 0);
        let message = next();
        bench.iter(|| {
            let mut out = [0; 64];
            let from = Some(source(0).ip());
            let refused = limiter.verify_packet(from, &message, &mut out);
            assert!(matches!(refused, Err(TunnResult::WriteToNetwork(_))));
            out
        });
    });
    group.finish();
}

criterion_group!(benches, ours, boringtun);
criterion_main!(benches);
