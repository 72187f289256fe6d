use super::*;
use crate::derp::cert;
use crate::key::NodePublic;
use crate::netmap::DerpNode;
use rcgen::{PublicKeyData as _, SigningKey as _};

/// A self-signed relay certificate with a meta-certificate behind it.
pub(crate) fn relay_chain(name: &str, relay: &NodePublic) -> (Arc<ServerConfig>, Vec<u8>) {
    let certified = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let throw_away = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let public: [u8; 32] = throw_away.der_bytes().try_into().unwrap();
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let meta = cert::build_meta(relay, 2, now, &public, |m| throw_away.sign(m)).unwrap();
    let leaf = certified.cert.der().clone();
    let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let config = server_config(vec![leaf.clone(), meta.into()], key).unwrap();
    (Arc::new(config), leaf.to_vec())
}

fn pair(node: &DerpNode, server: Arc<ServerConfig>) -> (ClientTls, ServerTls) {
    pair_trusting(roots::web(), node, server)
}

fn pair_trusting(
    roots: Arc<rustls::RootCertStore>,
    node: &DerpNode,
    server: Arc<ServerConfig>,
) -> (ClientTls, ServerTls) {
    let (config, name) = verify::Verifiers::new(roots).client_config(node).unwrap();
    (
        ClientTls::client(config, name).unwrap(),
        ServerTls::server(server).unwrap(),
    )
}

/// Moves output to the other inbox until both are quiet, `step` bytes at a time.
fn shuttle(
    client: &mut ClientTls,
    server: &mut ServerTls,
    step: usize,
) -> Result<(Vec<u8>, Vec<u8>), TlsError> {
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    client.handle_input(|p| to_client.extend_from_slice(p))?;
    loop {
        let n = client.out().len().min(step);
        server.inbox.extend_from_slice(&client.out()[..n]);
        client.sent(n);
        let served = server.handle_input(|p| to_server.extend_from_slice(p));
        let m = server.out().len().min(step);
        client.inbox.extend_from_slice(&server.out()[..m]);
        server.sent(m);
        client.handle_input(|p| to_client.extend_from_slice(p))?;
        served?;
        if n + m == 0 {
            return Ok((to_client, to_server));
        }
    }
}

fn node(host: &str, cert_name: &str) -> DerpNode {
    DerpNode {
        host_name: host.to_owned(),
        cert_name: cert_name.to_owned(),
        ..DerpNode::default()
    }
}

/// A client and a relay whose handshake is over.
fn established() -> (ClientTls, ServerTls) {
    let (server, leaf) = relay_chain("192.0.2.7", &NodePublic([1; 32]));
    let (mut c, mut s) = pair(&node("192.0.2.7", &verify::pin_of(&leaf)), server);
    shuttle(&mut c, &mut s, 1 << 20).unwrap();
    (c, s)
}

#[test]
fn a_pinned_relay_is_trusted_and_its_key_comes_with_the_handshake() {
    let relay = crate::key::NodePrivate::clamped([3; 32]).public();
    for host in ["192.0.2.7", "relay.example"] {
        let (server, leaf) = relay_chain(host, &relay);
        let pin = verify::pin_of(&leaf);
        for step in [1, 100, 1 << 20] {
            let (mut c, mut s) = pair(&node(host, &pin), server.clone());
            shuttle(&mut c, &mut s, step).unwrap();
            assert!(c.is_established() && s.is_established());
            let (chain, protected) = c.peer_chain();
            assert!(protected);
            let found = cert::relay_key(chain.iter().map(AsRef::as_ref));
            assert_eq!(found, Some((relay, 2)));
            assert_eq!(
                c.engine.negotiated_cipher_suite().map(|s| s.suite()),
                Some(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256)
            );
        }
    }
}

#[test]
fn a_private_ca_counts_where_it_is_named_and_for_its_names_only() {
    let (ca, server) = roots::tests::private_ca("relay.example");
    let server = Arc::new(server);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, ca).unwrap();
    let named = roots::load(Some(&file)).unwrap();
    let pin = "sha256-raw:".to_owned() + &"0".repeat(64);
    for (roots, host, cert_name, complaint) in [
        (named.clone(), "relay.example", "", None),
        // The name in the map counts, not the host's.
        (named.clone(), "192.0.2.7", "relay.example", None),
        (named.clone(), "other.example", "", Some("NotValidForName")),
        (named.clone(), "192.0.2.7", "", Some("NotValidForName")),
        (roots::web(), "relay.example", "", Some("UnknownIssuer")),
        (named, "relay.example", pin.as_str(), Some("CertName wants")),
    ] {
        let (mut c, mut s) = pair_trusting(roots, &node(host, cert_name), server.clone());
        let ended = shuttle(&mut c, &mut s, 1 << 20);
        let error = ended.err().map(|error| format!("{error:?}"));
        match complaint {
            None => assert!(error.is_none() && c.is_established(), "{host}: {error:?}"),
            Some(text) => assert!(error.is_some_and(|e| e.contains(text)), "{host}: {text}"),
        }
    }
}

