//! The static network file: a network written by hand, without a coordination server.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;

use super::{ConfigError, read_toml};
use crate::key::{DiscoPublic, NodePublic};
use crate::netmap::DerpMap;

/// A whole network as one node sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StaticNetwork {
    /// Own inner addresses with their prefix lengths.
    pub addresses: Vec<IpNet>,
    /// Id of the region where peers expect us; 0 without relays.
    pub home: u32,
    /// The relays.
    pub derp_map: DerpMap,
    /// Everybody else.
    pub peers: Vec<StaticPeer>,
}

/// One peer of a static network.
#[derive(Clone, Debug, PartialEq)]
pub struct StaticPeer {
    /// For `ringtail status` and `ringtail ping`.
    pub name: String,
    /// WireGuard identity and DERP address.
    pub node_key: NodePublic,
    /// Without it the peer is reached by relay and at `endpoints` only.
    pub disco_key: DiscoPublic,
    /// Id of the region where the peer is at home; 0 for none.
    pub home: u32,
    /// Inner addresses.
    pub addresses: Vec<IpNet>,
    /// Prefixes routed to the peer; its addresses when the file says nothing.
    pub allowed_ips: Vec<IpNet>,
    /// Where it may be reached directly.
    pub endpoints: Vec<SocketAddr>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    addresses: Vec<IpNet>,
    #[serde(default)]
    home: Option<Region>,
    #[serde(default)]
    derp_map: Option<PathBuf>,
    #[serde(default, rename = "peer")]
    peers: Vec<FilePeer>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePeer {
    name: Option<String>,
    node_key: NodePublic,
    #[serde(default)]
    disco_key: DiscoPublic,
    #[serde(default)]
    home: Option<Region>,
    addresses: Vec<IpNet>,
    #[serde(default, deserialize_with = "super::optional_routes")]
    allowed_ips: Option<Vec<IpNet>>,
    #[serde(default)]
    endpoints: Vec<SocketAddr>,
}

/// A region by id or by code.
#[derive(Deserialize)]
#[serde(untagged)]
enum Region {
    Id(u32),
    Code(String),
}

impl StaticNetwork {
    /// Reads the file, and the DERP map it names (JSON; relative to the file's own folder).
    ///
    /// # Errors
    /// When a file cannot be read or parsed, a region is not in the map, or two peers share a
    /// key or a prefix.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let file: File = read_toml(path)?;
        let derp_map = match &file.derp_map {
            None => DerpMap::default(),
            Some(map) => {
                let map = path.parent().unwrap_or_else(|| Path::new("")).join(map);
                let text = std::fs::read_to_string(&map).map_err(|source| ConfigError::Read {
                    path: map.clone(),
                    source,
                })?;
                let value = serde_json::from_str(&text).map_err(|error| error.to_string());
                let read = value.and_then(DerpMap::from_file);
                read.map_err(|error| ConfigError::Invalid {
                    path: map.clone(),
                    message: format!("not a DERP map: {error}"),
                })?
            }
        };
        file.resolve(derp_map)
            .map_err(|message| ConfigError::Invalid {
                path: path.to_owned(),
                message,
            })
    }
}

