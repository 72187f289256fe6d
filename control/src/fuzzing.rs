//! What the fuzz targets run, as ordinary functions from bytes to nothing: `control/fuzz/` feeds them
//! from a fuzzer, the test below from the seeds that the fuzzer starts with. Each checks what must
//! hold for any input, on top of not panicking.
//!
//! Where a decoder takes a byte stream, the first byte of the input says how the rest is cut into
//! pieces, and the pieces must say what the whole says.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Instant;

use bytes::BytesMut;
use ipnet::IpNet;
use ringtail_dataplane::{Class, classify};
use time::OffsetDateTime;

use crate::coord::frames::{Codec, FrameReader, encode};
use crate::derp::client::{Client, Hello};
use crate::derp::frame::{CLIENT_FRAME_LEN_MAX, Decoder, HEADER_LEN, client_verdict};
use crate::derp::info::{ClientInfo, ServerInfo, put_client_info};
use crate::derp::upgrade::{Port, parse_request, parse_response};
use crate::derp::{cert, server};
use crate::device::Device;
use crate::disco::{self, Message, SharedKey};
use crate::dns::{Decision, Exit, Own, Read, Wish, message};
use crate::key::{DiscoPrivate, KEY_LEN, MachinePrivate, NodePrivate, NodePublic};
use crate::netmap::MapState;
use crate::netmap::wire::{DNS_RECORDS_MAX, DNS_SUFFIXES_MAX, DnsConfig, FilterRule};
use crate::noise::{EarlyPayload, Initiator, RECORD_LEN_MAX, RESPONSE_LEN, respond};
use crate::policy::{Compiled, PARTS_MAX, Policy, PolicyNode};
use crate::stun;
use crate::uapi::{DeviceStatus, Parser, PeerStatus, READ_LEN_MAX, Reply, Request};

