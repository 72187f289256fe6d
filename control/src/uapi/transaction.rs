//! A `set` request: lines become steps, checked one by one, applied only when all are good.

use std::fmt;
use std::net::SocketAddr;

use ringtail_dataplane::Prefix;
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::{Errno, value};
use crate::key::{NodePrivate, NodePublic};

/// Steps of one request at most: every prefix that a device may have, and what `wg` says of each peer
/// beside them.
pub const STEPS_MAX: usize = (1 << 20) + (1 << 17);

/// A preshared key (32 bytes), wiped when dropped.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey(pub [u8; 32]);

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(secret)")
    }
}

/// A whole `set` request whose every line is good.
#[derive(Clone, Debug, Default)]
pub struct Transaction {
    /// The new private key, clamped; the inner `None` removes it.
    pub private_key: Option<Option<NodePrivate>>,
    /// The new UDP port; 0 is any free one.
    pub listen_port: Option<u16>,
    /// The new mark; 0 is none.
    pub fwmark: Option<u32>,
    /// Whether all peers go before the steps.
    pub replace_peers: bool,
    /// What to do to the peers, in order.
    pub steps: Vec<Step>,
}

/// One line of a peer section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Select the peer of this key, making it if there is none; what follows is about it.
    Peer(NodePublic),
    /// Forget the section if the peer was made by it.
    UpdateOnly,
    /// Remove the peer and ignore the rest of the section.
    Remove,
    /// Use this preshared key from the next handshake on; `None` for none.
    PresharedKey(Option<PresharedKey>),
    /// Send there from now on.
    Endpoint(SocketAddr),
    /// Keep-alive period in seconds; 0 for none.
    Keepalive(u16),
    /// Clear the peer's allowed IPs.
    ReplaceAllowedIps,
    /// Give the prefix to the peer, whoever has it.
    Allow(Prefix),
    /// Take the prefix from the peer if it has it.
    Disallow(Prefix),
}

impl Transaction {
    /// Whether it changes nothing, whatever the device.
    pub fn is_empty(&self) -> bool {
        self.private_key.is_none()
            && self.listen_port.is_none()
            && self.fwmark.is_none()
            && !self.replace_peers
            && self.steps.is_empty()
    }

    /// Takes one line without its newline.
    pub(super) fn take_line(
        &mut self,
        line: &[u8],
        resolve: fn(&str) -> Option<u32>,
    ) -> Result<(), Errno> {
        let line = std::str::from_utf8(line).map_err(|_| Errno::INVALID)?;
        let (key, value) = line.split_once('=').ok_or(Errno::PROTOCOL)?;
        if key == "public_key" {
            self.push(Step::Peer(NodePublic(value::key(value)?)))
        } else if self.steps.is_empty() {
            self.take_device_line(key, value)
        } else {
            self.take_peer_line(key, value, resolve)
        }
    }

    fn take_device_line(&mut self, key: &str, value: &str) -> Result<(), Errno> {
        match key {
            "private_key" => {
                let mut bytes = value::key(value)?;
                // Clamped as `wg genkey` does; `get` shows the key that is really used.
                let private = (bytes != [0; 32]).then(|| NodePrivate::clamped(bytes));
                bytes.zeroize();
                self.private_key = Some(private);
            }
            "listen_port" => self.listen_port = Some(value::uint(value)?),
            "fwmark" => self.fwmark = Some(value::uint(value)?),
            "replace_peers" => {
                value::truth(value)?;
                self.replace_peers = true;
            }
            _ => return Err(Errno::INVALID),
        }
        Ok(())
    }

    fn take_peer_line(
        &mut self,
        key: &str,
        value: &str,
        resolve: fn(&str) -> Option<u32>,
    ) -> Result<(), Errno> {
        self.push(match key {
            "update_only" => {
                value::truth(value)?;
                Step::UpdateOnly
            }
            "remove" => {
                value::truth(value)?;
                Step::Remove
            }
            "preshared_key" => {
                let mut bytes = value::key(value)?;
                let key = (bytes != [0; 32]).then_some(PresharedKey(bytes));
                bytes.zeroize();
                Step::PresharedKey(key)
            }
            "endpoint" => Step::Endpoint(value::endpoint(value, resolve)?),
            "persistent_keepalive_interval" => Step::Keepalive(value::uint(value)?),
            "replace_allowed_ips" => {
                value::truth(value)?;
                Step::ReplaceAllowedIps
            }
            "allowed_ip" => match value.strip_prefix('-') {
                None => Step::Allow(value::prefix(value)?),
                Some(value) => Step::Disallow(value::prefix(value)?),
            },
            "protocol_version" if value == "1" => return Ok(()),
            _ => return Err(Errno::INVALID),
        })
    }

    fn push(&mut self, step: Step) -> Result<(), Errno> {
        if self.steps.len() >= STEPS_MAX {
            return Err(Errno::NO_SPACE);
        }
        self.steps.push(step);
        Ok(())
    }
}
