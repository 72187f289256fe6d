//! The DNS settings of a network.
//!
//! Whatever a server sends is read: what does not mean anything, is too long or too much is left out
//! and counted, and never costs the rest of the map.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::netmap::derp_map::is_default;

/// Extra records kept.
pub const DNS_RECORDS_MAX: usize = 4096;
/// Suffixes with resolvers of their own kept, and names that exit nodes do not look up for others.
pub const DNS_SUFFIXES_MAX: usize = 1024;
/// Resolvers kept of one suffix, and of those for all other names.
pub const DNS_RESOLVERS_MAX: usize = 16;
/// Search domains kept.
pub const DNS_SEARCH_MAX: usize = 32;
/// Longest name in bytes, without the dot at its end (RFC 1035 §2.3.4).
pub const DNS_NAME_LEN_MAX: usize = 253;
/// Longest address of a resolver in bytes; it may be a URL.
const RESOLVER_LEN_MAX: usize = 512;

/// `DNSConfig` (tailcfg/tailcfg.go). Names are in lower case and have no dot at their end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct DnsConfig {
    /// For all names that no route covers, instead of the host's own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resolvers: Vec<Resolver>,
    /// Suffix to resolvers; none of them: we answer, and what we do not know does not exist. The
    /// empty suffix is the root.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub routes: BTreeMap<String, Vec<Resolver>>,
    /// Stand in for `resolvers` beside an exit node that looks no names up, as the host's own may be out of reach.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fallback_resolvers: Vec<Resolver>,
    /// Search domains.
    #[serde(rename = "Domains", skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// The names of nodes are to be answered for (MagicDNS).
    #[serde(skip_serializing_if = "is_default")]
    pub proxied: bool,
    /// Names beside those of nodes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub extra_records: Vec<ExtraRecord>,
    /// What we do not look up for users of our exit: a name, or with a dot in front what ends so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exit_node_filtered_set: Vec<String>,
    /// Parts that were left out.
    #[serde(skip)]
    pub left_out: usize,
}

/// Where to ask.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Resolver {
    /// An address, with a port or without, or the URL of DNS over HTTP.
    pub addr: String,
    /// To be asked also while an exit node is in use.
    #[serde(skip_serializing_if = "is_default")]
    pub use_with_exit_node: bool,
}

/// An address of a name that is no node's. Its type is that of the address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ExtraRecord {
    /// The name.
    pub name: String,
    /// The address.
    pub value: IpAddr,
}

impl<'de> Deserialize<'de> for DnsConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut reader = Reader::default();
        let mut fields = match Value::deserialize(deserializer)? {
            Value::Object(fields) => fields,
            Value::Null => Map::new(),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                reader.left_out += 1;
                Map::new()
            }
        };
        Ok(reader.config(&mut fields))
    }
}

/// Counts what it leaves out.
#[derive(Default)]
struct Reader {
    left_out: usize,
}

impl Reader {
    fn config(mut self, fields: &mut Map<String, Value>) -> DnsConfig {
        let mut field = |name: &str| fields.remove(name).unwrap_or_default();
        DnsConfig {
            resolvers: self.list(field("Resolvers"), DNS_RESOLVERS_MAX, resolver),
            routes: self.routes(field("Routes")),
            fallback_resolvers: self.list(field("FallbackResolvers"), DNS_RESOLVERS_MAX, resolver),
            search: self.list(field("Domains"), DNS_SEARCH_MAX, name),
            proxied: self.flag(&field("Proxied")),
            extra_records: self.list(field("ExtraRecords"), DNS_RECORDS_MAX, record),
            exit_node_filtered_set: self.list(field("ExitNodeFilteredSet"), DNS_SUFFIXES_MAX, name),
            left_out: self.left_out,
        }
    }

    fn flag(&mut self, value: &Value) -> bool {
        self.left_out += usize::from(!value.is_null() && !value.is_boolean());
        value.as_bool().unwrap_or(false)
    }

    fn list<T>(&mut self, value: Value, max: usize, read: fn(&Value) -> Option<T>) -> Vec<T> {
        let values = match value {
            Value::Array(values) => values,
            Value::Null => Vec::new(),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
                self.left_out += 1;
                Vec::new()
            }
        };
        let kept: Vec<T> = values.iter().filter_map(read).take(max).collect();
        self.left_out += values.len() - kept.len();
        kept
    }

    fn routes(&mut self, value: Value) -> BTreeMap<String, Vec<Resolver>> {
        let mut routes = BTreeMap::new();
        let given = match value {
            Value::Object(given) => given,
            Value::Null => Map::new(),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                self.left_out += 1;
                Map::new()
            }
        };
        for (suffix, resolvers) in given {
            let root = suffix.is_empty() || suffix == ".";
            let suffix = if root {
                Some(String::new())
            } else {
                plain(&suffix)
            };
            match suffix.filter(|_| routes.len() < DNS_SUFFIXES_MAX) {
                Some(suffix) => {
                    let wanted = resolvers.as_array().is_some_and(|list| !list.is_empty());
                    let resolvers = self.list(resolvers, DNS_RESOLVERS_MAX, resolver);
                    // None that means anything is another thing than none: we cannot answer.
                    if !wanted || !resolvers.is_empty() {
                        routes.insert(suffix, resolvers);
                    }
                }
                None => self.left_out += 1,
            }
        }
        routes
    }
}

