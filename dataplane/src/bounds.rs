//! What everything that can grow may hold at most, from the constants themselves: the numbers of
//! `dataplane/BOUNDS.md`, which has to say the same. `tests/bounds.rs` measures whether they hold.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::mem::size_of;
use std::time::Instant;

use crate::coalesce::{SLAB_LEN, SLABS_FULL, SPARES_MAX};
use crate::config::share;
use crate::filter::{
    FLOW_COST, PART_COST, SHARD_FLOWS_MIN, TABLE_PARTS_MAX, flows_max, theirs_max,
};
use crate::handshake::{KEY_COST, KNOWN_COST};
use crate::hub::{
    ASKS_MAX, EVENTS_MAX, FLOWS_TOLD_MAX, HANDED_MAX, HANDSHAKES_MAX, Handed, HandshakeMessage,
    PINGS_MAX, RELAY_IN_BYTES_MAX, RELAY_IN_BYTES_MIN, RELAY_IN_ENTRIES_MAX, RELAY_OUT_BYTES_MAX,
    RELAY_OUT_ENTRIES_MAX, REPORTS_MAX, SPARE_MAX, STRAYS_MAX, UNOPENED_MAX,
};
use crate::noise::{PeekedInitiation, RECENT_LEN, SOURCES_MAX};
use crate::packet::BUF_LEN;
use crate::packet::header::Flow;
use crate::peer::table::PeerEntry;
use crate::peer::{
    Aim, Guest, NODE_BYTES_MAX, PACKETS_MAX, Peer, PeerShared, QUEUE_COST, Report, SHARD_BYTES_MIN,
};
use crate::ring::{TUN_BUFFERS, UDP_BUFFERS};
use crate::seal::{RUN_LEN, RUNS_MAX};
use crate::session::{Machine, PLACES, SPANS_ROOM, keypair_cost};
use crate::shard::RELAY_JOIN_MAX;
use crate::types::{Event, PEERS_MAX, PeerConfig, PeerId, Ping, Prefix, RelayBatch};
use crate::udp::{DOOR_SOCKET_BUFFER, SMALL_SOCKET_BUFFER, data_buffer};

/// A queue, a table, or memory that is reused.
struct Row {
    what: &'static str,
    /// In words.
    bound: String,
    bytes: usize,
}

fn row(what: &'static str, bound: impl Into<String>, bytes: usize) -> Row {
    let bound = bound.into();
    Row { what, bound, bytes }
}

/// Prefixes of a peer that the numbers reckon with: its two addresses.
const PREFIXES: usize = 2;
/// What an entry of a shared map costs besides itself: its part of inner nodes and counts.
const MAP_COST: usize = 96;
/// What an allocation costs besides its bytes, and an `Arc` besides that.
const HEAP_COST: usize = 16;
const ARC_COST: usize = HEAP_COST + 16;
/// Indexes of a session: one for each keypair and one for an initiation. A place is a key, a value and a
/// mark, and at worst every other is free, and the half of them is left from before the last growth.
const INDEXES: usize = 6;
const INDEX_COST: usize = 4 * (3 * size_of::<u32>() + 1);
/// Packets of the kernel's queue towards one TUN queue (`txqueuelen` of a new device), each up to 64 KiB.
const TUN_QUEUE: usize = 500;

