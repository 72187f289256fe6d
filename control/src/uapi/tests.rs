//! The protocol page's transcript and check list, against the codec and the device behind it.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use ringtail_dataplane::PeerId;

use super::*;
use crate::device::Device;
use crate::key::NodePublic;

const A_PRIVATE: &str = "9032268c98d013ff4bf9c957e688f4754d74bc3c059fd67b30874db6c8167574";
const A_PUBLIC: &str = "515906647cb947ea90da162f18d49d09bea5186041d8a6d4021f8c05c86b7845";
const B_PRIVATE: &str = "504b720dfb4b431b61b0ce3539eb3a1290d6abd3aa7e7c1c1aed3fc78b75cc6b";
const B_PUBLIC: &str = "1b9c9eb12197534484c82498e7602b237939df9de6c0093d7cec043e9684d451";
const C_PUBLIC: &str = "0e5045fa5fe9f406f1a464c0707d0b94e6160b15ed95e97620f72cbf6d615321";
const ZERO: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// `protocol/uapi.md` §7, without the `>` and `<` in front.
const TRANSCRIPT: &str = include_str!("transcript.txt");

/// A device without a data plane: a port is whatever was asked for, and B has had traffic.
#[derive(Clone, Default)]
struct Daemon {
    device: Device,
    port: u16,
}

impl Daemon {
    fn answer(&mut self, request: Request) -> Reply {
        match request {
            Request::Get => self.get(),
            Request::BadGet(errno) => Reply::to_bad_get(errno),
            Request::Set(result) => Reply::to_set(result.and_then(|transaction| {
                self.device.check(&transaction)?;
                self.port = transaction.listen_port.unwrap_or(self.port);
                self.device.apply(transaction);
                Ok(())
            })),
        }
    }

    fn get(&self) -> Reply {
        let status = DeviceStatus {
            listen_port: self.port,
            ..DeviceStatus::default()
        };
        let b: Option<PeerId> = self
            .device
            .peers()
            .find_map(|(id, peer)| (peer.key.to_hex() == B_PUBLIC).then_some(id));
        self.device.reply(status, &|id| {
            if Some(id) != b {
                return PeerStatus::default();
            }
            PeerStatus {
                last_handshake: Some(Duration::new(1_795_284_000, 125_000_000)),
                tx_bytes: 1428,
                rx_bytes: 1372,
                ..PeerStatus::default()
            }
        })
    }

    /// One connection: everything sent, then the end of the stream.
    fn talk(&mut self, sent: &[u8], cut: usize) -> String {
        let mut parser = Parser::new(|_| None);
        let mut replies = String::new();
        let mut serve = |daemon: &mut Daemon, parser: &mut Parser| {
            while let Some(request) = parser.poll_request() {
                let reply = daemon.answer(request);
                replies += std::str::from_utf8(reply.as_bytes()).unwrap();
            }
        };
        for piece in sent.chunks(cut) {
            parser.handle_bytes(piece);
            serve(self, &mut parser);
        }
        parser.handle_end();
        serve(self, &mut parser);
        assert!(parser.is_closed());
        replies
    }

    fn ask(&mut self, sent: &str) -> String {
        self.talk(sent.as_bytes(), 4096)
    }

    fn state(&self) -> String {
        std::str::from_utf8(self.get().as_bytes())
            .unwrap()
            .to_owned()
    }
}

/// What the client sends and what it is to receive, turn by turn.
fn turns() -> Vec<(String, String)> {
    let mut turns: Vec<(String, String)> = Vec::new();
    let mut answering = true;
    for line in TRANSCRIPT.lines() {
        let (side, text) = line.split_at(1);
        let text = text.strip_prefix(' ').unwrap_or(text);
        let answers = side == "<";
        if answering && !answers {
            turns.push(Default::default());
        }
        answering = answers;
        let turn = turns.last_mut().unwrap();
        let part = if answers { &mut turn.1 } else { &mut turn.0 };
        part.push_str(text);
        part.push('\n');
    }
    turns
}

#[test]
fn the_transcript_of_the_protocol_page_comes_out_byte_for_byte() {
    let turns = turns();
    assert_eq!(turns.len(), 5);
    for cut in [1, 7, 4096] {
        let mut daemon = Daemon::default();
        for (sent, wanted) in &turns {
            assert_eq!(&daemon.talk(sent.as_bytes(), cut), wanted, "after {sent}");
        }
        let state = daemon.state();
        assert!(!state.contains(B_PUBLIC), "{state}");
        assert!(state.contains("allowed_ip=10.30.1.0/24\nallowed_ip=10.20.0.0/16\n"));
    }
}

