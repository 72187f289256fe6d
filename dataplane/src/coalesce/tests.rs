//! The oracle is the room next door: cutting what was merged gives back the packets, byte for byte.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{Rng, RngExt};

use super::*;
use crate::packet::build::{Builder, Tcp};
use crate::packet::checksum;
use crate::packet::header::{Flow, Fragment, TCP_ACK, TCP_PSH};
use crate::packet::segment::plan;
use crate::packet::vnet::{
    GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VNET_HDR_LEN, VnetHdr,
};
use crate::seeded;

/// What the packets of a connection have in common.
const HEADER: Tcp<'static> = Tcp {
    seq: 0,
    ack: 77,
    flags: TCP_ACK,
    window: 500,
    options: &[1; 12],
};

fn v4(port: u16) -> Builder {
    Builder::new(
        format!("100.64.0.1:{port}").parse().unwrap(),
        "100.64.0.2:5201".parse().unwrap(),
    )
}

fn v6(port: u16) -> Builder {
    Builder::new(
        format!("[fd7a::1]:{port}").parse().unwrap(),
        "[fd7a::2]:5201".parse().unwrap(),
    )
}

fn with_id(builder: Builder, id: u16) -> Builder {
    Builder { id, ..builder }
}

fn tcp(builder: Builder, seq: u32, len: usize) -> Vec<u8> {
    tcp_with(builder, seq, TCP_ACK, len)
}

fn tcp_with(builder: Builder, seq: u32, flags: u8, len: usize) -> Vec<u8> {
    let header = Tcp {
        seq,
        flags,
        ..HEADER
    };
    let payload: Vec<u8> = (0..len).map(|i| seq.to_le_bytes()[i % 4]).collect();
    builder.tcp(&header, &payload)
}

/// As the opener gives it: with a tag and padding behind the packet.
fn feed(coalescer: &mut Coalescer, packet: &[u8]) {
    let opened = [packet, &[0xdd; 32]].concat();
    let headers = Headers::parse(&opened).unwrap();
    coalescer.push(&headers, &opened, 0).unwrap();
}

/// What comes out where these go in.
fn batch_of(packets: &[Vec<u8>]) -> SuperPackets {
    let mut coalescer = Coalescer::new();
    for packet in packets {
        feed(&mut coalescer, packet);
    }
    coalescer.take()
}

/// Cuts every write of a batch into the packets it stands for.
fn cut(batch: &SuperPackets) -> Vec<Vec<Vec<u8>>> {
    batch
        .iter()
        .enumerate()
        .map(|(i, bytes)| {
            let (vnet, packet) = VnetHdr::split(bytes).unwrap();
            let plan = plan(&vnet, packet).unwrap();
            assert_eq!(plan.len(), batch.segments(i));
            assert_eq!(vnet.gso_type == GSO_NONE, plan.len() == 1);
            let mut dst = vec![0; 70_000];
            (0..plan.len())
                .map(|i| {
                    let len = plan.write(i, packet, &mut dst);
                    dst[..len].to_vec()
                })
                .collect()
        })
        .collect()
}

/// What goes in comes out, in groups of these sizes.
fn check(packets: &[Vec<u8>], sizes: &[usize]) {
    let groups = cut(&batch_of(packets));
    let got: Vec<usize> = groups.iter().map(Vec::len).collect();
    assert_eq!(got, sizes);
    assert_eq!(groups.concat(), packets);
}

