//! What everything on the control thread that can grow may hold at most, from the constants themselves:
//! the numbers of `control/BOUNDS.md`, which has to say the same.

use std::fmt::Write as _;
use std::net::SocketAddr;

use ringtail_dataplane::{PEERS_MAX, Prefix};

use crate::coord::frames::{JSON_LEN_MAX, MESSAGE_LEN_MAX};
use crate::derp::routes::ROUTES_MAX;
use crate::driver::dns::{FORWARDED_MAX, UDP_ANSWER_LEN_MAX};
use crate::driver::relay::{
    DATA_QUEUE_BYTES, DISCO_QUEUE_BYTES, EVENT_BYTES_MAX, EVENTS_MAX, LINKS_MAX, RelayEvent,
};
use crate::driver::tls::CLIENT_INBOX_MAX;
use crate::key::NodePublic;
use crate::netmap::filter::COMPILED_MAX;
use crate::netmap::wire::{
    DNS_RECORDS_MAX, DNS_RESOLVERS_MAX, DNS_SUFFIXES_MAX, Node, UserProfile,
};
use crate::netmap::{
    DerpNode, ENDPOINTS_MAX, FILTER_LEN_MAX, PREFIXES_MAX, Peer, REGIONS_MAX, RELAYS_MAX, USERS_MAX,
};
use crate::path::{
    self, CANDIDATES_ALL_MAX, CANDIDATES_MAX, CANDIDATES_MIN, PINGS_OUTSTANDING_MAX, PeerSetup,
    TRANSMITS_MAX, Transmit, candidate_cost, candidates_max, ping_cost, pings_max,
};

/// Prefixes, endpoints and bytes of text of a peer that the numbers reckon with.
const PREFIXES: usize = 2;
const ENDPOINTS: usize = 8;
const TEXT: usize = 256;
/// A name with its addresses, as it is looked for by, and a resolver's address.
const NAME: usize = 256;
/// The largest datagram of the path machines: a probe of the MTU of an Ethernet link.
const DATAGRAM: usize = 1500;

struct Row {
    what: &'static str,
    bound: String,
    bytes: usize,
}

fn rows(peers: usize) -> Vec<Row> {
    let row = |what, bound: String, bytes| Row { what, bound, bytes };
    let json = usize::try_from(JSON_LEN_MAX).unwrap();
    // As received, as the agent has it, and as the path machines do.
    let copies = 3 * (PREFIXES * size_of::<Prefix>() + ENDPOINTS * size_of::<SocketAddr>() + TEXT);
    vec![
        row(
            "peers of the network map",
            format!(
                "{PEERS_MAX}; {PREFIXES_MAX} prefixes in all, {ENDPOINTS_MAX} endpoints each; reckoned with {PREFIXES} and {ENDPOINTS}"
            ),
            peers * (size_of::<Node>() + size_of::<Peer>() + size_of::<PeerSetup>() + copies),
        ),
        row(
            "users",
            format!("{USERS_MAX}"),
            peers.min(USERS_MAX) * (size_of::<UserProfile>() + TEXT),
        ),
        row(
            "packet filter",
            format!(
                "{FILTER_LEN_MAX} parts of rules, {COMPILED_MAX} prefixes when compiled, as many fitted to plain peers and as many of these"
            ),
            FILTER_LEN_MAX * (size_of::<String>() + 16)
                + COMPILED_MAX * (size_of::<(Prefix, u16, u16)>() + 2 * size_of::<Prefix>()),
        ),
        row(
            "DERP map",
            format!("{REGIONS_MAX} regions of {RELAYS_MAX} relays"),
            REGIONS_MAX * RELAYS_MAX * (size_of::<DerpNode>() + TEXT),
        ),
        row(
            "names of the network",
            format!(
                "a name of each peer and node held back, {DNS_RECORDS_MAX} extra records, {DNS_SUFFIXES_MAX} suffixes with {DNS_RESOLVERS_MAX} resolvers each"
            ),
            peers * 2 * NAME
                + DNS_RECORDS_MAX * 2 * NAME
                + DNS_SUFFIXES_MAX * DNS_RESOLVERS_MAX * 2 * NAME,
        ),
        row(
            "questions for names that are passed on (thread `dns`)",
            format!("{FORWARDED_MAX}, half of them to the same resolvers; two resolvers at a time"),
            FORWARDED_MAX * 2 * 2 * UDP_ANSWER_LEN_MAX,
        ),
        row(
            "candidates",
            format!(
                "{CANDIDATES_MAX} of a peer, {CANDIDATES_ALL_MAX} in all, so that each has {CANDIDATES_MIN} at least"
            ),
            peers * candidates_max(peers) * candidate_cost(),
        ),
        row(
            "Pings without an answer",
            format!(
                "{PINGS_OUTSTANDING_MAX} of a peer; as many of all as the node's rate lets leave before the first expires"
            ),
            pings_max().min(peers * PINGS_OUTSTANDING_MAX) * ping_cost(),
        ),
        row(
            "datagrams and news of the path machines",
            format!("{TRANSMITS_MAX} and {}", path::EVENTS_MAX),
            TRANSMITS_MAX * (size_of::<Transmit>() + DATAGRAM)
                + path::EVENTS_MAX * size_of::<path::Event>(),
        ),
        row(
            "relay connections",
            format!("{LINKS_MAX}, each with queues of 1 MiB and 64 KiB and 1 MiB of TLS"),
            LINKS_MAX * (DATA_QUEUE_BYTES + DISCO_QUEUE_BYTES + CLIENT_INBOX_MAX),
        ),
        row(
            "packets and news from relays",
            format!("8 MiB, {EVENTS_MAX}"),
            EVENT_BYTES_MAX + EVENTS_MAX * size_of::<RelayEvent>(),
        ),
        row(
            "regions where peers were heard",
            format!("{ROUTES_MAX} peers"),
            peers.min(ROUTES_MAX) * 4 * (size_of::<NodePublic>() + 32),
        ),
        row(
            "a message of the coordination server, while it is read",
            "64 MiB, and 256 MiB unpacked".to_owned(),
            MESSAGE_LEN_MAX + json,
        ),
    ]
}

fn mebibytes(bytes: usize) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn table() -> String {
    let columns = [1_000, 10_000, PEERS_MAX].map(rows);
    let mut text = "| memory of the control thread | bound | 1,000 peers | 10,000 peers | 16,384 peers |\n|---|---|---:|---:|---:|\n".to_owned();
    for (i, first) in columns[0].iter().enumerate() {
        write!(text, "| {} | {} |", first.what, first.bound).unwrap();
        for column in &columns {
            write!(text, " {} |", mebibytes(column[i].bytes)).unwrap();
        }
        text += "\n";
    }
    text += "| **together** | |";
    for column in &columns {
        let sum = column.iter().map(|row| row.bytes).sum();
        write!(text, " {} |", mebibytes(sum)).unwrap();
    }
    text + "\n"
}

#[test]
fn the_document_has_the_numbers_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/BOUNDS.md");
    let text = std::fs::read_to_string(path).unwrap();
    let begin = "<!-- table -->\n";
    let (before, rest) = text.split_once(begin).unwrap();
    let (_, after) = rest.split_once("<!-- end -->").unwrap();
    let wanted = [before, begin, &table(), "<!-- end -->", after].concat();
    if std::env::var_os("RINGTAIL_WRITE_BOUNDS").is_some() {
        std::fs::write(path, &wanted).unwrap();
    }
    assert!(
        text == wanted,
        "control/BOUNDS.md is out of date (RINGTAIL_WRITE_BOUNDS=1 writes it):\n{wanted}"
    );
}
