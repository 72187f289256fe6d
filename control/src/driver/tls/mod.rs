//! TLS for relay connections: rustls' own connection state over buffers that the caller owns.
//!
//! [`Tls`] is sans-I/O: ciphertext goes into its inbox, plaintext comes out record by record,
//! and what is to be written gathers in one buffer, so that a hundred packets are a handful of
//! full 16 KiB records and one write. [`stream`] moves those buffers, by tokio or by tokio-uring;
//! [`verify`] says which certificates a relay may show, and [`roots`] who may vouch for them.

pub mod roots;
pub mod stream;
pub mod verify;

use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, ProtocolVersion, ServerConfig};

/// What a TLS record costs at most beside its plaintext: header, TLS 1.2 explicit nonce, tag and
/// content type, rounded up.
const RECORD_OVERHEAD: usize = 64;

/// Plaintext of a full record.
const RECORD_LEN: usize = 16 << 10;

/// Room for alerts and key updates beside application data.
const SLACK: usize = 1 << 10;

/// What a relay may make us hold unread: a handshake with every certificate it has.
pub(crate) const CLIENT_INBOX_MAX: usize = 1 << 20;

/// What a client may: a record that is not complete, and a ClientHello cut into several.
const SERVER_INBOX_MAX: usize = 32 << 10;

/// Why a TLS connection ended.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The peer broke the protocol, or its certificate was refused.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
    /// The write keys are used up, which takes longer than any connection lives.
    #[error("the TLS keys of this connection are used up")]
    Exhausted,
    /// It has failed before and is not to be used again.
    #[error("the TLS connection has failed before")]
    Failed,
    /// More ciphertext than any record holds arrived without making a record.
    #[error("the TLS peer sends no complete records")]
    Flood,
}

/// The ciphers of relay connections, the fastest first: with AES instructions AES-128-GCM is about
/// twice as fast as AES-256 and ChaCha20, and both ends of a private network are ours to choose.
pub fn provider() -> Arc<CryptoProvider> {
    use ring::cipher_suite as suite;
    let mut provider = ring::default_provider();
    let first = [
        suite::TLS13_AES_128_GCM_SHA256,
        suite::TLS13_CHACHA20_POLY1305_SHA256,
        suite::TLS13_AES_256_GCM_SHA384,
    ];
    provider
        .cipher_suites
        .sort_by_key(|suite| first.iter().position(|s| s == suite).unwrap_or(first.len()));
    Arc::new(provider)
}

/// A relay's TLS: given chain and key, no ALPN, no session tickets (tailscaled never resumes).
///
/// # Errors
/// When the key does not fit the certificate.
pub fn server_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    // The server's order decides, so that every client gets the fastest suite it knows.
    config.ignore_client_order = true;
    Ok(config)
}

/// One of the two ends of a connection, as rustls drives it.
pub trait Engine {
    /// rustls' marker for the end.
    type Data;

    /// Looks at ciphertext from its beginning and says what to do next.
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Engine for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, ClientConnectionData> {
        self.process_tls_records(incoming)
    }
}

impl Engine for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, ServerConnectionData> {
        self.process_tls_records(incoming)
    }
}

/// The state of one connection.
pub struct Tls<E> {
    engine: E,
    /// Ciphertext that came and is not used up; the caller appends.
    pub inbox: Vec<u8>,
    /// Bytes that may be left in it.
    inbox_max: usize,
    out: Vec<u8>,
    /// Bytes of `out` that are written.
    out_start: usize,
    /// Where what is to be written ends; the rest is spare and stays initialised, because clearing
    /// 128 KiB before every write would cost as much as copying it.
    out_len: usize,
    established: bool,
    closed: bool,
    failed: bool,
}

impl<E> std::fmt::Debug for Tls<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls")
            .field("established", &self.established)
            .field("closed", &self.closed)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

/// The client's end.
pub type ClientTls = Tls<UnbufferedClientConnection>;

/// The relay's end.
pub type ServerTls = Tls<UnbufferedServerConnection>;

impl ClientTls {
    /// Begins a connection to `name` (sent as SNI unless it is an address).
    ///
    /// # Errors
    /// rustls refuses the configuration.
    pub fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, TlsError> {
        let engine = UnbufferedClientConnection::new(config, name)?;
        Ok(Self::new(engine, CLIENT_INBOX_MAX))
    }

