//! JSON of `/machine/map`, both directions; [`register`] has that of `/machine/register` and `/key`, [`dns`]
//! the DNS settings.
//!
//! Field names are Go's (tailcfg/tailcfg.go in tailscale/tailscale v1.102.3). Absent and `null`
//! are the same for every collection, unknown fields are ignored, elements of address lists that
//! do not parse are skipped, and the time of year 1 means "no time"
//! (`protocol/coordination.md`, "JSON conventions"). A zero key means "none".

mod dns;
mod register;

pub use dns::*;
pub use register::*;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::derp_map::{DerpMap, DerpRegion, HomeParams, is_default, null_is_default};
use crate::key::{DiscoPublic, MachinePublic, NodePublic};

/// The capability version ringtail speaks: 130, which is Tailscale 1.90. It stands in the Noise
/// header and prologue, in `/key?v=`, and in every request
/// (`protocol/coordination.md`, "Capability version").
pub const CAPABILITY_VERSION: u16 = 130;

/// Node attributes: key to values.
pub type CapMap = BTreeMap<String, Option<Vec<Value>>>;

/// A point in time as RFC 3339 text; year 1 stands for "none".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WireTime(pub OffsetDateTime);

impl WireTime {
    /// The time, or none for the zero time of Go.
    pub fn get(self) -> Option<OffsetDateTime> {
        (self.0.year() > 1).then_some(self.0)
    }
}

impl Serialize for WireTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = self.0.format(&Rfc3339).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for WireTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        OffsetDateTime::parse(&text, &Rfc3339)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

/// Takes a list of texts, leaves out those that do not parse; `null` is an empty list.
fn lenient<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
{
    Ok(lenient_option(deserializer)?.unwrap_or_default())
}

/// As [`lenient`], but tells `null` and an empty list apart.
fn lenient_option<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
{
    let texts = Option::<Vec<String>>::deserialize(deserializer)?;
    Ok(texts.map(|texts| texts.iter().filter_map(|text| text.parse().ok()).collect()))
}

/// A node: ourselves or a peer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Node {
    /// Key of all peer tables; never 0, never reused.
    #[serde(rename = "ID")]
    pub id: i64,
    /// Opaque.
    #[serde(rename = "StableID")]
    pub stable_id: String,
    /// FQDN with a trailing dot.
    pub name: String,
    /// Owner.
    pub user: i64,
    /// WireGuard public key.
    pub key: NodePublic,
    /// When the key stops being valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_expiry: Option<WireTime>,
    /// Machine key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachinePublic>,
    /// Absent or zero: a peer without path discovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disco_key: Option<DiscoPublic>,
    /// Its own /32 and /128.
    #[serde(deserialize_with = "lenient")]
    pub addresses: Vec<IpNet>,
    /// What may be routed to it and may come from it; absent means the same as `addresses`.
    #[serde(
        rename = "AllowedIPs",
        deserialize_with = "lenient_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub allowed_ips: Option<Vec<IpNet>>,
    /// UDP candidates.
    #[serde(deserialize_with = "lenient", skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<SocketAddr>,
    /// Legacy home relay, `127.3.3.40:N`. Read, never written.
    #[serde(
        rename = "DERP",
        deserialize_with = "null_is_default",
        skip_serializing
    )]
    pub legacy_derp: String,
    /// Home relay region; 0 is unknown.
    #[serde(rename = "HomeDERP", skip_serializing_if = "is_default")]
    pub home_derp: u32,
    /// As announced by the node; may be trimmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostinfo: Option<Value>,
    /// When it was registered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<WireTime>,
    /// Its capability version; unreliable on Headscale.
    #[serde(skip_serializing_if = "is_default")]
    pub cap: i64,
    /// `tag:…` names.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub tags: Vec<String>,
    /// Subnet routes it serves as primary.
    #[serde(deserialize_with = "lenient", skip_serializing_if = "Vec::is_empty")]
    pub primary_routes: Vec<IpNet>,
    /// Only meaningful while offline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<WireTime>,
    /// Absent is unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online: Option<bool>,
    /// For ourselves: false while an approval is awaited.
    pub machine_authorized: bool,
    /// Legacy form of `cap_map`. Read, never written.
    #[serde(deserialize_with = "null_is_default", skip_serializing)]
    pub capabilities: Vec<String>,
    /// Node attributes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap_map: Option<CapMap>,
    /// No network access for this peer.
    #[serde(rename = "UnsignedPeerAPIOnly", skip_serializing_if = "is_default")]
    pub unsigned_peer_api_only: bool,
    /// The key has expired: no traffic to or from it.
    #[serde(skip_serializing_if = "is_default")]
    pub expired: bool,
    /// Plain WireGuard: no disco, no relay, static endpoints.
    #[serde(rename = "IsWireGuardOnly", skip_serializing_if = "is_default")]
    pub is_wireguard_only: bool,
    /// It may not open connections to us.
    #[serde(skip_serializing_if = "is_default")]
    pub is_jailed: bool,
}

