//! What may be changed while a node runs: `ringtail up` takes it at the start, `ringtail set` later.

use std::collections::BTreeSet;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::netmap::prefix::parse_route;

/// As names of DNS (RFC 1035 §2.3.4).
const HOSTNAME_LEN_MAX: usize = 253;

/// Prefixes; written as one text they are separated by commas, and an empty text is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Routes(#[serde(deserialize_with = "super::routes")] pub BTreeSet<IpNet>);

impl FromStr for Routes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let texts = text.split(',').filter(|text| !text.trim().is_empty());
        texts.map(parse_route).collect::<Result<_, _>>().map(Self)
    }
}

/// Which of the routes that this node offers have their traffic leave with this host's address
/// (masquerade), so that the subnet behind needs no route back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Snat {
    /// All of them or none.
    Every(bool),
    /// These.
    Only(Routes),
}

impl Default for Snat {
    fn default() -> Self {
        Self::Every(true)
    }
}

impl FromStr for Snat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "true" => Ok(Self::Every(true)),
            "false" => Ok(Self::Every(false)),
            prefixes => prefixes.parse().map(Self::Only),
        }
    }
}

impl Snat {
    /// Whether it is for traffic to this prefix.
    pub fn covers(&self, prefix: &IpNet) -> bool {
        match self {
            Self::Every(every) => *every,
            Self::Only(Routes(prefixes)) => prefixes.contains(prefix),
        }
    }
}

/// What to do where the host's own firewall drops what is forwarded for the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HostFirewall {
    /// Put rules of ours that accept it before the host's, in INPUT too, and take them away at the end.
    #[default]
    Open,
    /// Change nothing, and say what drops it.
    Report,
}

/// What to do where the host does not forward between the tunnel and the subnets offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Forwarding {
    /// Switch it on for the interfaces concerned, and put it back at the end.
    #[default]
    On,
    /// Change nothing, and say what is missing.
    Report,
}

/// Settings of a node that may change while it runs: as options of `ringtail up` and `ringtail set`, as
/// keys of the settings file, and as JSON on the status socket. What is left out stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(default)]
pub struct PrefsChange {
    /// Name shown to others [default: the host's].
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Prefixes this node offers to route for others, separated by commas; an empty text is none.
    #[arg(long, value_name = "PREFIXES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise_routes: Option<Routes>,
    /// Offer to be a way out to the Internet for others: true or false [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise_exit_node: Option<bool>,
    /// Let traffic into offered routes bear this host's address: true, false or the prefixes [default: true].
    #[arg(long, value_name = "WHICH", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snat_subnet_routes: Option<Snat>,
    /// Use the routes that other nodes offer: true or false [default: false, and true with --network].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accept_routes: Option<bool>,
    /// Send what goes to the Internet through this node; an empty text is none.
    #[arg(long, value_name = "NAME|IP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_node: Option<String>,
    /// With an exit node, keep the local subnets outside of the tunnel: true or false [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_node_allow_lan_access: Option<bool>,
    /// Have the host ask the network's names and resolvers: true or false [default: true].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accept_dns: Option<bool>,
    /// Refuse whatever others begin: true or false [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shields_up: Option<bool>,
    /// Where the host's firewall drops what is forwarded, or on any node what comes from the tunnel and to its UDP
    /// port [default: open].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_firewall: Option<HostFirewall>,
    /// Where the host does not forward; IPv6 can be switched on for an interface from Linux 6.17 on [default: on].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forwarding: Option<Forwarding>,
}