/// Memory of the process.
fn own(peers: usize, shards: usize) -> Vec<Row> {
    let others = shards - 1;
    let relay_in = share(RELAY_IN_BYTES_MAX, shards, RELAY_IN_BYTES_MIN);
    let waiting = share(NODE_BYTES_MAX, shards, SHARD_BYTES_MIN);
    let prefix = size_of::<Prefix>() + size_of::<([u64; 3], PeerId)>() + MAP_COST;
    vec![
        row(
            "peers: configuration and routes",
            format!(
                "{} peers; reckoned with {PREFIXES} prefixes each",
                thousands(PEERS_MAX)
            ),
            peers
                * (size_of::<PeerConfig>()
                    + size_of::<(PeerId, PeerEntry)>()
                    + MAP_COST
                    + ARC_COST
                    + PREFIXES * prefix),
        ),
        row(
            "peers: what all threads share of one",
            "one each",
            peers * (size_of::<PeerShared>() + ARC_COST),
        ),
        row(
            "peers: session and path at the owner",
            "one each",
            peers
                * (size_of::<Peer>() + size_of::<Machine>() + 2 * HEAP_COST + INDEXES * INDEX_COST),
        ),
        row(
            "peers: keys and replay windows",
            "5 keypairs each",
            peers * 5 * keypair_cost(),
        ),
        row(
            "peers: guests, where other shards seal",
            "one for each other shard, of peers that have keys",
            peers * others * (size_of::<Guest>() + HEAP_COST),
        ),
        row(
            "peers: places by number",
            "one each on every shard: peer, guest, deadline",
            peers * shards * (2 * size_of::<usize>() + 4 + size_of::<(Instant, PeerId)>()),
        ),
        row(
            "unread path decisions",
            format!(
                "the newest of each peer; {} places on every shard",
                thousands(PEERS_MAX)
            ),
            peers * (size_of::<Aim>() + HEAP_COST)
                + shards * PEERS_MAX * (size_of::<usize>() + 2 * size_of::<usize>()),
        ),
        row(
            "packets that wait for a handshake",
            format!(
                "{} of the node, {} of a shard at least; {PACKETS_MAX} packets of one peer",
                human(NODE_BYTES_MAX),
                human(SHARD_BYTES_MIN)
            ),
            shards * (waiting + BUF_LEN) + peers * QUEUE_COST,
        ),
        row(
            "remembered flows",
            format!(
                "{} of the node; of a shard {} at most, {} at least",
                human(4 * flows_max(4) * FLOW_COST),
                human(flows_max(1) * FLOW_COST),
                human(SHARD_FLOWS_MIN * FLOW_COST)
            ),
            shards * flows_max(shards) * FLOW_COST,
        ),
        row(
            "flows that peers began",
            "a quarter as many",
            shards * theirs_max(flows_max(shards)) * FLOW_COST,
        ),
        row(
            "packet filter, by destination",
            format!(
                "{} destinations of all sources, twice while it changes",
                thousands(TABLE_PARTS_MAX)
            ),
            2 * TABLE_PARTS_MAX * (PART_COST + size_of::<([u64; 3], u32)>() + MAP_COST),
        ),
        row(
            "receive buffers",
            format!(
                "{TUN_BUFFERS} + {UDP_BUFFERS} of a shard, each {}",
                human(BUF_LEN)
            ),
            shards * usize::from(TUN_BUFFERS + UDP_BUFFERS) * BUF_LEN,
        ),
        row(
            "packets being sealed or merged",
            format!(
                "{RUNS_MAX} runs, and {SLABS_FULL} slabs for each of {} batches of a shard",
                1 + SPARES_MAX
            ),
            shards
                * (RUNS_MAX * RUN_LEN + (1 + SPARES_MAX) * SLABS_FULL * SLAB_LEN + SPANS_ROOM * 8),
        ),
        row(
            "packets from relays",
            format!(
                "{} of the node, {} of a shard at least; {RELAY_IN_ENTRIES_MAX} batches",
                human(RELAY_IN_BYTES_MAX),
                human(RELAY_IN_BYTES_MIN)
            ),
            shards * (relay_in + RELAY_IN_ENTRIES_MAX * (size_of::<RelayBatch>() + HEAP_COST)),
        ),
        row(
            "packets to relays",
            format!(
                "{}, {RELAY_OUT_ENTRIES_MAX} batches; {SPARE_MAX} emptied ones, one open on each shard",
                human(RELAY_OUT_BYTES_MAX)
            ),
            RELAY_OUT_BYTES_MAX
                + RELAY_OUT_ENTRIES_MAX * (size_of::<RelayBatch>() + HEAP_COST)
                + (SPARE_MAX + shards) * 2 * RELAY_JOIN_MAX,
        ),
        row(
            "handed from shard to shard",
            format!(
                "for each: {HANDED_MAX} batches (in receive buffers), {REPORTS_MAX} reports, {FLOWS_TOLD_MAX} flows"
            ),
            shards
                * (HANDED_MAX * size_of::<Handed>()
                    + REPORTS_MAX * size_of::<Report>()
                    + FLOWS_TOLD_MAX * size_of::<Flow>()),
        ),
        row(
            "handshake messages and requests",
            format!(
                "for each shard: {HANDSHAKES_MAX} messages, {ASKS_MAX} requests, {UNOPENED_MAX} notes, {PINGS_MAX} pings"
            ),
            shards
                * (HANDSHAKES_MAX
                    * (size_of::<HandshakeMessage>() + size_of::<PeekedInitiation>() + HEAP_COST)
                    + ASKS_MAX * size_of::<PeerId>()
                    + UNOPENED_MAX * size_of::<(PeerId, usize)>()
                    + PINGS_MAX * (size_of::<(PeerId, Ping)>() + size_of::<(PeerId, u64)>())),
        ),
        row(
            "sources of handshakes and of strangers",
            format!(
                "{SOURCES_MAX} each, by address or /64; of known addresses, of awaited answers"
            ),
            4 * SOURCES_MAX * 16,
        ),
        row(
            "sources of handshakes that were seen lately",
            "bits, however many there are",
            RECENT_LEN,
        ),
        row(
            "peers as the handshake thread has them",
            "one key of each, and one address that it was heard from",
            peers * (KEY_COST + KNOWN_COST),
        ),
        row(
            "indexes that answers are awaited under",
            format!("{PLACES} places on every shard"),
            shards * PLACES * size_of::<u32>(),
        ),
        row(
            "events",
            format!("{EVENTS_MAX}"),
            EVENTS_MAX * size_of::<Event>(),
        ),
        row(
            "strays for the control and handshake threads",
            format!("{STRAYS_MAX} each, up to 64 KiB"),
            STRAYS_MAX * ((64 << 10) + size_of::<HandshakeMessage>()),
        ),
    ]
}