impl Node {
    /// Prefixes of all its lists.
    #[must_use]
    pub fn prefixes(&self) -> usize {
        let allowed_ips = self.allowed_ips.as_ref().map_or(0, Vec::len);
        self.addresses.len() + allowed_ips + self.primary_routes.len()
    }

    /// Brings a received node into the one form the rest of the program knows: home region from
    /// the legacy text, allowed IPs filled in, old capabilities moved, zero keys gone
    /// (`protocol/coordination-map.md` §4).
    pub fn normalise(&mut self) {
        if self.home_derp == 0
            && let Some(region) = self.legacy_derp.strip_prefix("127.3.3.40:")
        {
            self.home_derp = region.parse().unwrap_or(0);
        }
        self.legacy_derp.clear();
        if self.allowed_ips.is_none() || self.unsigned_peer_api_only {
            self.allowed_ips = Some(self.addresses.clone());
        }
        for capability in self.capabilities.drain(..) {
            self.cap_map
                .get_or_insert_default()
                .entry(capability)
                .or_insert(None);
        }
        self.endpoints.truncate(super::ENDPOINTS_MAX);
        self.disco_key = self.disco_key.filter(|key| !key.is_zero());
        self.machine = self.machine.filter(|key| !key.is_zero());
    }
}

/// Field-wise change of one peer; each field counts only when present.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PeerChange {
    /// Whom it is about; unknown peers are ignored.
    #[serde(rename = "NodeID")]
    pub node_id: i64,
    /// New home region; 0 is absent.
    #[serde(rename = "DERPRegion", skip_serializing_if = "is_default")]
    pub derp_region: u32,
    /// New capability version; 0 is absent.
    #[serde(skip_serializing_if = "is_default")]
    pub cap: i64,
    /// New attributes, replacing all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap_map: Option<CapMap>,
    /// New endpoints, replacing all. Go drops an empty list, so a list that became empty cannot
    /// be told this way.
    #[serde(
        deserialize_with = "lenient_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub endpoints: Option<Vec<SocketAddr>>,
    /// New WireGuard key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<NodePublic>,
    /// New disco key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disco_key: Option<DiscoPublic>,
    /// Came or left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online: Option<bool>,
    /// Last seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<WireTime>,
    /// New expiry; year 1 clears it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_expiry: Option<WireTime>,
}

/// A DERP map as it travels: parts may be absent, regions may be `null`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DerpMapUpdate {
    /// Absent keeps the old regions; a `null` region is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regions: Option<BTreeMap<u32, Option<DerpRegion>>>,
    /// Absent keeps the old parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub home_params: Option<HomeParams>,
    /// Kept with the old regions.
    #[serde(
        rename = "omitDefaultRegions",
        deserialize_with = "null_is_default",
        skip_serializing_if = "is_default"
    )]
    pub omit_default_regions: bool,
}

impl From<&DerpMap> for DerpMapUpdate {
    fn from(map: &DerpMap) -> Self {
        let regions = map.regions.iter().map(|(id, r)| (*id, Some(r.clone())));
        Self {
            regions: Some(regions.collect()),
            home_params: map.home_params.clone(),
            omit_default_regions: map.omit_default_regions,
        }
    }
}

/// Inclusive port range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

/// A destination of a filter rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PortDestination {
    /// `*`, address, prefix or inclusive range `a-b`.
    #[serde(rename = "IP")]
    pub ip: String,
    /// Prefix length beside `ip`, long dead: its presence refuses the filter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<i64>,
    /// 0 to 65535 is all.
    #[serde(deserialize_with = "null_is_default")]
    pub ports: PortRange,
}