#[test]
fn a_train_becomes_one_super_packet_with_the_header_the_kernel_wants() {
    for (builder, gso_type, ip_len) in [(v4(1), GSO_TCPV4, 20), (v6(1), GSO_TCPV6, 40)] {
        let packets = (0..10).map(|i| tcp(with_id(builder, 100 + i), u32::from(i) * 1000, 1000));
        let batch = batch_of(&packets.collect::<Vec<_>>());
        assert_eq!(batch.len(), 1);
        let (vnet, packet) = VnetHdr::split(batch.get(0)).unwrap();
        assert_eq!(vnet.flags, NEEDS_CSUM);
        assert_eq!(vnet.gso_type, gso_type);
        assert_eq!(vnet.gso_size.get(), 1000);
        assert_eq!(vnet.hdr_len.get(), ip_len + 32);
        assert_eq!(
            (vnet.csum_start.get(), vnet.csum_offset.get()),
            (ip_len, 16)
        );
        let headers = Headers::parse(packet).unwrap();
        assert_eq!(headers.total_len, usize::from(ip_len) + 32 + 10_000);
        assert_eq!(packet.len(), headers.total_len);
        if ip_len == 20 {
            assert_eq!(checksum::of(&packet[..20]), 0);
        }
        let field = headers.tcp(packet).unwrap().checksum.get();
        let addresses = checksum::addresses(headers.version, packet).unwrap();
        assert_eq!(field, checksum::pseudo_header(addresses, 6, 10_032).fold());
    }
}

#[test]
fn a_udp_train_becomes_one_super_packet() {
    for builder in [v4(1), v6(1)] {
        let packets: Vec<_> = (0..20u16)
            .map(|i| with_id(builder, 7 + i).udp(&[u8::try_from(i).unwrap(); 1200]))
            .collect();
        check(&packets, &[20]);
        let batch = batch_of(&packets);
        let (vnet, packet) = VnetHdr::split(batch.get(0)).unwrap();
        assert_eq!(
            (vnet.gso_type, vnet.gso_size.get(), vnet.csum_offset.get()),
            (GSO_UDP_L4, 1200, 6)
        );
        let headers = Headers::parse(packet).unwrap();
        assert_eq!(headers.udp(packet).unwrap().len.get(), 8 + 20 * 1200);
    }
}

/// A TUN refuses UDP super-packets of more.
#[test]
fn a_long_udp_train_becomes_several_super_packets() {
    let packets: Vec<_> = (0..150u16)
        .map(|id| with_id(v4(1), id).udp(&[7; 200]))
        .collect();
    check(&packets, &[64, 64, 22]);
}

/// Packets 0, 1, 2, … of a connection, 1000 bytes each, with one of them changed.
fn train_with(n: usize, changed: usize, change: impl Fn(Builder, u32) -> Vec<u8>) -> Vec<Vec<u8>> {
    (0..n)
        .map(|i| {
            let seq = u32::try_from(i).unwrap() * 1000;
            let builder = with_id(v4(1), u16::try_from(i).unwrap());
            if i == changed {
                change(builder, seq)
            } else {
                tcp(builder, seq, 1000)
            }
        })
        .collect()
}

#[test]
fn push_and_short_packets_end_a_super_packet() {
    check(
        &train_with(6, 2, |b, seq| tcp_with(b, seq, TCP_ACK | TCP_PSH, 1000)),
        &[3, 3],
    );
    // What follows the short packet is not in sequence with 1000-byte steps, but starts anew.
    check(&train_with(6, 2, |b, seq| tcp(b, seq, 999)), &[3, 3]);
    // A first packet with PSH is complete at once.
    check(
        &train_with(6, 0, |b, seq| tcp_with(b, seq, TCP_ACK | TCP_PSH, 1000)),
        &[1, 5],
    );
    // A longer one cannot follow and starts anew.
    check(&train_with(6, 2, |b, seq| tcp(b, seq, 1001)), &[2, 1, 3]);
}

/// The third of six packets of a connection goes alone if it is changed so.
fn goes_alone(change: impl Fn(Builder, u32) -> Vec<u8>) {
    check(&train_with(6, 2, change), &[2, 1, 3]);
}

