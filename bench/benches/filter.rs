//! What one inbound packet costs in the filter, by rules and protocol, and one outbound one.

use criterion::{Criterion, criterion_group, criterion_main};
use ringtail_dataplane::filter::{CompiledRules, Filter, source_allowed};
use ringtail_dataplane::packet::build::{Builder, Tcp};
use ringtail_dataplane::packet::header::Headers;
use ringtail_dataplane::route::Table;
use ringtail_dataplane::{PeerId, Prefix, Rule, Rules};
use std::hint::black_box;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

/// A thousand rules: node i may reach one port of ours; everybody may reach another.
fn rules() -> Rules {
    let us = Prefix {
        addr: IpAddr::from([100, 64, 0, 1]),
        bits: 32,
    };
    let every = Prefix {
        addr: IpAddr::from([0, 0, 0, 0]),
        bits: 0,
    };
    let rule = |source, port| Rule {
        sources: vec![source],
        destinations: vec![(us, port, port)],
        protocols: vec![6, 17],
    };
    let node = |i: u32| Prefix {
        addr: IpAddr::V4((0x6440_0002 + i).into()),
        bits: 32,
    };
    Rules::List(
        (0..1000)
            .map(|i| rule(node(i), 22))
            .chain([rule(every, 53)])
            .collect(),
    )
}

/// So many rules, of which the last lets everybody in by UDP at port 53, ping, and send GRE; the others
/// are about other ports, other hosts of ours, and single peers.
fn many(count: u32) -> Rules {
    let prefix = |addr: IpAddr, bits| Prefix { addr, bits };
    let every = || vec![prefix(IpAddr::from([0, 0, 0, 0]), 0)];
    let us = prefix(IpAddr::from([100, 64, 0, 1]), 32);
    let host = |i: u32| prefix(IpAddr::V4((0x0a00_0000 + i).into()), 32);
    let port = |i: u32| u16::try_from(1000 + 3 * (i % 10_000)).unwrap_or(u16::MAX);
    let other = |i| Rule {
        sources: if i % 3 == 0 { vec![host(i)] } else { every() },
        destinations: vec![if i % 3 == 1 {
            (host(i), 1, 1000)
        } else {
            (us, port(i), port(i))
        }],
        protocols: vec![6, 17, 1, 58],
    };
    let last = [(vec![6, 17, 1, 58], 53, 53), (vec![47], 0, u16::MAX)];
    let last = last.map(|(protocols, first, last)| Rule {
        sources: every(),
        destinations: vec![(us, first, last)],
        protocols,
    });
    Rules::List((1..count).map(other).chain(last).collect())
}