/// Takes any moment to count from, and an input.
pub type Target = fn(Instant, &[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("derp_client", derp_client),
    ("derp_server", |_, bytes| derp_server(bytes)),
    ("derp_parts", |_, bytes| derp_parts(bytes)),
    ("disco", |_, bytes| disco(bytes)),
    ("stun", |_, bytes| stun(bytes)),
    ("noise_client", |_, bytes| noise_client(bytes)),
    ("noise_server", |_, bytes| noise_server(bytes)),
    ("map_stream", |_, bytes| map_stream(bytes)),
    ("coordination", coordination),
    ("relay", |_, bytes| relay(bytes)),
    ("uapi", |_, bytes| uapi(bytes)),
    ("dns_question", |_, bytes| dns_question(bytes)),
    ("dns_settings", |_, bytes| dns_settings(bytes)),
    ("policy", |_, bytes| policy(bytes)),
];

/// The pieces of a stream: the input without its first byte, cut by it.
fn pieces(input: &[u8]) -> (&[u8], Vec<&[u8]>) {
    let (cut, bytes) = input.split_first().unwrap_or((&0, &[]));
    (bytes, bytes.chunks(usize::from(*cut) + 1).collect())
}

/// What a relay says to a client, its HTTP response first. `now` is any moment.
fn derp_client(now: Instant, input: &[u8]) {
    let hello = Hello {
        host: "relay.test",
        ideal_node: None,
        relay: None,
        home: true,
    };
    let read = |pieces: &[&[u8]]| {
        let private = NodePrivate::clamped([1; 32]);
        let mut client = Client::new(private, &hello, [2; 24], now);
        let mut said = Vec::new();
        let end = pieces.iter().try_for_each(|piece| {
            client.handle_input(now, piece, &mut |event| said.push(format!("{event:?}")))
        });
        (said, end.is_ok(), client.is_ready())
    };
    let (bytes, pieces) = pieces(input);
    assert_eq!(read(&pieces), read(&[bytes]), "said in pieces");
}

/// What a client says to a relay behind its ClientInfo.
fn derp_server(input: &[u8]) {
    static HELLO: OnceLock<Vec<u8>> = OnceLock::new();
    let private = NodePrivate::clamped([1; 32]);
    let hello = HELLO.get_or_init(|| {
        let mut hello = Vec::new();
        let client = NodePrivate::clamped([2; 32]);
        let (relay, nonce) = (private.public(), [3; 24]);
        put_client_info(&mut hello, &client, &relay, nonce, &ClientInfo::node());
        hello
    });
    let read = |pieces: &[&[u8]]| {
        let mut session = server::Session::default();
        let mut said = Vec::new();
        let end = [&hello[..]]
            .into_iter()
            .chain(pieces.iter().copied())
            .try_for_each(|piece| {
                session
                    .handle_input(&private, piece, &mut |event| {
                        said.push(format!("{event:?}"))
                    })
                    .map(drop)
            });
        assert!(said[0].starts_with("Hello"));
        (said, end.is_ok(), session.unknown_frames())
    };
    let (bytes, pieces) = pieces(input);
    assert_eq!(read(&pieces), read(&[bytes]), "said in pieces");
}

/// What stands around the frames of a relay: HTTP heads, the JSON of both hellos (as if the box
/// had opened), certificates, and frames before anyone is known.
fn derp_parts(input: &[u8]) {
    if let Ok(Some((len, status))) = parse_response(input) {
        assert!(len <= input.len() && status < 1000);
    }
    for port in [Port::Main, Port::Plain] {
        if let Ok(Some((len, _))) = parse_request(input, port, Some(&String::new)) {
            assert!(len <= input.len());
        }
    }
    if let Ok(info) = ClientInfo::from_json(input) {
        assert_eq!(ClientInfo::from_json(&info.to_json()).as_ref(), Ok(&info));
    }
    if let Ok(info) = ServerInfo::from_json(input) {
        assert_eq!(ServerInfo::from_json(&info.to_json()).as_ref(), Ok(&info));
    }
    if cert::relay_key([input]).is_some() {
        assert!(cert::is_meta(input));
    }
    let private = NodePrivate::clamped([1; 32]);
    let mut session = server::Session::default();
    let _ = session.handle_input(&private, input, &mut |_| ());
    let mut decoder = Decoder::default();
    let (_, pieces) = pieces(input);
    for mut piece in pieces {
        while let Ok(Some(raw)) = decoder.next(&mut piece, client_verdict) {
            assert!(raw.body().len() <= 24 + CLIENT_FRAME_LEN_MAX);
        }
        assert!(decoder.held_bytes() <= HEADER_LEN + 24 + CLIENT_FRAME_LEN_MAX);
    }
}

/// A DISCO datagram, and a plain text as if a datagram had opened to it.
fn disco(input: &[u8]) {
    let class = classify(input);
    assert_eq!(class == Class::Disco, disco::sender(input).is_some());
    assert!(class != Class::Stun || stun::is_stun(input));
    static SHARED: OnceLock<SharedKey> = OnceLock::new();
    let ours = DiscoPrivate::clamped([1; 32]);
    let shared = SHARED.get_or_init(|| {
        let theirs = DiscoPrivate::clamped([2; 32]).public();
        SharedKey::new(&ours, &theirs).expect("this key is not zero")
    });
    assert!(shared.open(input).is_err(), "nobody has sealed this");
    let Ok(message) = Message::parse(input) else {
        return;
    };
    let datagram = shared.seal(&ours.public(), [3; 24], &message);
    assert_eq!(classify(&datagram), Class::Disco);
    let plain = shared.open(&datagram).expect("we have sealed this");
    assert_eq!(plain.len(), message.encoded_len());
    assert_eq!(Message::parse(&plain), Ok(message));
}

/// A STUN datagram, at a client and at a server.
fn stun(input: &[u8]) {
    if stun::parse_response(input).is_ok() {
        assert!(stun::is_stun(input));
    }
    for from in ["192.0.2.1:4000", "[2001:db8::1]:4000"] {
        let from: SocketAddr = from.parse().expect("an address");
        let Some(answer) = stun::respond_to_any(input, from) else {
            assert!(stun::respond(input, from).is_none());
            continue;
        };
        let said = stun::parse_response(answer.as_ref()).expect("an answer of ours");
        assert_eq!(said.address, from);
        assert_eq!(input[8..20], said.tx_id);
    }
}

/// What a coordination server says to a client: the answer to its handshake when the first bit is
/// set, otherwise records behind a good handshake, and what they might carry at the front.
fn noise_client(input: &[u8]) {
    let (control, machine) = (
        MachinePrivate::clamped([1; 32]),
        MachinePrivate::clamped([2; 32]),
    );
    let ephemeral = MachinePrivate::clamped([3; 32]);
    let (initiator, hello) = Initiator::new(1, &machine, &control.public(), ephemeral)
        .expect("these keys are of full order");
    let (bytes, pieces) = pieces(input);
    if input.first().is_some_and(|first| first & 1 != 0) {
        assert!(initiator.finish(bytes).is_err(), "nobody has sealed this");
        return;
    }
    let server = MachinePrivate::clamped([4; 32]);
    let (_, answer) = respond(&control, &hello, &server).expect("a good handshake");
    let mut session = initiator.finish(&answer).expect("a good answer");
    let (mut held, mut plaintext) = (BytesMut::new(), BytesMut::new());
    let mut early = EarlyPayload::default();
    let mut stripped = BytesMut::new();
    let (mut opening, mut stripping) = (true, true);
    for piece in pieces {
        stripped.extend_from_slice(piece);
        stripping = stripping && early.strip(&mut stripped).is_ok();
        held.extend_from_slice(piece);
        opening = opening && session.opener.open(&mut held, &mut plaintext).is_ok();
        assert!(!opening || held.len() < RECORD_LEN_MAX);
    }
    assert!(plaintext.is_empty(), "nobody has sealed this");
}

/// What a client says first to a coordination server.
fn noise_server(input: &[u8]) {
    // The key of the published vectors, so that a seed may be a handshake that opens.
    let mut control = [0; KEY_LEN];
    control
        .iter_mut()
        .zip(0x20..)
        .for_each(|(byte, value)| *byte = value);
    let control = MachinePrivate::clamped(control);
    let ephemeral = MachinePrivate::clamped([3; 32]);
    if let Ok((accepted, answer)) = respond(&control, input, &ephemeral) {
        assert!(!accepted.machine.is_zero());
        assert_eq!(answer.len(), RESPONSE_LEN);
    }
}

/// The messages of a map stream, compressed when the first bit is set, and the map they make.
fn map_stream(input: &[u8]) {
    let (_, pieces) = pieces(input);
    let codec = match input.first() {
        Some(first) if first & 1 != 0 => Codec::Zstd,
        Some(_) | None => Codec::Plain,
    };
    let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).expect("a time in this century");
    let local: [IpNet; 1] = ["100.64.0.0/10".parse().expect("a prefix")];
    let mut reader = FrameReader::new(codec);
    let mut map = MapState::new(NodePublic([1; 32]));
    for piece in pieces {
        reader.handle_bytes(piece);
        while let Ok(Some(message)) = reader.poll_message() {
            let frame = encode(Codec::Plain, &message).expect("what was read can be written");
            let mut again = FrameReader::new(Codec::Plain);
            again.handle_bytes(&frame);
            let again = again.poll_message().expect("what was written can be read");
            assert_eq!(again.as_ref(), Some(&message), "read again");
            let _ = map.handle_response(now, message);
            drop(map.snapshot(now, &local));
            let _ = map.next_expiry(now);
        }
    }
}