#[test]
fn differing_headers_end_a_super_packet() {
    goes_alone(|b, seq| tcp(Builder { tos: 1, ..b }, seq, 1000));
    goes_alone(|b, seq| tcp(Builder { ttl: 63, ..b }, seq, 1000));
    // FIN, URG, ECN-echo.
    for flag in [1, 0x20, 0x40] {
        goes_alone(|b, seq| tcp_with(b, seq, TCP_ACK | flag, 1000));
    }
    // A pure ACK, and a gap.
    goes_alone(|b, seq| tcp(b, seq, 0));
    goes_alone(|b, seq| tcp(b, seq + 1, 1000));
    for (ack, window, options) in [
        (78, 500, &[1; 12][..]),
        (77, 501, &[1; 12]),
        (77, 500, &[0; 12]),
        (77, 500, &[1; 16]),
    ] {
        let other = Tcp {
            ack,
            window,
            options,
            ..HEADER
        };
        goes_alone(|b, seq| b.tcp(&Tcp { seq, ..other }, &[1; 1000]));
    }
    let fragment = 0x2000;
    goes_alone(|b, seq| tcp(Builder { fragment, ..b }, seq, 1000));
}

#[test]
fn ipv6_flow_labels_and_hop_limits_must_match() {
    let packets = |change: fn(Builder) -> Builder| -> Vec<Vec<u8>> {
        (0..4u32)
            .map(|i| tcp(if i == 1 { change(v6(1)) } else { v6(1) }, i * 1000, 1000))
            .collect()
    };
    check(&packets(|b| b), &[4]);
    check(&packets(|b| Builder { label: 5, ..b }), &[1, 1, 2]);
    check(&packets(|b| Builder { ttl: 5, ..b }), &[1, 1, 2]);
    check(&packets(|b| Builder { tos: 5, ..b }), &[1, 1, 2]);
}

#[test]
fn identifications_count_only_without_df() {
    let packets = |fragment, step: u16| -> Vec<Vec<u8>> {
        (0..4u16)
            .map(|i| {
                Builder {
                    fragment,
                    id: i.wrapping_mul(step),
                    ..v4(1)
                }
                .udp(&[1; 100])
            })
            .collect()
    };
    check(&packets(0, 1), &[4]);
    check(&packets(0, 0), &[1, 1, 1, 1]);
    check(&packets(0x4000, 1), &[4]);
    // With DF the identification means nothing; cutting writes its own.
    assert_eq!(batch_of(&packets(0x4000, 0)).len(), 1);
}

#[test]
fn a_wrong_checksum_is_never_laundered() {
    for at in [10, 11, 36, 37, 60, 500] {
        for wrong in 0..4 {
            let mut packets = train_with(4, 9, |_, _| unreachable!());
            packets[wrong][at] ^= 0x10;
            let batch = batch_of(&packets);
            let alone = batch
                .iter()
                .position(|bytes| bytes[VNET_HDR_LEN..] == packets[wrong]);
            let alone = alone.expect("the damaged packet is there as it came");
            assert_eq!(batch.get(alone)[..VNET_HDR_LEN], [0; VNET_HDR_LEN]);
            assert_eq!(cut(&batch).concat(), packets, "byte {at} of packet {wrong}");
        }
    }
    // UDP without a checksum has none to verify, so it stays alone.
    let mut packets: Vec<_> = (0..3).map(|id| with_id(v4(1), id).udp(&[1; 100])).collect();
    for packet in &mut packets {
        packet[26..28].fill(0);
    }
    check(&packets, &[1, 1, 1]);
}

#[test]
fn interleaved_flows_are_merged_apart_and_leave_in_order_of_their_first_packets() {
    let mut coalescer = Coalescer::new();
    for round in 0..10u16 {
        for port in 0..8 {
            let packet = tcp(with_id(v4(port), round), u32::from(round) * 500, 500);
            feed(&mut coalescer, &packet);
        }
        feed(&mut coalescer, &v4(1).icmp(8, 0, b"ping"));
    }
    let batch = coalescer.take();
    let groups = cut(&batch);
    assert_eq!(groups.len(), 8 + 10);
    for (port, group) in (0..8).zip(&groups) {
        assert_eq!(group.len(), 10);
        let headers = Headers::parse(&group[0]).unwrap();
        assert_eq!(headers.ports(&group[0]).unwrap().0, port);
    }
}