#[test]
fn pipelined_requests_are_all_answered_in_order() {
    let mut whole = Daemon::default();
    let (mut sent, mut wanted) = (String::new(), String::new());
    for (request, reply) in turns() {
        sent += &request;
        wanted += &reply;
    }
    for cut in [1, 3, 100, 65_536] {
        assert_eq!(whole.talk(sent.as_bytes(), cut), wanted);
        whole = Daemon::default();
    }
}

#[test]
fn an_empty_probe_and_strange_first_lines_are_closed_without_a_reply() {
    for sent in [
        "",
        "\n",
        "get=2\n\n",
        "get=1",
        "get=1\n",
        "get=1\r\n\r\n",
        "set=1",
        " get=1\n\n",
        "\0\0\0\n",
        "GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut daemon = Daemon::default();
        assert_eq!(daemon.ask(sent), "", "{sent:?}");
    }
}

#[test]
fn a_get_with_more_behind_it_is_refused_once_and_stays_in_step() {
    let mut daemon = Daemon::default();
    assert_eq!(
        daemon.ask("get=1\nx=y\nz\n\nset=1\n\n"),
        "errno=22\n\nerrno=0\n\n"
    );
    let mut parser = Parser::new(|_| None);
    parser.handle_bytes(b"get=1\nx\n");
    let answered_at_once = parser.poll_request();
    assert!(matches!(
        answered_at_once,
        Some(Request::BadGet(Errno::INVALID))
    ));
}

#[test]
fn the_end_of_the_stream_ends_a_set() {
    for tail in ["fwmark=7\n\n", "fwmark=7\n", "fwmark=7"] {
        let mut daemon = Daemon::default();
        assert_eq!(daemon.ask(&format!("set=1\n{tail}")), "errno=0\n\n");
        assert_eq!(daemon.device.fwmark(), 7);
    }
    assert_eq!(Daemon::default().ask("set=1\n"), "errno=0\n\n");
    assert_eq!(Daemon::default().ask("set=1\nbad=1\n"), "errno=-22\n\n");
}

#[test]
fn every_bad_line_has_its_number_and_the_connection_stays_in_step() {
    let peer = format!("public_key={B_PUBLIC}\n");
    let short = &A_PRIVATE[1..];
    let cases = [
        ("nonsense", -71),
        ("=", -22),
        ("colour=red", -22),
        ("Listen_port=1", -22),
        (" listen_port=1", -22),
        ("listen_port =1", -22),
        ("listen_port= 1", -22),
        ("listen_port=", -22),
        ("listen_port=65536", -22),
        ("listen_port=-1", -22),
        ("fwmark=4294967296", -22),
        ("fwmark=0x1", -22),
        ("replace_peers=false", -22),
        ("replace_peers=1", -22),
        ("private_key=", -22),
        (&format!("private_key={short}"), -22),
        (&format!("private_key={short}g"), -22),
        (&format!("private_key=0{A_PRIVATE}"), -22),
        ("own_public_key=1", -22),
        ("ringtail_shards=1", -22),
        ("errno=0", -22),
        ("get=1", -22),
        ("set=1", -22),
        ("fwmark=1\0", -22),
        ("public_key=", -22),
        // Peer keys where no peer is selected.
        ("remove=true", -22),
        ("endpoint=192.0.2.1:5", -22),
        ("allowed_ip=10.0.0.0/8", -22),
        ("protocol_version=1", -22),
        // Device keys, and worse, behind a peer.
        (&format!("{peer}listen_port=1"), -22),
        (&format!("{peer}fwmark=1"), -22),
        (&format!("{peer}private_key={A_PRIVATE}"), -22),
        (&format!("{peer}replace_peers=true"), -22),
        (&format!("{peer}remove=false"), -22),
        (&format!("{peer}update_only=yes"), -22),
        (&format!("{peer}replace_allowed_ips=false"), -22),
        (&format!("{peer}preshared_key=1234"), -22),
        (&format!("{peer}endpoint=host.example:5"), -22),
        (&format!("{peer}endpoint=192.0.2.1"), -22),
        (&format!("{peer}persistent_keepalive_interval=65536"), -22),
        (&format!("{peer}persistent_keepalive_interval=off"), -22),
        (&format!("{peer}allowed_ip=10.0.0.0/33"), -22),
        (&format!("{peer}allowed_ip=--10.0.0.0/8"), -22),
        (&format!("{peer}allowed_ip=10.0.0.0"), -22),
        (&format!("{peer}protocol_version=2"), -22),
        (&format!("{peer}protocol_version=0"), -22),
        (&format!("{peer}last_handshake_time_sec=1"), -22),
        (&format!("{peer}tx_bytes=1"), -22),
        (&format!("{peer}rx_bytes=1"), -22),
        (&format!("{peer}nonsense"), -71),
    ];
    for (line, errno) in cases {
        let mut daemon = Daemon::default();
        let before = daemon.state();
        let request = format!("set=1\nlisten_port=7\nfwmark=9\n{line}\nfwmark=3\n\nset=1\n\n");
        let reply = daemon.ask(&request);
        assert_eq!(reply, format!("errno={errno}\n\nerrno=0\n\n"), "{line}");
        assert_eq!(daemon.state(), before, "{line}");
    }
}