impl PrefsChange {
    /// Takes what `self` says, and the rest from `below`.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        Self {
            hostname: self.hostname.or(below.hostname),
            advertise_routes: self.advertise_routes.or(below.advertise_routes),
            advertise_exit_node: self.advertise_exit_node.or(below.advertise_exit_node),
            snat_subnet_routes: self.snat_subnet_routes.or(below.snat_subnet_routes),
            accept_routes: self.accept_routes.or(below.accept_routes),
            exit_node: self.exit_node.or(below.exit_node),
            exit_node_allow_lan_access: self
                .exit_node_allow_lan_access
                .or(below.exit_node_allow_lan_access),
            accept_dns: self.accept_dns.or(below.accept_dns),
            shields_up: self.shields_up.or(below.shields_up),
            host_firewall: self.host_firewall.or(below.host_firewall),
            forwarding: self.forwarding.or(below.forwarding),
        }
    }

    /// Checks values against each other.
    ///
    /// # Errors
    /// A sentence that says what to change.
    pub fn check(&self) -> Result<(), String> {
        let strange = |letter: char| letter.is_whitespace() || letter.is_control();
        if let Some(name) = &self.hostname
            && (name.is_empty() || name.len() > HOSTNAME_LEN_MAX || name.contains(strange))
        {
            return Err(format!(
                "hostname = {name:?} is no name; use 1 to {HOSTNAME_LEN_MAX} characters without blanks"
            ));
        }
        let routes = self
            .advertise_routes
            .iter()
            .flat_map(|Routes(routes)| routes);
        if let Some(all) = routes.into_iter().find(|route| route.prefix_len() == 0) {
            return Err(format!(
                "advertise_routes has {all}: to be a way out to the Internet is advertise_exit_node"
            ));
        }
        let exit = self
            .exit_node
            .as_deref()
            .is_some_and(|name| !name.is_empty());
        if exit && self.advertise_exit_node == Some(true) {
            return Err("a node cannot be an exit node and use one: leave out \
                        exit_node or advertise_exit_node"
                .into());
        }
        Ok(())
    }

    /// What is in force, with what nobody chose.
    pub fn settled(&self, host_name: &str, from_network_file: bool) -> Prefs {
        let of = self.clone();
        Prefs {
            hostname: of.hostname.unwrap_or_else(|| host_name.to_owned()),
            advertise_routes: of.advertise_routes.unwrap_or_default().0,
            advertise_exit_node: of.advertise_exit_node.unwrap_or(false),
            snat_subnet_routes: of.snat_subnet_routes.unwrap_or_default(),
            accept_routes: of.accept_routes.unwrap_or(from_network_file),
            exit_node: of.exit_node.filter(|name| !name.is_empty()),
            exit_node_allow_lan_access: of.exit_node_allow_lan_access.unwrap_or(false),
            accept_dns: of.accept_dns.unwrap_or(true),
            shields_up: of.shields_up.unwrap_or(false),
            host_firewall: of.host_firewall.unwrap_or_default(),
            forwarding: of.forwarding.unwrap_or_default(),
        }
    }
}

/// The same with every value, as the agent and the host's drivers take it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Prefs {
    /// Name shown to others.
    pub hostname: String,
    /// Prefixes that this node routes for others.
    pub advertise_routes: BTreeSet<IpNet>,
    /// Whether it is a way out to the Internet for others.
    pub advertise_exit_node: bool,
    /// Whose traffic bears this host's address.
    pub snat_subnet_routes: Snat,
    /// Whether routes that others offer are used.
    pub accept_routes: bool,
    /// The way out: a node's name, its full name or an inner address.
    pub exit_node: Option<String>,
    /// Whether local subnets stay outside of the tunnel then.
    pub exit_node_allow_lan_access: bool,
    /// Whether the host asks the network's names and resolvers.
    pub accept_dns: bool,
    /// Whether everything is refused that others begin.
    pub shields_up: bool,
    /// Where the host's firewall drops what is forwarded.
    pub host_firewall: HostFirewall,
    /// Where the host does not forward.
    pub forwarding: Forwarding,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> PrefsChange {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn what_nobody_chose_has_its_default() {
        let prefs = PrefsChange::default().settled("host", false);
        assert_eq!(prefs.hostname, "host");
        assert!(!prefs.accept_routes && prefs.accept_dns);
        assert!(PrefsChange::default().settled("host", true).accept_routes);
        let net = "10.0.0.0/8".parse().unwrap();
        assert!(prefs.snat_subnet_routes.covers(&net));
    }

    #[test]
    fn a_change_covers_what_was_there_and_can_take_it_away() {
        let below =
            parse("advertise_routes = [\"10.0.0.0/8\"]\nexit_node = \"a\"\nshields_up = true");
        let change = PrefsChange {
            advertise_routes: Some("".parse().unwrap()),
            exit_node: Some(String::new()),
            ..PrefsChange::default()
        };
        let prefs = change.over(below).settled("host", false);
        assert!(prefs.advertise_routes.is_empty() && prefs.exit_node.is_none());
        assert!(prefs.shields_up);
    }

    #[test]
    fn snat_is_a_word_or_prefixes() {
        let of = |text: &str| parse(&format!("snat_subnet_routes = {text}")).snat_subnet_routes;
        assert_eq!(of("false"), Some(Snat::Every(false)));
        let one = of("[\"10.0.0.0/8\"]").unwrap();
        assert_eq!("10.0.0.0/8".parse(), Ok(one.clone()));
        assert!(one.covers(&"10.0.0.0/8".parse().unwrap()));
        assert!(!one.covers(&"10.1.0.0/16".parse().unwrap()));
        assert!("10.0.0.1/8".parse::<Snat>().is_err());
    }

    #[test]
    fn contradictions_are_refused_with_a_sentence() {
        for text in [
            "advertise_routes = [\"0.0.0.0/0\"]",
            "hostname = \"\"",
            "hostname = \"a b\"",
            "advertise_exit_node = true\nexit_node = \"a\"",
        ] {
            assert!(parse(text).check().is_err(), "{text}");
        }
        assert_eq!(
            parse("exit_node = \"\"\nadvertise_exit_node = true").check(),
            Ok(())
        );
    }
}