#[test]
fn more_flows_than_places_still_lose_nothing() {
    let flows = u16::try_from(FLOWS_OPEN_MAX).unwrap() + 3;
    let mut packets = Vec::new();
    for round in 0..3 {
        for port in 0..flows {
            let builder = with_id(v4(port), round);
            packets.push(tcp(builder, u32::from(round) * 500, 500));
        }
    }
    let mut got = cut(&batch_of(&packets)).concat();
    got.sort();
    packets.sort();
    assert_eq!(got, packets);
}

#[test]
fn a_super_packet_stops_below_64_kib() {
    let packets: Vec<_> = (0..60u16)
        .map(|i| tcp(with_id(v4(1), i), u32::from(i) * 1368, 1368))
        .collect();
    check(&packets, &[47, 13]);
    // The longest packet there is.
    check(
        &[tcp(v4(1), 0, 65_535 - 52), tcp(v4(1), 65_483, 10)],
        &[1, 1],
    );
}

#[test]
fn a_congestion_mark_outside_gets_in_and_starts_a_super_packet_of_its_own() {
    let mut coalescer = Coalescer::new();
    let mut want = Vec::new();
    for i in 0..6u16 {
        let marked = (2..4).contains(&i);
        let builder = Builder {
            id: i,
            tos: ecn::ECT0,
            ..v4(1)
        };
        let packet = tcp(builder, u32::from(i) * 100, 100);
        let headers = Headers::parse(&packet).unwrap();
        coalescer
            .push(&headers, &packet, if marked { ecn::CE } else { ecn::ECT0 })
            .unwrap();
        let tos = if marked { ecn::CE } else { ecn::ECT0 };
        want.push(tcp(Builder { tos, ..builder }, u32::from(i) * 100, 100));
    }
    // Not ECN-capable inside, congestion outside: dropped, and the rest is unharmed.
    let packet = tcp(v4(1), 600, 100);
    let headers = Headers::parse(&packet).unwrap();
    assert_eq!(
        coalescer.push(&headers, &packet, ecn::CE),
        Err(DropReason::EcnCongested)
    );
    let groups = cut(&coalescer.take());
    assert_eq!(groups.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2]);
    assert_eq!(groups.concat(), want);
}

#[test]
fn a_write_knows_the_hash_of_its_flow() {
    let packets = [
        tcp(v4(1), 0, 100),
        v6(2).udp(&[1; 100]),
        v4(3).icmp(8, 0, &[0; 20]),
        tcp(v4(1), 100, 100),
    ];
    let batch = batch_of(&packets);
    assert_eq!(batch.len(), 3);
    for (i, packet) in packets[..3].iter().enumerate() {
        let flow = Headers::parse(packet).unwrap().flow(packet);
        assert_eq!(batch.flow_hash(i), flow.hash());
    }
}

#[test]
fn memory_is_recycled() {
    let mut coalescer = Coalescer::new();
    let mut addresses = Vec::new();
    for _ in 0..10 {
        for i in 0..100u16 {
            let packet = tcp(with_id(v4(1), i), u32::from(i) * 1368, 1368);
            feed(&mut coalescer, &packet);
        }
        assert!(!coalescer.is_empty());
        let batch = coalescer.take();
        assert!(coalescer.is_empty());
        addresses.push(batch.get(0).as_ptr());
        coalescer.recycle(batch);
    }
    // The first batch's memory serves the second and so on: two sets of slabs at most.
    addresses.sort();
    addresses.dedup();
    assert!(addresses.len() <= 2, "{} sets of slabs", addresses.len());
}

#[test]
fn a_batch_says_when_it_is_full() {
    let mut coalescer = Coalescer::new();
    let mut packets = 0usize;
    while !coalescer.is_full() {
        feed(&mut coalescer, &v4(1).icmp(8, 0, &[0; 1400]));
        packets += 1;
    }
    assert!((500..2000).contains(&packets), "{packets}");
    assert_eq!(coalescer.take().len(), packets);
    assert!(!coalescer.is_full());
}