impl File {
    fn resolve(self, derp_map: DerpMap) -> Result<StaticNetwork, String> {
        if self.addresses.is_empty() {
            return Err("addresses is empty; give this node at least one inner address".into());
        }
        let region = |wanted: &Option<Region>, whose: &str| -> Result<u32, String> {
            let found = match wanted {
                None => return Ok(0),
                Some(Region::Id(id)) => derp_map.regions.contains_key(id).then_some(*id),
                Some(Region::Code(code)) => derp_map
                    .regions
                    .iter()
                    .find_map(|(id, region)| (region.region_code == *code).then_some(*id)),
            };
            let codes: Vec<_> = derp_map
                .regions
                .values()
                .map(|r| r.region_code.as_str())
                .collect();
            found.ok_or_else(|| {
                format!(
                    "the home of {whose} is not a region of the DERP map, which has [{}]",
                    codes.join(", ")
                )
            })
        };
        let home = region(&self.home, "this node")?;
        if home == 0 && !derp_map.regions.is_empty() {
            return Err(
                "home is missing: without coordination peers cannot learn which relay \
                        this node is at, so name one region of the DERP map"
                    .into(),
            );
        }
        let mut keys = BTreeSet::new();
        let mut prefixes = BTreeSet::new();
        let mut peers = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            let name = peer.name.clone().unwrap_or_else(|| peer.node_key.short());
            if peer.node_key.is_zero() {
                return Err(format!("peer {name}: node_key is all zeros"));
            }
            if !keys.insert(peer.node_key) {
                return Err(format!("peer {name}: another peer has the same node_key"));
            }
            let allowed_ips = peer
                .allowed_ips
                .clone()
                .unwrap_or_else(|| peer.addresses.clone());
            for prefix in &allowed_ips {
                if !prefixes.insert(prefix.trunc()) {
                    return Err(format!(
                        "peer {name}: {prefix} is routed to another peer too"
                    ));
                }
            }
            peers.push(StaticPeer {
                home: region(&peer.home, &format!("peer {name}"))?,
                name,
                node_key: peer.node_key,
                disco_key: peer.disco_key,
                addresses: peer.addresses.clone(),
                allowed_ips: allowed_ips.iter().map(IpNet::trunc).collect(),
                endpoints: peer.endpoints.clone(),
            });
        }
        Ok(StaticNetwork {
            addresses: self.addresses,
            home,
            derp_map,
            peers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::NodePrivate;

    fn map() -> DerpMap {
        serde_json::from_str(
            r#"{"Regions":{"900":{"RegionID":900,"RegionCode":"nyc"},
                           "901":{"RegionID":901,"RegionCode":"fra"}}}"#,
        )
        .unwrap()
    }

    fn parse(text: &str) -> Result<StaticNetwork, String> {
        toml::from_str::<File>(text)
            .map_err(|e| e.to_string())?
            .resolve(map())
    }

    fn peer(seed: u8, home: &str, address: &str) -> String {
        let key = NodePrivate::clamped([seed; 32]).public();
        format!("[[peer]]\nnode_key = \"{key}\"\nhome = {home}\naddresses = [\"{address}\"]\n")
    }

    #[test]
    fn regions_go_by_code_or_id_and_addresses_are_the_default_routes() {
        let text = format!(
            "addresses = [\"10.7.0.1/24\"]\nhome = \"nyc\"\n{}",
            peer(1, "901", "10.7.0.2/32")
        );
        let network = parse(&text).unwrap();
        assert_eq!((network.home, network.peers[0].home), (900, 901));
        assert_eq!(
            network.peers[0].allowed_ips,
            ["10.7.0.2/32".parse().unwrap()]
        );
    }

    #[test]
    fn contradictions_are_named() {
        let head = "addresses = [\"10.7.0.1/24\"]\nhome = \"nyc\"\n";
        let twice = peer(1, "900", "10.7.0.2/32");
        let other = peer(2, "900", "10.7.0.2/32");
        for (text, part) in [
            ("addresses = []\nhome = 900".to_owned(), "addresses"),
            (
                "addresses = [\"10.7.0.1/24\"]".to_owned(),
                "home is missing",
            ),
            (
                format!("{head}{}", peer(1, "\"ams\"", "10.7.0.2/32")),
                "[nyc, fra]",
            ),
            (format!("{head}{twice}{twice}"), "same node_key"),
            (format!("{head}{twice}{other}"), "another peer too"),
            (format!("{head}colour = 1"), "colour"),
            (
                format!("{head}{twice}allowed_ips = [\"10.8.0.1/24\"]"),
                "write 10.8.0.0/24",
            ),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