/// One rule of the packet filter (`protocol/coordination-map.md` §9). Application grants (`CapGrant`), of
/// any size, are not read: they admit no packets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct FilterRule {
    /// `*`, address, prefix, range `a-b`, or `cap:<attribute>` of the source peer.
    #[serde(rename = "SrcIPs", deserialize_with = "null_is_default")]
    pub src_ips: Vec<String>,
    /// Long dead: its presence refuses the filter.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub src_bits: Vec<i64>,
    /// Empty for rules that only grant application capabilities.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub dst_ports: Vec<PortDestination>,
    /// Protocol numbers; empty is TCP, UDP, ICMP and ICMPv6.
    #[serde(
        rename = "IPProto",
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub ip_proto: Vec<i64>,
}

impl FilterRule {
    /// What it counts for where rules are bounded: itself and all its parts.
    #[must_use]
    pub fn weight(&self) -> usize {
        1 + self.src_ips.len() + self.dst_ports.len() + self.ip_proto.len()
    }

    /// The rule that lets everybody do everything, as Headscale sends it without policy.
    pub fn allow_all() -> Self {
        Self {
            src_ips: vec!["*".to_owned()],
            dst_ports: vec![PortDestination {
                ip: "*".to_owned(),
                bits: None,
                ports: PortRange {
                    first: 0,
                    last: u16::MAX,
                },
            }],
            ..Self::default()
        }
    }
}

/// Who owns a node, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UserProfile {
    /// The `User` of nodes.
    #[serde(rename = "ID")]
    pub id: i64,
    /// Name at log-in.
    #[serde(deserialize_with = "null_is_default")]
    pub login_name: String,
    /// Name for display.
    #[serde(deserialize_with = "null_is_default")]
    pub display_name: String,
}

/// A request of the server to show a sign of life (`protocol/coordination-map.md` §8).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PingRequest {
    /// Where to answer.
    #[serde(rename = "URL")]
    pub url: String,
    /// Answer inside the Noise connection.
    #[serde(rename = "URLIsNoise")]
    pub url_is_noise: bool,
    /// Empty: HEAD to `url`; `c2n`: run the HTTP request in `payload`; else a list of ping kinds.
    #[serde(deserialize_with = "null_is_default")]
    pub types: String,
    /// Base64 of an HTTP/1 request, for `c2n`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
}

/// Switches for debugging.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Debug {
    /// No log upload; nothing to do for us.
    #[serde(skip_serializing_if = "is_default")]
    pub disable_log_tail: bool,
}

/// One message of the map stream. Absent means unchanged, unless noted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct MapResponse {
    /// Nothing but a sign of life.
    #[serde(skip_serializing_if = "is_default")]
    pub keep_alive: bool,
    /// May be in any message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ping_request: Option<PingRequest>,
    /// Ourselves; must be in the first message that is no keep-alive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<Node>>,
    /// Not empty: the complete peer list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers: Option<Vec<Arc<Node>>>,
    /// Added or replaced peers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers_changed: Option<Vec<Arc<Node>>>,
    /// Peers gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers_removed: Option<Vec<i64>>,
    /// Field-wise changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers_changed_patch: Option<Vec<PeerChange>>,
    /// Sets `Online` of known peers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online_change: Option<BTreeMap<i64, bool>>,
    /// True: last seen now; false: unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_seen_change: Option<BTreeMap<i64, bool>>,
    /// Relays.
    #[serde(rename = "DERPMap", skip_serializing_if = "Option::is_none")]
    pub derp_map: Option<DerpMapUpdate>,
    /// Chunk `base` of the packet filter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packet_filter: Option<Vec<FilterRule>>,
    /// Named chunks; `null` deletes one, `"*": null` all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packet_filters: Option<BTreeMap<String, Option<Vec<FilterRule>>>>,
    /// Replaces the earlier one whole.
    #[serde(rename = "DNSConfig", skip_serializing_if = "Option::is_none")]
    pub dns_config: Option<DnsConfig>,
    /// Name of the network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Added or replaced by id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_profiles: Option<Vec<UserProfile>>,
    /// The server's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control_time: Option<WireTime>,
    /// No use for it here; real clients like to be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collect_services: Option<bool>,
    /// Problems to show; an empty list clears them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Vec<String>>,
    /// Switches for debugging.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debug: Option<Debug>,
    /// Tailnet lock, which is not supported: people are told.
    #[serde(rename = "TKAInfo", skip_serializing_if = "Option::is_none")]
    pub tka_info: Option<Value>,
}