/// Random traffic of a few connections, with everything that may go wrong on the way.
struct Traffic {
    rng: StdRng,
    seq: HashMap<usize, u32>,
    id: u16,
}

impl Traffic {
    fn packet(&mut self) -> Vec<u8> {
        let rng = &mut self.rng;
        let flow = rng.random_range(0..5usize);
        let port = u16::try_from(flow).unwrap();
        let mut builder = if flow.is_multiple_of(2) {
            v4(port)
        } else {
            v6(port)
        };
        self.id = self.id.wrapping_add(1);
        builder.id = self.id;
        builder.fragment = 0;
        if rng.random_bool(0.02) {
            builder.tos = rng.random();
        }
        let len = [1000, 1000, 1000, 1000, 1000, 1, 300, 0][rng.random_range(0..8)];
        let mut payload = vec![0; len];
        rng.fill_bytes(&mut payload);
        let mut packet = match rng.random_range(0..20) {
            0 => builder.icmp(8, 0, &payload),
            1 => Builder {
                fragment: 0x2000,
                ..builder
            }
            .udp(&payload),
            2 => Builder {
                fragment: 0x0020,
                ..builder
            }
            .ip(17, &payload),
            3..=7 => builder.udp(&payload),
            _ => {
                let seq = self.seq.entry(flow).or_default();
                if rng.random_bool(0.05) {
                    *seq = seq.wrapping_add(1000);
                }
                let flags = if rng.random_bool(0.05) {
                    rng.random()
                } else {
                    TCP_ACK
                };
                let tcp = Tcp {
                    seq: *seq,
                    ack: 1,
                    flags,
                    window: 500,
                    options: &[],
                };
                *seq = seq.wrapping_add(u32::try_from(len).unwrap());
                builder.tcp(&tcp, &payload)
            }
        };
        if packet.len() > 20 && rng.random_bool(0.03) {
            let at = rng.random_range(20..packet.len());
            packet[at] ^= 1 << rng.random_range(0..8);
        }
        packet
    }
}

/// The packets of each flow and of each pair of addresses, in order. Fragments count to the pair
/// only. Taken from the bytes as they are, damaged or not.
fn by_flow(packets: &[Vec<u8>]) -> HashMap<Flow, Vec<Vec<u8>>> {
    let mut flows: HashMap<Flow, Vec<Vec<u8>>> = HashMap::new();
    for packet in packets {
        let headers = Headers::parse(packet).unwrap();
        let flow = match headers.fragment {
            Fragment::Whole => headers.flow(packet),
            Fragment::First | Fragment::Later(_) => Flow {
                protocol: 0,
                src_port: 0,
                dst_port: 0,
                ..headers.flow(packet)
            },
        };
        flows.entry(flow).or_default().push(packet.clone());
    }
    flows
}

#[test]
fn random_traffic_comes_out_as_it_went_in_and_in_order_within_every_flow() {
    let mut traffic = Traffic {
        rng: seeded(),
        seq: HashMap::new(),
        id: 0,
    };
    let mut coalescer = Coalescer::new();
    let mut merged = 0;
    for _ in 0..60 {
        let mut packets = Vec::new();
        for _ in 0..traffic.rng.random_range(1..200) {
            let packet = traffic.packet();
            let Ok(headers) = Headers::parse(&packet) else {
                continue;
            };
            if traffic.rng.random() {
                feed(&mut coalescer, &packet);
            } else {
                coalescer.push(&headers, &packet, 0).unwrap();
            }
            packets.push(packet[..headers.total_len].to_vec());
        }
        let batch = coalescer.take();
        merged += packets.len() - batch.len();
        // First packets leave in order of arrival.
        let mut arrivals = packets.iter();
        for group in cut(&batch) {
            assert!(arrivals.any(|packet| *packet == group[0]));
        }
        let got = cut(&batch).concat();
        assert_eq!(got.len(), packets.len());
        assert_eq!(by_flow(&got), by_flow(&packets));
        coalescer.recycle(batch);
    }
    assert!(merged > 500, "only {merged} merged");
}
