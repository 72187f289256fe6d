//! The DERP map: regions of relays and how to reach their nodes.
//!
//! JSON as in `protocol/netcheck.md` §1 (tailcfg/derpmap.go in tailscale/tailscale): field names
//! are Go's, absent and `null` collections are the same, unknown fields are ignored.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Deserializer, Serialize};

/// Takes `null` for the default value, as Go writes empty collections.
pub(crate) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Whether a field need not be written.
pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// All relay regions a network uses, by region id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DerpMap {
    /// Region id to region. JSON keys are decimal strings.
    #[serde(deserialize_with = "null_is_default")]
    pub regions: BTreeMap<u32, DerpRegion>,
    /// Home selection hints.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub home_params: Option<HomeParams>,
    /// Only relevant where default maps are merged.
    #[serde(rename = "omitDefaultRegions", skip_serializing_if = "is_default")]
    pub omit_default_regions: bool,
}

impl DerpMap {
    /// Reads a map that a person wrote, as a JSON value; ids that are left out are filled in.
    ///
    /// # Errors
    /// A sentence that says what is wrong, also where the JSON is a map to a machine that ignores
    /// what it does not know: a region or a whole map in the place of another thing.
    pub fn from_file(value: serde_json::Value) -> Result<Self, String> {
        let Some(fields) = value.as_object() else {
            return Err("it is no JSON object".to_owned());
        };
        if !fields.is_empty() && !fields.contains_key("Regions") {
            let names: Vec<&str> = fields.keys().take(3).map(String::as_str).collect();
            return Err(format!(
                "it has no \"Regions\", but {}: a map is {{\"Regions\": {{\"900\": {{\"RegionID\": 900, \
                 \"Nodes\": [...]}}}}}}",
                names.join(", ")
            ));
        }
        let mut map: Self = serde_json::from_value(value).map_err(|error| error.to_string())?;
        let mut names = BTreeSet::new();
        for (id, region) in &mut map.regions {
            region.check(*id, &mut names)?;
        }
        Ok(map)
    }
}