/// Request for the map, or a report of our own state (a lite update).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct MapRequest {
    /// Capability version.
    pub version: i64,
    /// `zstd` or empty.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "is_default"
    )]
    pub compress: String,
    /// Whether keep-alive messages are wanted.
    pub keep_alive: bool,
    /// Must belong to the connection's machine key.
    pub node_key: NodePublic,
    /// Always filled: an empty one wipes the stored one on Headscale.
    pub disco_key: DiscoPublic,
    /// A never-ending answer is wanted.
    #[serde(skip_serializing_if = "is_default")]
    pub stream: bool,
    /// No peers wanted: with `stream` off, a lite update.
    #[serde(skip_serializing_if = "is_default")]
    pub omit_peers: bool,
    /// Complete, every time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostinfo: Option<Value>,
    /// Our UDP endpoints, complete, every time; absent keeps the old ones.
    #[serde(
        deserialize_with = "lenient_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub endpoints: Option<Vec<SocketAddr>>,
    /// Parallel to `endpoints`: see [`EndpointKind`].
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub endpoint_types: Vec<i64>,
}

/// How an endpoint of ours became known. The discriminants are the wire's `EndpointTypes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EndpointKind {
    /// Address of a local interface.
    Local = 1,
    /// Seen by a STUN server, or by a peer.
    Stun = 2,
    /// Given by a port mapping protocol.
    PortMapped = 3,
    /// STUN address with our local port: a guess for hard NATs.
    StunLocalPort = 4,
    /// Set by configuration.
    Configured = 5,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn year_one_is_no_time_and_fractions_of_any_length_parse() {
        for (text, none) in [
            ("\"0001-01-01T00:00:00Z\"", true),
            ("\"2026-08-20T12:00:00Z\"", false),
            ("\"2026-08-20T12:00:00.123456789+02:00\"", false),
        ] {
            let time: WireTime = serde_json::from_str(text).unwrap();
            assert_eq!(time.get().is_none(), none, "{text}");
        }
    }

    #[test]
    fn bad_list_elements_are_skipped_and_null_is_empty() {
        let node: Node = serde_json::from_str(
            r#"{"ID":4503599627370497,"Addresses":["100.64.0.1/32","x"],"AllowedIPs":null,
                "Endpoints":["192.0.2.1:1","[fe80::1%eth0]:1"],"Tags":null,"CapMap":{"a":null},
                "Future":{"x":1}}"#,
        )
        .unwrap();
        assert_eq!(node.id, 4_503_599_627_370_497);
        assert_eq!(node.addresses.len(), 1);
        assert_eq!(node.endpoints.len(), 1);
        assert_eq!(node.allowed_ips, None);
    }

    #[test]
    fn every_recorded_request_of_tailscaled_parses() {
        let text = include_str!("../../../tests/vectors/coordination/tailscaled-requests.json");
        let recorded: Value = serde_json::from_str(text).unwrap();
        let (mut registers, mut maps) = (0, 0);
        for list in ["join", "reconnect"] {
            for request in recorded[list].as_array().unwrap() {
                let Some(headers) = request.get("http2_headers") else {
                    continue;
                };
                let body = request["body"].clone();
                if headers.to_string().contains("/machine/register") {
                    let parsed: RegisterRequest = serde_json::from_value(body).unwrap();
                    assert_eq!(parsed.version, 142);
                    assert_eq!(*parsed.auth.unwrap().auth_key, "testkey");
                    assert!(parsed.expiry.unwrap().get().is_none());
                    registers += 1;
                } else {
                    let parsed: MapRequest = serde_json::from_value(body).unwrap();
                    assert_eq!(parsed.version, 142);
                    assert!(!parsed.disco_key.is_zero());
                    maps += 1;
                }
            }
        }
        assert_eq!((registers, maps), (1, 5));
    }
}