    /// The relay's certificates, and whether TLS 1.3 was negotiated, which alone protects them.
    pub fn peer_chain(&self) -> (&[CertificateDer<'static>], bool) {
        let chain = self.engine.peer_certificates().unwrap_or_default();
        let protected = self.engine.protocol_version() == Some(ProtocolVersion::TLSv1_3);
        (chain, protected)
    }
}

impl ServerTls {
    /// Begins to wait for a client.
    ///
    /// # Errors
    /// rustls refuses the configuration.
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, TlsError> {
        let engine = UnbufferedServerConnection::new(config)?;
        Ok(Self::new(engine, SERVER_INBOX_MAX))
    }
}

impl<E: Engine> Tls<E> {
    fn new(engine: E, inbox_max: usize) -> Self {
        Self {
            engine,
            inbox: Vec::new(),
            inbox_max,
            out: Vec::new(),
            out_start: 0,
            out_len: 0,
            established: false,
            closed: false,
            failed: false,
        }
    }

    /// Whether application data may be sent.
    pub fn is_established(&self) -> bool {
        self.established
    }

    /// Whether the peer has said that it sends no more.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// What is to be written.
    pub fn out(&self) -> &[u8] {
        &self.out[self.out_start..self.out_len]
    }

    /// Takes the buffer that is to be written and its length in bytes, for a transport that owns
    /// what it writes. [`Tls::give_back`] returns it.
    pub fn take_out(&mut self) -> (Vec<u8>, usize) {
        debug_assert_eq!(self.out_start, 0, "a caller writes in one of the two ways");
        let len = std::mem::take(&mut self.out_len);
        (std::mem::take(&mut self.out), len)
    }

    /// Returns the memory of [`Tls::take_out`], unless new output has been put elsewhere.
    pub fn give_back(&mut self, buffer: Vec<u8>) {
        if self.out_len == 0 && buffer.len() > self.out.len() {
            self.out = buffer;
        }
    }

    /// Says that the first `len` bytes of [`Tls::out`] are written.
    pub fn sent(&mut self, len: usize) {
        self.out_start += len;
        debug_assert!(
            self.out_start <= self.out_len,
            "only what is there is written"
        );
        if self.out_start == self.out_len {
            (self.out_start, self.out_len) = (0, 0);
        } else if self.out_start > self.out.len() / 2 {
            self.out.copy_within(self.out_start..self.out_len, 0);
            self.out_len -= self.out_start;
            self.out_start = 0;
        }
    }

    /// Bytes of memory that the buffers take.
    pub fn held_bytes(&self) -> usize {
        self.out.len() + self.inbox.capacity()
    }

    /// Gives memory back that the output does not need, when it waits for a slow peer.
    pub fn fit_out(&mut self) {
        let len = self.out_len - self.out_start;
        if self.out.len() > 2 * len + SLACK {
            self.out = self.out().to_vec();
            (self.out_start, self.out_len) = (0, len);
        }
    }

    /// Uses up what is in the inbox: handshake answers go to the output, plaintext to `sink`,
    /// once per record.
    ///
    /// # Errors
    /// [`TlsError`]; an alert for the peer may be in the output.
    pub fn handle_input(&mut self, mut sink: impl FnMut(&[u8])) -> Result<(), TlsError> {
        self.drive(None, &mut sink)?;
        if self.inbox.len() > self.inbox_max {
            return Err(TlsError::Flood);
        }
        Ok(())
    }

    /// Encrypts `plain` into the output, in full records. Must follow [`Tls::is_established`].
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn seal(&mut self, plain: &[u8]) -> Result<(), TlsError> {
        debug_assert!(self.established, "data goes out after the handshake");
        // The inbox was used up by `handle_input`, so no plaintext can come here; rustls wants
        // to see the same bytes again all the same, as it keeps positions in them.
        self.drive(Some(plain), &mut |_| ())
    }

    /// Puts a close notification into the output.
    pub fn close(&mut self) {
        if self.failed || !self.established {
            return;
        }
        let (engine, out) = (&mut self.engine, &mut self.out);
        if let Ok(ConnectionState::WriteTraffic(mut traffic)) =
            engine.process(&mut self.inbox).state
        {
            reserve(out, self.out_len + SLACK);
            self.out_len += traffic
                .queue_close_notify(&mut out[self.out_len..])
                .unwrap_or(0);
        }
    }