impl DerpRegion {
    /// Checks a region that stands under `id` in a map with nodes of these `names` before it.
    fn check(&mut self, id: u32, names: &mut BTreeSet<String>) -> Result<(), String> {
        if id == 0 {
            return Err("region 0: ids begin with 1".to_owned());
        }
        if self.region_id == 0 {
            self.region_id = id;
        }
        if self.region_id != id {
            let said = self.region_id;
            return Err(format!("region {id} says that its RegionID is {said}"));
        }
        if self.nodes.is_empty() {
            return Err(format!("region {id} has no Nodes"));
        }
        for (index, node) in self.nodes.iter_mut().enumerate() {
            let place = format!("region {id}, node {} {:?}", index + 1, node.name);
            if node.host_name.is_empty() {
                return Err(format!(
                    "{place}: HostName is missing. Is a whole map, such as the one `ringtail derp` \
                     prints, in the place of a node?"
                ));
            }
            if node.name.is_empty() {
                return Err(format!("{place}: Name is missing"));
            }
            if node.region_id == 0 {
                node.region_id = id;
            }
            if node.region_id != id {
                let said = node.region_id;
                return Err(format!("{place}: it says that its RegionID is {said}"));
            }
            let off = |text: &str| text == "none";
            if node.v4() == Family::Off && !off(&node.ipv4) {
                return Err(format!("{place}: IPv4 is neither an address nor \"none\""));
            }
            if node.v6() == Family::Off && !off(&node.ipv6) {
                return Err(format!("{place}: IPv6 is neither an address nor \"none\""));
            }
            if node.stun_port > i32::from(u16::MAX) {
                return Err(format!("{place}: STUNPort is over 65535"));
            }
            if !names.insert(node.name.clone()) {
                return Err(format!("{place}: another node has the same Name"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl DerpMap {
    /// Regions 1, 2, ... of one relay each, at an IPv4 address of their own.
    pub(crate) fn of_regions(regions: u32) -> DerpMap {
        let region = |id| {
            let node = DerpNode {
                name: format!("{id}a"),
                region_id: id,
                host_name: format!("derp{id}.example.com"),
                ipv4: format!("203.0.113.{id}"),
                ipv6: "none".into(),
                ..DerpNode::default()
            };
            let region = DerpRegion {
                region_id: id,
                nodes: vec![node],
                ..DerpRegion::default()
            };
            (id, region)
        };
        DerpMap {
            regions: (1..=regions).map(region).collect(),
            ..DerpMap::default()
        }
    }
}

/// Factors on measured latencies when the home region is chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HomeParams {
    /// Region id to factor; values that are not positive are ignored, absent means 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region_score: Option<BTreeMap<u32, f64>>,
}

/// One region: relays that are near each other and meshed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DerpRegion {
    /// Positive; 900 to 999 are for private relays.
    #[serde(rename = "RegionID")]
    pub region_id: u32,
    /// Short label such as `nyc`.
    pub region_code: String,
    /// Long label.
    pub region_name: String,
    /// Not measured unless it is the home; still usable to reach a peer.
    #[serde(skip_serializing_if = "is_default")]
    pub avoid: bool,
    /// Never measured, never home, still usable to reach a peer.
    #[serde(skip_serializing_if = "is_default")]
    pub no_measure_no_home: bool,
    /// In order of preference.
    #[serde(deserialize_with = "null_is_default")]
    pub nodes: Vec<DerpNode>,
}

/// One relay server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DerpNode {
    /// Unique over all regions; not a host name.
    pub name: String,
    /// The region it belongs to.
    #[serde(rename = "RegionID")]
    pub region_id: u32,
    /// TLS name and DNS name.
    pub host_name: String,
    /// How the certificate is checked; see `protocol/derp.md` §2.
    #[serde(skip_serializing_if = "is_default")]
    pub cert_name: String,
    /// Empty: DNS; an address: use it; other text such as `none`: family off.
    #[serde(rename = "IPv4", skip_serializing_if = "is_default")]
    pub ipv4: String,
    /// As `ipv4`, for IPv6.
    #[serde(rename = "IPv6", skip_serializing_if = "is_default")]
    pub ipv6: String,
    /// 0 is 3478, negative is no STUN.
    #[serde(rename = "STUNPort", skip_serializing_if = "is_default")]
    pub stun_port: i32,
    /// Never used for a DERP connection.
    #[serde(rename = "STUNOnly", skip_serializing_if = "is_default")]
    pub stun_only: bool,
    /// 0 is 443.
    #[serde(rename = "DERPPort", skip_serializing_if = "is_default")]
    pub derp_port: u16,
    /// Tests only: no certificate check.
    #[serde(skip_serializing_if = "is_default")]
    pub insecure_for_tests: bool,
    /// Tests only: overrides the STUN address.
    #[serde(rename = "STUNTestIP", skip_serializing_if = "is_default")]
    pub stun_test_ip: String,
    /// Has `/generate_204` on port 80.
    #[serde(rename = "CanPort80", skip_serializing_if = "is_default")]
    pub can_port80: bool,
}

/// What an address field of a [`DerpNode`] says about its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family<A> {
    /// Resolve the host name.
    Resolve,
    /// Use this address.
    Literal(A),
    /// Do not use this family.
    Off,
}

impl<A> Family<A> {
    /// The address that the map gives, if it gives one.
    pub fn literal(self) -> Option<A> {
        match self {
            Self::Literal(address) => Some(address),
            Self::Resolve | Self::Off => None,
        }
    }
}

fn family<A: std::str::FromStr>(text: &str) -> Family<A> {
    if text.is_empty() {
        return Family::Resolve;
    }
    text.parse().map_or(Family::Off, Family::Literal)
}

impl DerpNode {
    /// What the map says about IPv4.
    pub fn v4(&self) -> Family<Ipv4Addr> {
        family(&self.ipv4)
    }

    /// What the map says about IPv6.
    pub fn v6(&self) -> Family<Ipv6Addr> {
        family(&self.ipv6)
    }

    /// The TCP port of the relay.
    pub fn derp_port(&self) -> u16 {
        if self.derp_port == 0 {
            443
        } else {
            self.derp_port
        }
    }

    /// The UDP port of STUN, or none.
    pub fn stun_port(&self) -> Option<u16> {
        match self.stun_port {
            0 => Some(3478),
            port => u16::try_from(port).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_page_parses_and_keeps_its_meaning() {
        let text = r#"{"Regions":{"900":{"RegionID":900,"RegionCode":"lab","RegionName":"Lab",
            "Nodes":[{"Name":"900a","RegionID":900,"HostName":"derp.example.com",
            "IPv4":"203.0.113.1","IPv6":"none","STUNPort":3478,"DERPPort":443,
            "CertName":"sha256-raw:00","CanPort80":true,"Future":[1]}]}},
            "HomeParams":null,"omitDefaultRegions":true}"#;
        let map: DerpMap = serde_json::from_str(text).unwrap();
        let node = &map.regions[&900].nodes[0];
        assert_eq!(node.v4(), Family::Literal(Ipv4Addr::new(203, 0, 113, 1)));
        assert_eq!(node.v6(), Family::Off);
        assert_eq!((node.derp_port(), node.stun_port()), (443, Some(3478)));
        let again: DerpMap = serde_json::from_str(&serde_json::to_string(&map).unwrap()).unwrap();
        assert_eq!(again, map);
    }

    #[test]
    fn a_map_that_a_person_wrote_is_refused_with_what_is_wrong() {
        let region = |fields: &str, nodes: &str| {
            format!(r#"{{"Regions":{{"900":{{{fields}"Nodes":[{nodes}]}}}}}}"#)
        };
        let node = r#"{"Name":"a","HostName":"h"}"#;
        let whole = region("", node);
        let with = |more: &str| region("", &format!(r#"{{"Name":"a","HostName":"h",{more}}}"#));
        for (text, said) in [
            ("7".to_owned(), "no JSON object"),
            (
                r#"{"RegionID":900,"Nodes":[]}"#.to_owned(),
                "no \"Regions\"",
            ),
            (r#"{"900":{"Nodes":[]}}"#.to_owned(), "no \"Regions\""),
            (region("", &whole), "whole map"),
            (region("", r#"{"Name":"a"}"#), "HostName is missing"),
            (region("", r#"{"HostName":"h"}"#), "Name is missing"),
            (region("", ""), "no Nodes"),
            (region(r#""RegionID":901,"#, node), "RegionID is 901"),
            (with(r#""RegionID":901"#), "RegionID is 901"),
            (with(r#""IPv4":"203.0.113.300""#), "IPv4 is neither"),
            (with(r#""IPv6":"off""#), "IPv6 is neither"),
            (with(r#""STUNPort":70000"#), "STUNPort"),
            (with(r#""DERPPort":70000"#), "70000"),
            (region("", &format!("{node},{node}")), "same Name"),
        ] {
            let value = serde_json::from_str(&text).unwrap();
            let error = DerpMap::from_file(value).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
        for text in ["{}", r#"{"Regions":{}}"#, r#"{"Regions":null}"#] {
            let map = DerpMap::from_file(serde_json::from_str(text).unwrap()).unwrap();
            assert!(map.regions.is_empty(), "{text}");
        }
        let map = DerpMap::from_file(serde_json::from_str(&whole).unwrap()).unwrap();
        let region = &map.regions[&900];
        assert_eq!((region.region_id, region.nodes[0].region_id), (900, 900));
    }

    #[test]
    fn null_collections_are_empty() {
        let map: DerpMap = serde_json::from_str(r#"{"Regions":{"1":{"Nodes":null}}}"#).unwrap();
        assert!(map.regions[&1].nodes.is_empty());
        assert_eq!(
            serde_json::from_str::<DerpMap>(r#"{"Regions":null}"#).unwrap(),
            DerpMap::default()
        );
    }
}