#[test]
fn data_goes_both_ways_in_full_records_and_ends_cleanly() {
    let (mut c, mut s) = established();
    let big: Vec<u8> = (0..200_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    c.seal(&big).unwrap();
    // 200,000 bytes are 12 full records and one more, 22 bytes of overhead each.
    assert_eq!(c.out().len(), big.len() + 13 * 22);
    s.seal(b"down").unwrap();
    let (down, up) = shuttle(&mut c, &mut s, 777).unwrap();
    assert_eq!((down.as_slice(), up), (&b"down"[..], big));
    c.close();
    shuttle(&mut c, &mut s, 1 << 20).unwrap();
    assert!(s.is_closed());
}

#[test]
fn other_certificates_are_refused() {
    let relay = NodePublic([1; 32]);
    let (server, leaf) = relay_chain("192.0.2.7", &relay);
    let pin = verify::pin_of(&leaf);
    let upper = pin.to_uppercase().replace("SHA256-RAW", "sha256-raw");
    let other = format!("sha256-raw:{}", "0".repeat(64));
    for (host, cert_name) in [
        // Another pin, the pin in upper case, and no pin for a self-signed certificate.
        ("192.0.2.7", other.as_str()),
        ("192.0.2.7", upper.as_str()),
        ("192.0.2.7", ""),
        ("192.0.2.7", "relay.example"),
        // The right pin, but an SNI that the certificate does not cover.
        ("relay.example", pin.as_str()),
    ] {
        let (mut c, mut s) = pair(&node(host, cert_name), server.clone());
        let result = shuttle(&mut c, &mut s, 1 << 20);
        assert!(result.is_err(), "{host} {cert_name}");
        // The refusal is told to the relay.
        assert!(!c.out().is_empty());
    }
    let mut any = node("192.0.2.9", "");
    any.insecure_for_tests = true;
    let (mut c, mut s) = pair(&any, server);
    shuttle(&mut c, &mut s, 1 << 20).unwrap();
}

#[test]
fn key_updates_without_end_leave_one_answer_and_then_end_the_connection() {
    let (mut c, mut s) = established();
    let update = |c: &mut ClientTls, data: bool| {
        if let Ok(ConnectionState::WriteTraffic(traffic)) = c.engine.process(&mut []).state {
            traffic.refresh_traffic_keys().unwrap();
        }
        c.handle_input(|_| ()).unwrap();
        if data {
            c.seal(b"x").unwrap();
        }
        let (bytes, len) = c.take_out();
        bytes[..len].to_vec()
    };
    // With data between them: rustls holds one answer, however many were asked for.
    for _ in 0..200 {
        s.inbox.extend(update(&mut c, true));
        s.handle_input(|_| ()).unwrap();
    }
    s.seal(b"y").unwrap();
    assert!(s.out().len() < 200, "{}", s.out().len());
    // Without, it has enough soon.
    let ended = (0..100).any(|_| {
        s.inbox.extend(update(&mut c, false));
        s.handle_input(|_| ()).is_err()
    });
    assert!(ended);
    assert!(s.out().len() < 1000);
}

#[test]
fn a_client_s_handshake_in_tiny_pieces_is_not_held_for_ever() {
    let (server, _) = relay_chain("192.0.2.7", &NodePublic([1; 32]));
    let mut tls = ServerTls::server(server).unwrap();
    // A ClientHello of 64 KiB, a byte to the record.
    let mut message = vec![1, 0, 0xff, 0xf0, 3, 3];
    message.resize(1 << 16, 0);
    let mut most = 0;
    let ended = message.iter().any(|byte| {
        tls.inbox.extend([22, 3, 1, 0, 1, *byte]);
        let result = tls.handle_input(|_| ());
        most = most.max(tls.inbox.len());
        result.is_err()
    });
    assert!(ended);
    assert!(most <= SERVER_INBOX_MAX + 6, "{most}");
}

#[test]
fn random_bytes_end_the_connection() {
    let (server, _) = relay_chain("192.0.2.7", &NodePublic([1; 32]));
    for seed in 0..200_u8 {
        let mut tls = ServerTls::server(server.clone()).unwrap();
        let mut fed = 0;
        let mut byte = seed;
        let ended = loop {
            tls.inbox.extend((0..1000).map(|_| {
                byte = byte.wrapping_mul(141).wrapping_add(3);
                byte
            }));
            fed += 1000;
            match tls.handle_input(|_| panic!("no plaintext")) {
                Err(_) => break true,
                Ok(()) if fed > 100_000 => break false,
                Ok(()) => {}
            }
        };
        assert!(ended);
    }
}