    fn drive(
        &mut self,
        plain: Option<&[u8]>,
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<(), TlsError> {
        if self.failed {
            return Err(TlsError::Failed);
        }
        let mut used = 0;
        let result = loop {
            let UnbufferedStatus { mut discard, state } =
                self.engine.process(&mut self.inbox[used..]);
            let go_on = match state {
                Err(error) => {
                    used += discard;
                    break self.alert(error, used);
                }
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        match record {
                            Ok(record) => {
                                discard += record.discard;
                                sink(record.payload);
                            }
                            Err(error) => return Err(error.into()),
                        }
                    }
                    true
                }
                Ok(ConnectionState::EncodeTlsData(mut encode)) => {
                    loop {
                        match encode.encode(&mut self.out[self.out_len..]) {
                            Ok(len) => break self.out_len += len,
                            Err(EncodeError::InsufficientSize(need)) => {
                                reserve(&mut self.out, self.out_len + need.required_size);
                            }
                            Err(EncodeError::AlreadyEncoded) => break,
                        }
                    }
                    true
                }
                Ok(ConnectionState::TransmitTlsData(transmit)) => {
                    // The caller writes the output in order, which is all that is asked for.
                    transmit.done();
                    true
                }
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    self.established = true;
                    if let Some(plain) = plain {
                        self.out_len += encrypt(&mut traffic, plain, &mut self.out, self.out_len)?;
                    }
                    false
                }
                Ok(ConnectionState::PeerClosed) => {
                    self.closed = true;
                    true
                }
                Ok(ConnectionState::Closed) => {
                    self.closed = true;
                    false
                }
                // Early data is not accepted, and states of a later rustls wait for more input.
                Ok(_) => false,
            };
            used += discard;
            if !go_on {
                break Ok(());
            }
        };
        self.inbox.drain(..used.min(self.inbox.len()));
        result
    }

    /// Fetches the alert rustls wants to send before it gives up.
    fn alert(&mut self, error: rustls::Error, used: usize) -> Result<(), TlsError> {
        self.failed = true;
        reserve(&mut self.out, self.out_len + SLACK);
        // Once only: rustls looks at the bad input again when no alert waits any more, and
        // asserts that it never has to send two.
        if let Ok(ConnectionState::EncodeTlsData(mut encode)) =
            self.engine.process(&mut self.inbox[used..]).state
        {
            self.out_len += encode.encode(&mut self.out[self.out_len..]).unwrap_or(0);
        }
        Err(error.into())
    }
}

fn encrypt<D>(
    traffic: &mut WriteTraffic<'_, D>,
    plain: &[u8],
    out: &mut Vec<u8>,
    at: usize,
) -> Result<usize, TlsError> {
    let records = plain.len() / RECORD_LEN + 1;
    reserve(out, at + plain.len() + records * RECORD_OVERHEAD + SLACK);
    loop {
        match traffic.encrypt(plain, &mut out[at..]) {
            Ok(len) => return Ok(len),
            Err(EncryptError::InsufficientSize(need)) => reserve(out, at + need.required_size),
            Err(EncryptError::EncryptExhausted) => return Err(TlsError::Exhausted),
        }
    }
}

/// Makes the buffer at least this long, and then half as long again, so that it settles soon.
fn reserve(out: &mut Vec<u8>, len: usize) {
    if out.len() < len {
        out.resize(len + len / 2, 0);
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_pinned_relay_is_trusted_and_its_key_comes_with_the_handshake() {
        let relay = crate::key::NodePrivate::from_random([3; 32]).public();
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
        let relay = NodePublic([1; 32]);
        let (server, leaf) = relay_chain("192.0.2.7", &relay);
        let (mut c, mut s) = pair(&node("192.0.2.7", &verify::pin_of(&leaf)), server);
        shuttle(&mut c, &mut s, 1 << 20).unwrap();
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
        let relay = NodePublic([1; 32]);
        let (server, leaf) = relay_chain("192.0.2.7", &relay);
        let (mut c, mut s) = pair(&node("192.0.2.7", &verify::pin_of(&leaf)), server);
        shuttle(&mut c, &mut s, 1 << 20).unwrap();
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
}