/// What a known flow costs with one rule and with ten thousand: alone, and taking turns with another, so
/// that the rules are asked every time.
fn known_flows(c: &mut Criterion) {
    let mut group = c.benchmark_group("filter: a known flow");
    #[expect(
        clippy::disallowed_methods,
        reason = "a bench is a driver: any moment to count from"
    )]
    let now = Instant::now();
    let us = SocketAddr::from(([100, 64, 0, 1], 53));
    let from = |last| Builder::new(SocketAddr::from(([100, 64, 0, last], 5000)), us);
    let kinds = [
        ("udp", [9, 10].map(|last| from(last).udp(&[1; 200]))),
        ("ping", [9, 10].map(|last| from(last).icmp(8, 0, &[1; 56]))),
        ("gre", [9, 10].map(|last| from(last).ip(47, &[1; 200]))),
    ];
    // As a node has it: told what is its own, and with a memory of who began what.
    let local = [Prefix {
        addr: us.ip(),
        bits: 32,
    }];
    for (rules, which) in [
        (Rules::AllowAll, "all allowed"),
        (many(1), "1 rules"),
        (many(10_000), "10000 rules"),
    ] {
        let rules = Arc::new(CompiledRules::compile(&rules, Some(&local)));
        let mut filter = Filter::new(now, rules);
        for (name, packets) in &kinds {
            let headers = packets.each_ref().map(|packet| Headers::parse(packet));
            let [Ok(one), Ok(other)] = headers else {
                continue;
            };
            let headers = [one, other];
            assert!(filter.admit(now, &headers[0], &packets[0]).is_ok());
            group.bench_function(format!("{name}, {which}"), |b| {
                b.iter(|| filter.admit(now, black_box(&headers[0]), black_box(&packets[0])));
            });
            let mut turn = 0;
            group.bench_function(format!("{name} by turns, {which}"), |b| {
                b.iter(|| {
                    turn ^= 1;
                    filter.admit(now, black_box(&headers[turn]), black_box(&packets[turn]))
                });
            });
        }
        // The second is the answer to what came above.
        let out = [54, 53].map(|port| {
            let from = SocketAddr::new(us.ip(), port);
            let to = SocketAddr::from(([100, 64, 0, 9], 5000));
            Builder::new(from, to).udp(&[1; 200])
        });
        for (name, packet) in ["udp of ours", "udp answer"].iter().zip(&out) {
            let Ok(headers) = Headers::parse(packet) else {
                continue;
            };
            let _new = filter.remember(now, &headers, packet);
            group.bench_function(format!("{name} out, {which}"), |b| {
                b.iter(|| filter.remember(now, black_box(&headers), black_box(packet)));
            });
        }
    }
    group.finish();
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("filter");
    #[expect(
        clippy::disallowed_methods,
        reason = "a bench is a driver: any moment to count from"
    )]
    let now = Instant::now();
    let us = SocketAddr::from(([100, 64, 0, 1], 53));
    let them = SocketAddr::from(([100, 64, 0, 9], 5000));
    let udp = Builder::new(them, us).udp(&[1; 200]);
    let flags = |flags| Tcp {
        seq: 1,
        ack: 1,
        flags,
        window: 1,
        options: &[],
    };
    let ack = Builder::new(them, us).tcp(&flags(0x10), &[1; 200]);
    let syn = Builder::new(them, us).tcp(&flags(0x02), &[]);

    let mut allow_all = Filter::new(now, Arc::new(CompiledRules::allow_all()));
    let mut list = Filter::new(now, Arc::new(CompiledRules::compile(&rules(), None)));
    let mut inbound = |name: &str, filter: &mut Filter, packet: &[u8]| {
        let Ok(headers) = Headers::parse(packet) else {
            return;
        };
        group.bench_function(name, |b| {
            b.iter(|| filter.admit(now, black_box(&headers), black_box(packet)));
        });
    };
    inbound("allow all", &mut allow_all, &udp);
    inbound("1001 rules, tcp data", &mut list, &ack);
    inbound("1001 rules, tcp syn", &mut list, &syn);
    inbound("1001 rules, udp by rule", &mut list, &udp);
    let out = Builder::new(us, them).udp(&[1; 200]);
    if let Ok(headers) = Headers::parse(&out) {
        let _ = list.remember(now, &headers, &out);
        group.bench_function("remember a known flow", |b| {
            b.iter(|| list.remember(now, black_box(&headers), black_box(&out)));
        });
    }
    let Ok(headers) = Headers::parse(&udp) else {
        return;
    };
    group.bench_function("1001 rules, udp reply", |b| {
        b.iter(|| list.admit(now, black_box(&headers), black_box(&udp)));
    });
    let prefix = Prefix {
        addr: them.ip(),
        bits: 32,
    };
    let mut table = Table::default();
    table.insert(prefix, PeerId(1));
    group.bench_function("source allowed, fresh cursor", |b| {
        b.iter(|| source_allowed(&mut table.cursor(), PeerId(1), black_box(&headers)));
    });
    group.bench_function("headers parsed", |b| {
        b.iter(|| Headers::parse(black_box(&udp)))
    });
    group.finish();
}

criterion_group!(benches, bench, known_flows);
criterion_main!(benches);