fn name(value: &Value) -> Option<String> {
    plain(value.as_str()?)
}

/// A name in lower case, without the dot at its end.
fn plain(text: &str) -> Option<String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    (!name.is_empty() && name.len() <= DNS_NAME_LEN_MAX).then(|| name.to_ascii_lowercase())
}

fn resolver(value: &Value) -> Option<Resolver> {
    let addr = value.get("Addr")?.as_str()?;
    let use_with_exit_node = value.get("UseWithExitNode").and_then(Value::as_bool);
    (!addr.is_empty() && addr.len() <= RESOLVER_LEN_MAX).then(|| Resolver {
        addr: addr.to_owned(),
        use_with_exit_node: use_with_exit_node.unwrap_or(false),
    })
}

fn record(value: &Value) -> Option<ExtraRecord> {
    let kind = value.get("Type").and_then(Value::as_str).unwrap_or("");
    matches!(kind, "" | "A" | "AAAA").then_some(())?;
    Some(ExtraRecord {
        name: name(value.get("Name")?)?,
        value: value.get("Value")?.as_str()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> DnsConfig {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_headscale_sends_is_read_and_written_again_the_same() {
        let sent = json!({
            "Resolvers": [{"Addr": "192.0.2.53"}, {"Addr": "https://dns.example/q", "UseWithExitNode": true}],
            "Routes": {"Corp.Example.": [{"Addr": "10.0.0.53:5353"}], "64.100.in-addr.arpa": null, ".": []},
            "Domains": ["lab.example"], "Proxied": true, "Nameservers": null, "CertDomains": ["x"],
            "ExtraRecords": [{"Name": "Web.lab.example.", "Type": "A", "Value": "100.64.0.9"},
                             {"Name": "v6.lab.example", "Value": "fd7a:115c:a1e0::9"}],
            "ExitNodeFilteredSet": [".secret.example"],
        });
        let config = read(sent);
        assert_eq!(config.left_out, 0);
        assert_eq!(config.resolvers.len(), 2);
        assert!(config.resolvers[1].use_with_exit_node);
        let routes: Vec<(&str, usize)> = config
            .routes
            .iter()
            .map(|(s, r)| (s.as_str(), r.len()))
            .collect();
        assert_eq!(
            routes,
            [("", 0), ("64.100.in-addr.arpa", 0), ("corp.example", 1)]
        );
        assert_eq!(config.extra_records[0].name, "web.lab.example");
        let again: DnsConfig =
            serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn what_means_nothing_is_left_out_and_counted_and_the_rest_stays() {
        let cases = [
            (json!(7), 1),
            (json!(null), 0),
            (json!({"Resolvers": "192.0.2.53", "Proxied": true}), 1),
            (
                json!({"Resolvers": [null, 7, {"Addr": 7}, {"Addr": ""}], "Proxied": true}),
                4,
            ),
            (json!({"Routes": [], "Proxied": true}), 1),
            (
                json!({"Routes": {"a.example": "x", "b.example": [7]}, "Proxied": true}),
                2,
            ),
            (json!({"Proxied": "yes"}), 1),
            (
                json!({"ExtraRecords": [{"Name": "a.example", "Type": "TXT", "Value": "x"},
                {"Name": "a.example", "Value": null}, {"Name": "a", "Value": "1.2.3"}], "Proxied": true}),
                3,
            ),
            (
                json!({"Domains": ["", ".", "a".repeat(254), "ok.example"], "Proxied": true}),
                3,
            ),
        ];
        for (sent, left_out) in cases {
            let config = read(sent.clone());
            assert_eq!(config.left_out, left_out, "{sent}");
            assert_eq!(config.proxied, sent["Proxied"] == true, "{sent}");
        }
    }

    #[test]
    fn everything_has_a_bound() {
        let resolvers = vec![json!({"Addr": "192.0.2.1"}); DNS_RESOLVERS_MAX + 1];
        let routes: Map<String, Value> = (0..=DNS_SUFFIXES_MAX)
            .map(|n| (format!("n{n}.example"), json!(resolvers)))
            .collect();
        let record = json!({"Name": "a.example", "Value": "192.0.2.1"});
        let config = read(json!({
            "Resolvers": resolvers,
            "Routes": routes,
            "Domains": vec!["a.example"; DNS_SEARCH_MAX + 1],
            "ExtraRecords": vec![record; DNS_RECORDS_MAX + 1],
            "ExitNodeFilteredSet": vec!["a.example"; DNS_SUFFIXES_MAX + 1],
        }));
        assert_eq!(config.resolvers.len(), DNS_RESOLVERS_MAX);
        assert_eq!(config.routes.len(), DNS_SUFFIXES_MAX);
        assert!(
            config
                .routes
                .values()
                .all(|list| list.len() == DNS_RESOLVERS_MAX)
        );
        assert_eq!(config.search.len(), DNS_SEARCH_MAX);
        assert_eq!(config.extra_records.len(), DNS_RECORDS_MAX);
        assert_eq!(config.exit_node_filtered_set.len(), DNS_SUFFIXES_MAX);
        assert_eq!(config.left_out, 5 + DNS_SUFFIXES_MAX);
    }
}
