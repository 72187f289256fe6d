//! Replies, in the order of keys that wireguard-go prints.

use std::fmt::{Display, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use ringtail_dataplane::Prefix;
use zeroize::Zeroizing;

use super::{Errno, PresharedKey};
use crate::key::{KEY_LEN, NodePrivate, NodePublic, write_hex};

/// Bytes of a peer without its allowed IPs, about; and of one allowed IP.
const PEER_LEN: usize = 512;
const ALLOWED_IP_LEN: usize = 40;
/// Bytes of everything else, about.
const DEVICE_LEN: usize = 2048;

/// What a `get` says of the device itself.
#[derive(Clone, Debug, Default)]
pub struct DeviceStatus<'a> {
    /// The private key, if there is one.
    pub private_key: Option<&'a NodePrivate>,
    /// UDP port in use; 0 is not printed.
    pub listen_port: u16,
    /// Mark on the sockets; 0 is not printed.
    pub fwmark: u32,
    /// Keys of our own and their values; `ringtail_` is put before each key.
    pub extras: Vec<(String, String)>,
}

/// What a `get` says of one peer.
#[derive(Clone, Debug, Default)]
pub struct PeerStatus<'a> {
    /// The peer's key.
    pub public_key: NodePublic,
    /// The preshared key; none prints as zeros.
    pub preshared_key: Option<&'a PresharedKey>,
    /// Where we send now.
    pub endpoint: Option<SocketAddr>,
    /// Wall clock time of the last handshake since the Unix epoch; none prints as 0.
    pub last_handshake: Option<Duration>,
    /// Bytes of WireGuard messages sent.
    pub tx_bytes: u64,
    /// Bytes of authenticated WireGuard messages received.
    pub rx_bytes: u64,
    /// Keep-alive period in seconds; 0 is off.
    pub keepalive: u16,
    /// Keys of our own and their values, printed last; `ringtail_` is put before each key.
    pub extras: Vec<(&'static str, String)>,
}

/// A reply being written; wiped when dropped, for it holds keys.
pub struct Reply(Zeroizing<String>);

impl Reply {
    /// The reply to a `set`.
    pub fn to_set(result: Result<(), Errno>) -> Self {
        let mut reply = Self(Zeroizing::default());
        reply.line("errno", result.err().map_or(0, |errno| -errno.0));
        reply.end()
    }

    /// The reply to a `get` that is refused.
    pub fn to_bad_get(errno: Errno) -> Self {
        let mut reply = Self(Zeroizing::default());
        reply.line("errno", errno.0);
        reply.end()
    }

    /// Begins the reply to a `get`, with room for this many peers and allowed IPs.
    pub fn to_get(device: &DeviceStatus<'_>, peers: usize, allowed_ips: usize) -> Self {
        let len = DEVICE_LEN + peers * PEER_LEN + allowed_ips * ALLOWED_IP_LEN;
        let mut reply = Self(Zeroizing::new(String::with_capacity(len)));
        if let Some(key) = device.private_key {
            reply.key("private_key", key.as_bytes());
        }
        if device.listen_port != 0 {
            reply.line("listen_port", device.listen_port);
        }
        if device.fwmark != 0 {
            reply.line("fwmark", device.fwmark);
        }
        for (key, value) in &device.extras {
            reply.extra(key, value);
        }
        reply
    }

    /// Adds a peer.
    pub fn peer(&mut self, peer: &PeerStatus<'_>, allowed_ips: impl Iterator<Item = Prefix>) {
        self.key("public_key", &peer.public_key.0);
        let preshared_key = peer.preshared_key.map_or(&[0; KEY_LEN], |key| &key.0);
        self.key("preshared_key", preshared_key);
        self.line("protocol_version", 1);
        if let Some(endpoint) = peer.endpoint {
            self.line("endpoint", endpoint);
        }
        let handshake = peer.last_handshake.unwrap_or_default();
        self.line("last_handshake_time_sec", handshake.as_secs());
        self.line("last_handshake_time_nsec", handshake.subsec_nanos());
        self.line("tx_bytes", peer.tx_bytes);
        self.line("rx_bytes", peer.rx_bytes);
        self.line("persistent_keepalive_interval", peer.keepalive);
        for prefix in allowed_ips {
            self.line(
                "allowed_ip",
                format_args!("{}/{}", prefix.addr, prefix.bits),
            );
        }
        for (key, value) in &peer.extras {
            self.extra(key, value);
        }
    }

    /// Ends the reply to a `get`.
    #[must_use]
    pub fn finish(mut self) -> Self {
        self.line("errno", 0);
        self.end()
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    fn end(mut self) -> Self {
        self.0.push('\n');
        self
    }

    fn line(&mut self, key: &str, value: impl Display) {
        writeln!(self.0, "{key}={value}").expect("a String takes every write");
    }

    fn key(&mut self, key: &str, bytes: &[u8; KEY_LEN]) {
        write!(self.0, "{key}=").expect("a String takes every write");
        write_hex(&mut *self.0, bytes).expect("a String takes every write");
        self.0.push('\n');
    }

    /// A newline in a value would end the line, so it is left out.
    fn extra(&mut self, key: &str, value: &str) {
        let value = value.replace('\n', " ");
        writeln!(self.0, "ringtail_{key}={value}").expect("a String takes every write");
    }
}
