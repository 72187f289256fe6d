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
mod tests;