/// Memory of the kernel.
fn kernel(shards: usize) -> Vec<Row> {
    vec![
        row(
            "data sockets",
            "2 families, 2 directions; the kernel takes twice what is asked for",
            shards * 2 * 2 * 2 * data_buffer(shards),
        ),
        row(
            "handshake and discovery sockets",
            "the same, of each",
            2 * 2 * 2 * 2 * SMALL_SOCKET_BUFFER,
        ),
        row(
            "doors of the handshake thread",
            "the same, of each of three",
            3 * 2 * 2 * 2 * DOOR_SOCKET_BUFFER,
        ),
        row(
            "TUN queues",
            format!("{TUN_QUEUE} packets of a queue (`txqueuelen`), up to 64 KiB"),
            shards * TUN_QUEUE * (64 << 10),
        ),
    ]
}

fn human(bytes: usize) -> String {
    match bytes {
        bytes if bytes > 0 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        0..0x2800 => format!("{bytes} B"),
        0x2800..0xa0_0000 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        _ => format!("{} MiB", bytes.div_ceil(1 << 20)),
    }
}

fn thousands(n: usize) -> String {
    format!("{},{:03}", n / 1000, n % 1000)
}

/// Peers and shards of the columns.
const COLUMNS: [(usize, usize); 4] = [(1_000, 2), (10_000, 2), (10_000, 64), (PEERS_MAX, 64)];

fn table(name: &str, rows: impl Fn(usize, usize) -> Vec<Row>) -> String {
    let columns = COLUMNS.map(|(peers, shards)| rows(peers, shards));
    let mut text = format!("| {name} | bound |");
    for (peers, shards) in COLUMNS {
        write!(text, " {} peers, {shards} shards |", thousands(peers)).unwrap();
    }
    text += "\n|---|---|---:|---:|---:|---:|\n";
    for (i, first) in columns[0].iter().enumerate() {
        write!(text, "| {} | {} |", first.what, first.bound).unwrap();
        for column in &columns {
            write!(text, " {} |", human(column[i].bytes)).unwrap();
        }
        text += "\n";
    }
    write!(text, "| **together** | |").unwrap();
    for column in &columns {
        let sum: usize = column.iter().map(|row| row.bytes).sum();
        write!(text, " {} MiB |", sum.div_ceil(1 << 20)).unwrap();
    }
    text + "\n"
}

#[test]
fn the_document_has_the_numbers_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/BOUNDS.md");
    let text = std::fs::read_to_string(path).unwrap();
    let tables = [
        table("memory of the process", own),
        table("memory of the kernel", |_, shards| kernel(shards)),
    ];
    let mut wanted = text.clone();
    for (i, table) in tables.iter().enumerate() {
        let (begin, end) = (format!("<!-- table {i} -->\n"), format!("<!-- end {i} -->"));
        let from = wanted.find(&begin).unwrap() + begin.len();
        let to = wanted.find(&end).unwrap();
        wanted.replace_range(from..to, table);
    }
    if std::env::var_os("RINGTAIL_WRITE_BOUNDS").is_some() {
        std::fs::write(path, &wanted).unwrap();
    }
    assert!(
        text == wanted,
        "dataplane/BOUNDS.md is out of date (RINGTAIL_WRITE_BOUNDS=1 writes it):\n{wanted}"
    );
}

/// What multiplies is bounded: no column is out of proportion to peers and shards.
#[test]
fn shards_and_peers_do_not_multiply() {
    let sum = |peers, shards| {
        own(peers, shards)
            .iter()
            .map(|row| row.bytes)
            .sum::<usize>()
    };
    let per_shard = (sum(0, 64) - sum(0, 2)) / 62;
    assert!(per_shard < 12 << 20, "{per_shard}");
    let per_peer = (sum(10_000, 2) - sum(0, 2)) / 10_000;
    assert!(per_peer < 16 << 10, "{per_peer}");
    let product = sum(PEERS_MAX, 64) + sum(0, 2) - sum(0, 64) - sum(PEERS_MAX, 2);
    assert!(product < 150 << 20, "{product}");
    let sockets = |shards| kernel(shards)[0].bytes;
    assert!(sockets(64) <= 512 << 20);
}