/// A list of operations on a coordination server and its clients. `now` is any moment.
fn coordination(now: Instant, input: &[u8]) {
    crate::coord::operations::run(now, input);
}

/// A list of operations on a relay's registry and its connections.
fn relay(input: &[u8]) {
    crate::driver::derp_server::operations::run(input);
}

/// Feeds a connection's bytes to a fresh device, cut into pieces as the first byte says, and reads
/// the device back at the end. Panics where a rule is broken.
pub fn uapi(input: &[u8]) {
    let (cut, bytes) = input.split_first().unwrap_or((&0, &[]));
    let mut device = Device::default();
    let mut parser = Parser::new(|name| (name == "eth0").then_some(2));
    for piece in bytes.chunks((usize::from(*cut) + 1).min(READ_LEN_MAX)) {
        parser.handle_bytes(piece);
        uapi_requests(&mut parser, &mut device);
    }
    parser.handle_end();
    uapi_requests(&mut parser, &mut device);
    assert!(parser.is_closed());
    let ids = device.peers().map(|(id, _)| id).collect();
    let (mut configs, _) = device.peers_now(&ids);
    let prefixes: usize = configs.iter().map(|peer| peer.allowed_ips.len()).sum();
    assert_eq!(configs.len(), device.peers_len());
    assert_eq!(prefixes, device.allowed_ips_len());
    configs.sort_by_key(|peer| peer.id);
    configs.dedup_by_key(|peer| peer.id);
    assert_eq!(
        configs.len(),
        device.peers_len(),
        "an id was given out twice"
    );
}

/// A network of one name.
fn dns_wish(config: DnsConfig) -> Wish {
    let addresses: [IpNet; 1] = [IpNet::from(std::net::IpAddr::from([100, 64, 0, 1]))];
    let own = Own {
        name: "a.lab.example.",
        addresses: &addresses,
        names_have_v6: false,
    };
    Wish::new(&config.into(), own, std::iter::empty(), &Exit::None, true)
}