#[test]
fn carriage_returns_and_upper_case_hex_are_taken_as_by_wireguard_go() {
    let mut daemon = Daemon::default();
    let upper = A_PRIVATE.to_uppercase();
    let reply = daemon.ask(&format!("set=1\nprivate_key={upper}\r\n\r\nget=1\n\n"));
    assert_eq!(
        reply,
        format!("errno=0\n\nprivate_key={A_PRIVATE}\nerrno=0\n\n")
    );
}

#[test]
fn a_line_that_never_ends_is_refused_and_forgotten() {
    let mut daemon = Daemon::default();
    let long = "x".repeat(1 << 20);
    let reply = daemon.ask(&format!("set=1\nfwmark=1\na={long}\n\nset=1\nfwmark=2\n\n"));
    assert_eq!(reply, "errno=-5\n\nerrno=0\n\n");
    assert_eq!(daemon.device.fwmark(), 2);
    assert_eq!(
        daemon.ask(&format!("set=1\nfwmark=3\na={long}")),
        "errno=-5\n\n"
    );
    assert_eq!(daemon.device.fwmark(), 2);
    assert_eq!(daemon.ask(&format!("get=1\n{long}\n\n")), "errno=5\n\n");
    assert_eq!(daemon.ask(&long), "");
    let just_fits = "a=".to_owned() + &"x".repeat(LINE_LEN_MAX - 2);
    assert_eq!(
        daemon.ask(&format!("set=1\n{just_fits}\n\n")),
        "errno=-22\n\n"
    );

    // A first line like that closes the connection before it ends, and holds no memory.
    let mut parser = Parser::new(|_| None);
    let capacity = LINE_LEN_MAX + READ_LEN_MAX;
    for _ in 0..8 {
        parser.handle_bytes(&long.as_bytes()[..READ_LEN_MAX]);
        assert!(parser.poll_request().is_none());
        assert!(parser.buffered() <= capacity);
    }
    assert!(parser.is_closed());
}

#[test]
fn private_keys_are_set_replaced_removed_and_clamped() {
    let mut daemon = Daemon::default();
    daemon.ask(&format!("set=1\nprivate_key={A_PRIVATE}\n\n"));
    assert!(
        daemon
            .state()
            .starts_with(&format!("private_key={A_PRIVATE}\n"))
    );
    daemon.ask(&format!("set=1\nprivate_key={B_PRIVATE}\n\n"));
    assert!(
        daemon
            .state()
            .starts_with(&format!("private_key={B_PRIVATE}\n"))
    );
    daemon.ask(&format!("set=1\nprivate_key={ZERO}\n\n"));
    assert_eq!(daemon.state(), "errno=0\n\n");
    let ones = "f".repeat(64);
    daemon.ask(&format!("set=1\nprivate_key={ones}\n\n"));
    let clamped = format!("private_key=f8{}7f\n", "f".repeat(60));
    assert!(daemon.state().starts_with(&clamped));
}

#[test]
fn our_own_key_is_no_peer_whichever_comes_first() {
    let mut daemon = Daemon::default();
    let own_first = format!(
        "set=1\nprivate_key={A_PRIVATE}\npublic_key={B_PUBLIC}\nallowed_ip=10.0.0.0/8\n\
         public_key={A_PUBLIC}\nendpoint=192.0.2.1:1\nallowed_ip=10.0.0.0/8\n\n"
    );
    assert_eq!(daemon.ask(&own_first), "errno=0\n\n");
    let state = daemon.state();
    assert!(!state.contains(A_PUBLIC) && state.contains("allowed_ip=10.0.0.0/8"));
    // A bad value in the ignored section is still bad.
    let bad = format!("set=1\npublic_key={A_PUBLIC}\nendpoint=x\n\n");
    assert_eq!(daemon.ask(&bad), "errno=-22\n\n");

    // The new private key is the one of a peer: that peer goes, with its prefixes.
    assert_eq!(
        daemon.ask(&format!("set=1\nprivate_key={B_PRIVATE}\n\n")),
        "errno=0\n\n"
    );
    let state = daemon.state();
    assert!(
        !state.contains(B_PUBLIC) && !state.contains("10.0.0.0/8"),
        "{state}"
    );
    assert_eq!(daemon.device.allowed_ips_len(), 0);
}

