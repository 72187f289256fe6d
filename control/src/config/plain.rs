//! Plain WireGuard peers, which a node may have beside its network: `[[peer]]` of its own file.
//!
//! They know this node by its key. Nobody tells them of another, so with any of them the key is renewed only when
//! somebody asks for it (`ringtail login`), who then gives them the new one, which `status` shows.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer};

use crate::key::NodePublic;

/// Plain peers at most.
pub const PLAIN_PEERS_MAX: usize = 1024;

/// One of them, in the words of wg(8).
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainPeer {
    /// A name for people; the beginning of its key if there is none.
    #[serde(default)]
    pub name: String,
    /// Its key, in base64 or behind `nodekey:`.
    #[serde(deserialize_with = "public_key")]
    pub public_key: NodePublic,
    /// File with the preshared key, in base64.
    #[serde(default)]
    pub preshared_key_file: Option<PathBuf>,
    /// Prefixes routed to it and accepted from it.
    #[serde(deserialize_with = "super::routes")]
    pub allowed_ips: Vec<IpNet>,
    /// Where it is; without it the peer has to come to us.
    #[serde(default)]
    pub endpoint: Option<Endpoint>,
    /// Seconds between packets that keep a NAT open; 0 is off.
    #[serde(default)]
    pub persistent_keepalive: u16,
    /// It may open connections to us, whatever the network's filter says of its addresses.
    #[serde(default)]
    pub allow_in: bool,
}

/// Where a plain peer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// There.
    Address(SocketAddr),
    /// At this port of a host of that name, which is looked up again and again.
    Name(String, u16),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let parts = text.rsplit_once(':');
        let parts = parts.and_then(|(name, port)| Some((name, port.parse::<u16>().ok()?)));
        match parts {
            Some((name, port)) if port != 0 && is_name(name) => Ok(Self::Name(name.into(), port)),
            Some(_) | None => Err(format!(
                "{text:?} is no endpoint: write ADDRESS:PORT, [IPV6]:PORT or NAME:PORT"
            )),
        }
    }
}

fn is_name(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    // What is all digits and dots was meant for an address.
    let letters = text.bytes().any(|byte| byte.is_ascii_alphabetic());
    (1..=253).contains(&text.len()) && text.bytes().all(good) && letters
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

fn public_key<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NodePublic, D::Error> {
    let text = String::deserialize(deserializer)?;
    let key = text.parse().ok();
    let key = key.or_else(|| Some(NodePublic(STANDARD.decode(&text).ok()?.try_into().ok()?)));
    key.ok_or_else(|| {
        serde::de::Error::custom(
            "a public key is 44 characters of base64, as `wg pubkey` prints it",
        )
    })
}

/// Checks peers against each other.
///
/// # Errors
/// A sentence that says what to change.
pub(super) fn check(peers: &[PlainPeer]) -> Result<(), String> {
    if peers.len() > PLAIN_PEERS_MAX {
        return Err(format!("over {PLAIN_PEERS_MAX} [[peer]] entries"));
    }
    for (index, peer) in peers.iter().enumerate() {
        let before = &peers[..index];
        if before
            .iter()
            .any(|other| other.public_key == peer.public_key)
        {
            return Err(format!(
                "[[peer]] {}: another has the same public_key",
                peer.label()
            ));
        }
        if let Some(other) = before.iter().find(|other| other.label() == peer.label()) {
            return Err(format!("two [[peer]] entries are called {}", other.label()));
        }
    }
    Ok(())
}

impl PlainPeer {
    /// Its name, or the beginning of its key.
    pub fn label(&self) -> String {
        if self.name.is_empty() {
            STANDARD.encode(&self.public_key.0[..6])
        } else {
            self.name.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct File {
        peer: Vec<PlainPeer>,
    }

    fn parse(text: &str) -> Result<Vec<PlainPeer>, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        Ok(file.peer)
    }

    const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

    #[test]
    fn a_peer_is_read_in_the_words_of_wg() {
        let text = format!(
            "[[peer]]\npublic_key = \"{KEY}\"\nallowed_ips = [\"10.9.0.0/24\", \"fd00::1/128\"]\n\
             endpoint = \"vpn.example:51820\"\npersistent_keepalive = 25\n"
        );
        let peers = parse(&text).unwrap();
        assert_eq!(
            peers[0].endpoint,
            Some(Endpoint::Name("vpn.example".into(), 51820))
        );
        assert_eq!(peers[0].label(), "xTIBA5rb");
        assert_eq!(peers[0].persistent_keepalive, 25);
        assert!(!peers[0].allow_in);
        let by_node_key = text.replace(KEY, &peers[0].public_key.to_string());
        assert_eq!(parse(&by_node_key).unwrap(), peers);
        let twice = [peers[0].clone(), peers[0].clone()];
        assert!(check(&peers).is_ok());
        assert!(check(&twice).unwrap_err().contains("same public_key"));
    }

    #[test]
    fn nonsense_is_refused_with_a_sentence() {
        for (change, said) in [
            ("endpoint = \"10.0.0.1\"", "no endpoint"),
            ("endpoint = \"10.0.0:1\"", "no endpoint"),
            ("endpoint = \"a b:1\"", "no endpoint"),
            ("endpoint = \"host:0\"", "no endpoint"),
            ("endpoint = \"host:99999\"", "no endpoint"),
            ("keepalive = 1", "unknown field"),
            ("persistent_keepalive = 70000", "persistent_keepalive"),
        ] {
            let text = format!("[[peer]]\npublic_key = \"{KEY}\"\nallowed_ips = []\n{change}\n");
            let error = parse(&text).unwrap_err();
            assert!(error.contains(said), "{change}: {error}");
        }
        let short = "[[peer]]\npublic_key = \"abc\"\nallowed_ips = []\n";
        assert!(parse(short).unwrap_err().contains("44 characters"));
        let bits = format!("[[peer]]\npublic_key = \"{KEY}\"\nallowed_ips = [\"10.0.0.1/24\"]\n");
        assert!(parse(&bits).unwrap_err().contains("10.0.0.0/24"));
    }
}