/// A question for a name.
fn dns_question(input: &[u8]) {
    static WISH: OnceLock<Wish> = OnceLock::new();
    let wish = WISH.get_or_init(|| {
        dns_wish(DnsConfig {
            proxied: true,
            ..DnsConfig::default()
        })
    });
    match message::read(input) {
        Read::Question(question) => {
            let query = &question.query;
            let decision = wish.zones.decide(query.name(), query.query_type());
            if let Some(answer) = question.answer(&wish.zones, &decision) {
                let answer = answer.to_vec().expect("an answer of ours can be written");
                assert!(message::answers(input, &answer));
            }
            let failed = question.truncated().to_vec();
            assert!(failed.is_ok_and(|failed| message::is_truncated(&failed)));
        }
        Read::Answer(answer) => assert_eq!(message::id(&answer), message::id(input)),
        Read::Nothing => {}
    }
}

/// What a network says about names.
fn dns_settings(input: &[u8]) {
    let Ok(config) = serde_json::from_slice::<DnsConfig>(input) else {
        return;
    };
    assert!(config.extra_records.len() <= DNS_RECORDS_MAX);
    assert!(config.routes.len() <= DNS_SUFFIXES_MAX);
    let text = serde_json::to_string(&config).expect("it can be written");
    let again: DnsConfig = serde_json::from_str(&text).expect("and be read");
    assert_eq!(again.left_out, 0);
    let wish = dns_wish(config);
    assert!(wish.problems().count() <= 32);
    let name = hickory_proto::rr::Name::from_ascii("a.lab.example.").expect("a name");
    let decision = wish.zones.decide(&name, hickory_proto::rr::RecordType::A);
    assert!(matches!(
        decision,
        Decision::Addresses(_) | Decision::NoData
    ));
}

fn uapi_requests(parser: &mut Parser, device: &mut Device) {
    while let Some(request) = parser.poll_request() {
        match request {
            Request::Get => {
                let reply = device.reply(DeviceStatus::default(), &|_| PeerStatus::default());
                assert!(reply.as_bytes().ends_with(b"errno=0\n\n"));
            }
            Request::BadGet(errno) => drop(Reply::to_bad_get(errno)),
            Request::Set(Ok(transaction)) => {
                if device.check(&transaction).is_ok() {
                    device.apply(transaction);
                }
            }
            Request::Set(Err(errno)) => drop(Reply::to_set(Err(errno))),
        }
    }
}

/// A policy file, and what it makes of a few nodes.
fn policy(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let policy = match Policy::parse(text) {
        Ok(policy) => policy,
        Err(error) => {
            let line = text.split('\n').nth(error.line - 1);
            let columns = line.expect("it is a line of the text").chars().count() + 1;
            assert!((1..=columns).contains(&error.column), "{error}");
            return;
        }
    };
    let node = |id: u8, user: &str, tags: &[&str], routes: &[&str]| PolicyNode {
        id: id.into(),
        addresses: [
            [100, 64, 0, id].into(),
            [0xfd7a, 0, 0, 0, 0, 0, 0, id.into()].into(),
        ],
        user: user.to_owned(),
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        routes: routes.iter().filter_map(|net| net.parse().ok()).collect(),
    };
    let nodes = vec![
        node(1, "ann", &[], &[]),
        node(2, "bob", &[], &["0.0.0.0/0", "::/0"]),
        node(3, "ann", &["tag:a", "tag:b"], &["10.20.0.0/16"]),
        node(4, "ann", &[], &[]),
    ];
    let compiled = Compiled::new(&policy, nodes);
    for viewer in 1..=4 {
        let weight: usize = compiled.filter(viewer).iter().map(FilterRule::weight).sum();
        assert!(weight <= 3 * PARTS_MAX, "{weight}");
        for peer in 1..=4 {
            assert_eq!(compiled.sees(viewer, peer), compiled.sees(peer, viewer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seeds that the fuzzer starts from, and what it has found.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "any moment to count from")]
    fn the_corpus_holds() {
        let corpus = |target: &str| -> Vec<Vec<u8>> {
            let path = format!("{}/fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
            let entries = std::fs::read_dir(path).unwrap();
            entries
                .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
                .collect()
        };
        for (target, run) in TARGETS {
            let seeds = corpus(target);
            assert!(!seeds.is_empty(), "{target} has no corpus");
            seeds.iter().for_each(|bytes| run(Instant::now(), bytes));
        }
    }
}
