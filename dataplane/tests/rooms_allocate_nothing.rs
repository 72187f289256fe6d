//! After warm-up the pure rooms allocate nothing: a counting allocator watches.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ringtail_dataplane::aead::{Aead, Backend, Key, MESSAGE_LEN_MIN, Open, Seal};
use ringtail_dataplane::bench_support::Sessions;
use ringtail_dataplane::classify::classify;
use ringtail_dataplane::coalesce::Coalescer;
use ringtail_dataplane::filter::{CompiledRules, Filter, source_allowed};
use ringtail_dataplane::packet::build::{Builder, Tcp};
use ringtail_dataplane::packet::header::Headers;
use ringtail_dataplane::packet::segment::plan;
use ringtail_dataplane::packet::vnet::{GSO_TCPV4, VnetHdr};
use ringtail_dataplane::route::Table;
use ringtail_dataplane::stats::{Counters, DropReason, Meter, Published, Room};
use ringtail_dataplane::{Engine, PeerId, Prefix, Rules};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting per thread.
struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting touches a thread-local
// integer that needs no allocation and no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

#[test]
fn the_counter_counts() {
    assert!(allocations(|| drop(black_box(vec![1u8; 100]))) >= 1);
    assert_eq!(
        allocations(|| assert_eq!(black_box([1u8; 100]).len(), 100)),
        0
    );
}

#[test]
fn a_warm_pass_through_the_rooms_allocates_nothing() {
    let us = SocketAddr::from(([100, 64, 0, 1], 5201));
    let them = |port| SocketAddr::from(([100, 64, 0, 9], port));
    #[expect(clippy::disallowed_methods, reason = "any moment to count from")]
    let now = Instant::now();
    let prefix = Prefix {
        addr: them(0).ip(),
        bits: 32,
    };
    let mut routes = Table::default();
    routes.insert(prefix, PeerId(1));
    let list = CompiledRules::compile(&Rules::List(Vec::new()), None);
    let mut filter = Filter::new(now, Arc::new(list));
    let mut coalescer = Coalescer::new();
    let mut counters = Counters::default();
    let published = Published::default();

    // Inbound: three TCP connections that take turns, lone datagrams, and one that is refused.
    let tcp = |flags, seq| Tcp {
        seq,
        ack: 1,
        flags,
        window: 1,
        options: &[],
    };
    let mut packets = Vec::new();
    for i in 0..200u16 {
        let seq = u32::from(i / 3) * 1000;
        packets.push(Builder::new(them(i % 3), us).tcp(&tcp(0x10, seq), &[7; 1000]));
        packets.push(Builder::new(them(i), us).udp(&[7; 300]));
    }
    packets.push(Builder::new(them(1), us).tcp(&tcp(0x02, 1), &[]));
    // Outbound: one super-packet, and the datagrams that the ones above answer.
    let vnet = VnetHdr::new(GSO_TCPV4, 40, 1000, 20, 16);
    let large = Builder::new(us, them(1)).tcp(&tcp(0x18, 1), &[7; 60_000]);
    let small: Vec<_> = (0..200)
        .map(|i| Builder::new(us, them(i)).udp(&[7; 300]))
        .collect();
    let mut segment = vec![0; 2000];

    let mut pass = || {
        for packet in &small {
            let Ok(headers) = Headers::parse(packet) else {
                continue;
            };
            let _ = black_box(filter.remember(now, &headers, packet));
        }
        if let Ok(plan) = plan(&vnet, &large) {
            let peer = routes.lookup(plan.headers().dst);
            assert_eq!(peer, Some(PeerId(1)));
            for i in 0..plan.len() {
                black_box(plan.write(i, &large, &mut segment));
            }
        }
        let mut cursor = routes.cursor();
        for packet in &packets {
            black_box(classify(packet));
            let verdict = Headers::parse(packet).and_then(|headers| {
                source_allowed(&mut cursor, PeerId(1), &headers)?;
                filter.admit(now, &headers, packet)?;
                coalescer.push(&headers, packet, 0)
            });
            match verdict {
                Ok(()) => counters.add(Meter::TunPacketsOut, 1),
                Err(reason) => counters.drop_one(reason),
            }
        }
        let batch = coalescer.take();
        batch.iter().for_each(|write| assert!(write.len() > 10));
        coalescer.recycle(batch);
        counters.charge(Room::Coalesce, 1);
        published.publish(&counters);
    };
    // The coalescer works with two sets of slabs in turn.
    (0..3).for_each(|_| pass());
    assert_eq!(allocations(|| (0..10).for_each(|_| pass())), 0);
    let snapshot = published.read();
    assert_eq!(snapshot.get(Meter::TunPacketsOut), 13 * 400);
    assert_eq!(snapshot.drops(DropReason::FilterDenied), 13);
}

#[test]
fn sealing_and_opening_allocate_nothing() {
    let key = Key::new(&[7; 32]);
    for aead in Backend::ALL.iter().copied().filter_map(Aead::force) {
        let mut messages = [[0; MESSAGE_LEN_MIN + 1420]; 9];
        let pass = || {
            let mut counter = 0..;
            let mut batch = messages.each_mut().map(|message| Seal {
                key: &key,
                receiver: 1,
                counter: counter.next().unwrap_or_default(),
                message,
            });
            aead.seal(&mut batch);
            let mut counter = 0..;
            let mut batch = messages.each_mut().map(|message| Open {
                key: &key,
                counter: counter.next().unwrap_or_default(),
                message,
                ok: false,
            });
            aead.open(&mut batch);
            assert!(batch.iter().all(|packet| packet.ok), "{aead:?}");
        };
        assert_eq!(allocations(pass), 0, "{aead:?}");
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "any moment to count from")]
fn sessions_seal_and_open_without_allocating() {
    let mut sessions = Sessions::new(Engine::Ringtail, Instant::now(), 3, 1420);
    let us = SocketAddr::from(([100, 64, 0, 1], 5201));
    let them = SocketAddr::from(([100, 64, 0, 9], 40_000));
    let tcp = Tcp {
        seq: 1,
        ack: 1,
        flags: 0x10,
        window: 1,
        options: &[],
    };
    let vnet = VnetHdr::new(GSO_TCPV4, 40, 1380, 20, 16);
    let mut large = Builder::new(us, them).tcp(&tcp, &[7; 60_000]);
    let mut small = Builder::new(us, them).udp(&[7; 300]);
    let mut bytes = vec![0; 70_000];
    let mut opened = 0;
    let mut pass = || {
        for (vnet, packet) in [(&vnet, &mut large), (&VnetHdr::PLAIN, &mut small)] {
            for peer in 0..3 {
                let (datagrams, stride) = sessions.seal(peer, vnet, packet);
                let len = datagrams.len();
                bytes[..len].copy_from_slice(datagrams);
                opened += sessions.open(peer, &mut bytes[..len], stride);
            }
        }
    };
    pass();
    assert_eq!(allocations(|| (0..50).for_each(|_| pass())), 0);
    assert!(opened > 51 * 3 * 60_000);
}