#[test]
fn zero_keys_mean_none_and_a_zero_peer_is_a_peer() {
    let mut daemon = Daemon::default();
    let reply = daemon.ask(&format!(
        "set=1\npublic_key={ZERO}\npreshared_key={ZERO}\nprotocol_version=1\n\n"
    ));
    assert_eq!(reply, "errno=0\n\n");
    let (_, peer) = daemon.device.peers().next().unwrap();
    assert_eq!(peer.key, NodePublic([0; 32]));
    assert!(peer.preshared_key.is_none());
    assert!(daemon.state().contains(&format!("preshared_key={ZERO}\n")));
}

/// Random requests, most of them good lines, some bad, some cut: one that is refused leaves what
/// was there before, and one that is taken leaves what a plain model says.
#[test]
fn a_set_is_all_or_nothing() {
    let rounds: u64 = std::env::var("UAPI_ROUNDS").map_or(100, |n| n.parse().unwrap());
    for seed in 0..rounds {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut daemon = Daemon::default();
        for _ in 0..12 {
            let text = random_set(&mut rng);
            let before = daemon.clone();
            let reply = daemon.ask(&text);
            if reply != "errno=0\n\n" {
                assert!(reply.starts_with("errno=-"), "seed {seed}: {reply}");
                assert_eq!(daemon.state(), before.state(), "seed {seed}: {text}");
            }
        }
    }
}

fn random_set(rng: &mut StdRng) -> String {
    let mut text = "set=1\n".to_owned();
    let keys = [A_PUBLIC, B_PUBLIC, C_PUBLIC, ZERO];
    let privates = [A_PRIVATE, B_PRIVATE, ZERO];
    for _ in 0..rng.random_range(0..3) {
        text += &match rng.random_range(0..5) {
            0 => format!("private_key={}\n", privates[rng.random_range(0..3)]),
            1 => format!("listen_port={}\n", rng.random_range(0..65_700)),
            2 => format!("fwmark={}\n", rng.random_range(0..9)),
            3 => "replace_peers=true\n".to_owned(),
            _ => String::new(),
        };
    }
    for _ in 0..rng.random_range(0..20) {
        let net = rng.random_range(0..6);
        text += &match rng.random_range(0..25) {
            0..6 => format!("public_key={}\n", keys[rng.random_range(0..4)]),
            6 => "remove=true\n".to_owned(),
            7 => "update_only=true\n".to_owned(),
            8 => "replace_allowed_ips=true\n".to_owned(),
            9..18 => format!("allowed_ip=10.{net}.0.1/16\n"),
            18..20 => format!("allowed_ip=-10.{net}.0.0/16\n"),
            20 => format!("endpoint=192.0.2.1:{net}\n"),
            21 => format!("persistent_keepalive_interval={net}\n"),
            22 => format!("preshared_key={}\n", privates[rng.random_range(0..3)]),
            23 => "protocol_version=1\n".to_owned(),
            _ if rng.random_bool(0.1) => "bad=1\n".to_owned(),
            _ => String::new(),
        };
    }
    text.push('\n');
    text
}

#[test]
fn no_bytes_break_it() {
    let rounds: u64 = std::env::var("UAPI_ROUNDS").map_or(600, |n| n.parse().unwrap());
    let whole: String = turns().into_iter().map(|(sent, _)| sent).collect();
    for seed in 0..rounds {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bytes = match seed % 3 {
            0 => whole.clone().into_bytes(),
            1 => random_set(&mut rng).into_bytes(),
            _ => (0..rng.random_range(0..300))
                .map(|_| rng.random())
                .collect(),
        };
        for _ in 0..rng.random_range(0..6) {
            if bytes.is_empty() {
                break;
            }
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..4) {
                0 => bytes[at] = rng.random(),
                1 => bytes.truncate(at),
                2 => bytes.insert(at, b"\n\0\r=-0"[rng.random_range(0..6)]),
                _ => drop(bytes.remove(at)),
            }
        }
        bytes.insert(0, rng.random());
        crate::fuzzing::uapi(&bytes);
    }
    crate::fuzzing::uapi(&[]);
}

#[test]
fn extras_go_before_the_first_peer_and_behind_each() {
    let mut daemon = Daemon::default();
    daemon.ask(&format!(
        "set=1\npublic_key={C_PUBLIC}\nallowed_ip=10.0.0.0/8\n\n"
    ));
    let status = DeviceStatus {
        listen_port: 1,
        extras: vec![("shards".to_owned(), "2".to_owned())],
        ..DeviceStatus::default()
    };
    let reply = daemon.device.reply(status, &|_| PeerStatus {
        extras: vec![("path", "direct\nerrno=1".to_owned())],
        ..PeerStatus::default()
    });
    let text = std::str::from_utf8(reply.as_bytes()).unwrap();
    assert!(
        text.starts_with("listen_port=1\nringtail_shards=2\npublic_key="),
        "{text}"
    );
    let end = "allowed_ip=10.0.0.0/8\nringtail_path=direct errno=1\nerrno=0\n\n";
    assert!(text.ends_with(end), "{text}");
}
