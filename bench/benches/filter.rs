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

criterion_group!(benches, bench);
criterion_main!(benches);
