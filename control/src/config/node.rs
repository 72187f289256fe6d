//! The node's own settings.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use zeroize::Zeroizing;

use super::{ConfigError, PlainPeer, PrefsChange, plain, read_toml};
use crate::hostnet::TABLE_MAX;
use crate::policy::is_tag;

/// The kernel's table of the host's own addresses.
const LOCAL: u32 = 255;

/// Which driver moves packets in the shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DriverName {
    /// io_uring where the kernel allows it, else epoll.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// epoll.
    Epoll,
}

impl From<DriverName> for ringtail_dataplane::DriverChoice {
    fn from(name: DriverName) -> Self {
        match name {
            DriverName::Auto => Self::Auto,
            DriverName::IoUring => Self::IoUring,
            DriverName::Epoll => Self::Epoll,
        }
    }
}

/// What seals and opens in the shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum EngineName {
    /// Our own transport engine.
    #[default]
    Ringtail,
    /// boringtun's, for comparison: in programs built with the feature of that name.
    Boringtun,
}

impl From<EngineName> for ringtail_dataplane::Engine {
    fn from(name: EngineName) -> Self {
        match name {
            EngineName::Ringtail => Self::Ringtail,
            EngineName::Boringtun => Self::Boringtun,
        }
    }
}

/// How a direct path is tested before traffic moves to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ValidateMode {
    /// Latency, packet loss and MTU (`protocol/paths.md` §15).
    #[default]
    Full,
    /// One Pong is enough, as in Tailscale.
    Fast,
}

/// A pre-auth key. It is wiped, and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthKey(pub Zeroizing<String>);

impl AuthKey {
    /// The environment variable that may hold one. Programs that a node starts do not get it.
    pub const VARIABLE: &str = "RINGTAIL_AUTH_KEY";
}

impl std::fmt::Debug for AuthKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthKey(..)")
    }
}

impl From<&str> for AuthKey {
    fn from(text: &str) -> Self {
        Self(Zeroizing::new(text.trim().to_owned()))
    }
}

/// Tags that this node asks for; written as one text they are separated by commas. `tag:` may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Tags(pub Vec<String>);

impl TryFrom<Vec<String>> for Tags {
    type Error = String;

    fn try_from(texts: Vec<String>) -> Result<Self, String> {
        let tag = |text: &str| {
            let tag = format!("tag:{}", text.trim_start_matches("tag:"));
            is_tag(&tag)
                .then_some(tag)
                .ok_or_else(|| format!("{text:?} is no tag, such as tag:router"))
        };
        let texts = texts.iter().map(|text| text.trim());
        let texts = texts.filter(|text| !text.is_empty());
        texts.map(tag).collect::<Result<_, _>>().map(Self)
    }
}

impl FromStr for Tags {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let texts: Vec<String> = text.split(',').map(ToOwned::to_owned).collect();
        texts.try_into()
    }
}

/// Settings of `ringtail up`, as options and as keys of its file. Every one may be left out.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// URL of the coordination server, such as https://coord.example or http://10.0.0.1:8080.
    #[arg(long, value_name = "URL", visible_alias = "login-server")]
    pub coord: Option<String>,
    /// File with a pre-auth key, needed the first time where no person is to let the node in; the environment
    /// variable RINGTAIL_AUTH_KEY may hold the key too.
    #[arg(long, value_name = "FILE")]
    pub auth_key_file: Option<PathBuf>,
    /// The pre-auth key itself, which every user of this host can read here; or `file:` and its file.
    #[arg(long, value_name = "KEY", conflicts_with = "auth_key_file")]
    // Of the command line only: a settings file may be open to many.
    #[serde(skip)]
    pub auth_key: Option<AuthKey>,
    /// Tags to ask for when this node is let in, separated by commas: its owner has to be one who may give them.
    #[arg(long, value_name = "TAGS")]
    pub advertise_tags: Option<Tags>,
    /// Let this group of the host look at the node, by /run/ringtail/TUN.sock.
    #[arg(long, value_name = "GROUP")]
    pub status_group: Option<String>,
    /// Accept only this key (mkey:…) from the coordination server.
    #[arg(long, value_name = "KEY")]
    pub control_key: Option<String>,
    /// Certificates (PEM) that may vouch for relays and the coordination server, besides the web's roots
    /// and the host's (SSL_CERT_FILE and SSL_CERT_DIR count in its place).
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Static network file, instead of a coordination server.
    #[arg(long, value_name = "FILE")]
    pub network: Option<PathBuf>,
    /// Where keys, caches and the status socket live [default: /var/lib/ringtail].
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Name of the TUN interface [default: ringtail0].
    #[arg(long, value_name = "NAME")]
    pub tun: Option<String>,
    /// UDP port of the tunnel; 0 takes any free one [default: 41641].
    #[arg(long, value_name = "PORT")]
    pub listen_port: Option<u16>,
    /// Inner MTU in bytes [default: 1280].
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,
    /// Data plane threads [default: one per usable core].
    #[arg(long, value_name = "COUNT")]
    pub shards: Option<usize>,
    /// Keep each shard on one core: true or false [default: true with more than two cores].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub pin: Option<bool>,
    /// Let the scheduler place shards; the same as --pin false.
    #[arg(long, conflicts_with = "pin")]
    // Of the command line only: [`Self::overridden_by`] makes it `pin`.
    #[serde(skip)]
    pub no_pin: bool,
    /// I/O driver of the shards [default: auto].
    #[arg(long, value_enum)]
    pub driver: Option<DriverName>,
    /// Transport engine: our own, or boringtun's for comparison where that was built in [default: ringtail].
    #[arg(long, value_enum)]
    pub engine: Option<EngineName>,
    /// Super-packets from the TUN, and merging for writes to it: true or false [default: true].
    #[arg(long, value_name = "BOOL")]
    pub tun_offload: Option<bool>,
    /// UDP GSO on sends: true or false [default: true].
    #[arg(long, value_name = "BOOL")]
    pub udp_gso: Option<bool>,
    /// UDP GRO on receives: true or false [default: true].
    #[arg(long, value_name = "BOOL")]
    pub udp_gro: Option<bool>,
    /// Mark on every underlay socket; 0 is none [default: 0x80000, 524288].
    #[arg(long, value_name = "MARK", value_parser = mark)]
    pub fwmark: Option<u32>,
    /// Routing table of our own, 1 to 252, with rules from 100 times that number on, those of 53 to 59 among
    /// those of 52 [default: 52, or the next that no other program uses].
    #[arg(long, value_name = "NUMBER")]
    pub table: Option<u8>,
    /// Offer the routes of this kernel table to others too, as they come and go: those that a routing daemon puts
    /// there. Not its default route, and 256 at most.
    #[arg(long, value_name = "NUMBER")]
    pub advertise_routes_from: Option<u32>,
    /// Stay on relays: no direct paths.
    #[arg(long)]
    pub relay_only: bool,
    /// How direct paths are tested [default: full].
    #[arg(long, value_enum)]
    pub validate: Option<ValidateMode>,
    /// Unanswered discovery rounds before a peer that never was direct stays on the relay; 0 is no limit [default: 8].
    #[arg(long, value_name = "ROUNDS")]
    pub retry_limit: Option<u32>,
    /// Append what happens on the paths to this file, as JSON lines.
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
    /// What may be changed while the node runs.
    #[command(flatten)]
    #[serde(flatten)]
    pub prefs: PrefsChange,
    /// Plain WireGuard peers beside the network; of the file only.
    #[arg(skip)]
    #[serde(rename = "peer")]
    pub peers: Vec<PlainPeer>,
}

/// A mark in decimal, or in hexadecimal behind `0x` as other tools print it.
fn mark(text: &str) -> Result<u32, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

impl NodeConfig {
    /// Smallest inner MTU: IPv6 needs it (RFC 8200 §5).
    pub const MTU_MIN: u16 = 1280;
    /// Largest inner MTU that the data plane has.
    pub const MTU_MAX: u16 = ringtail_dataplane::MTU_MAX;
    /// Port of tailscaled's packages, which firewalls may already know.
    pub const LISTEN_PORT: u16 = 41_641;
    /// Shards at most: the owner's number has eight bits of the receiver index.
    pub const SHARDS_MAX: usize = 256;

    /// Reads the file; relative paths inside are taken from the file's own folder.
    ///
    /// # Errors
    /// When the file cannot be read, has an unknown key, or a value of the wrong type.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        // Once by themselves, for the line of what is wrong: the whole has none of these.
        read_toml::<PrefsChange>(path)?;
        let mut config: Self = read_toml(path)?;
        let folder = path.parent().unwrap_or_else(|| Path::new("")).to_owned();
        for file in [
            &mut config.state_dir,
            &mut config.auth_key_file,
            &mut config.ca_file,
            &mut config.network,
            &mut config.events,
        ]
        .into_iter()
        .flatten()
        {
            *file = folder.join(&file);
        }
        let keys = config
            .peers
            .iter_mut()
            .flat_map(|peer| &mut peer.preshared_key_file);
        for file in keys {
            *file = folder.join(&file);
        }
        Ok(config)
    }

    /// Whether it says nothing, but where the state is.
    pub fn is_bare(&self) -> bool {
        let nothing = Self {
            state_dir: self.state_dir.clone(),
            ..Self::default()
        };
        *self == nothing
    }

    /// Takes what `flags` says and fills the rest from `self`.
    #[must_use]
    pub fn overridden_by(self, flags: Self) -> Self {
        // An empty one is a variable of a script that is not set.
        let auth_key = flags.auth_key.filter(|AuthKey(key)| !key.is_empty());
        Self {
            state_dir: flags.state_dir.or(self.state_dir),
            tun: flags.tun.or(self.tun),
            listen_port: flags.listen_port.or(self.listen_port),
            mtu: flags.mtu.or(self.mtu),
            shards: flags.shards.or(self.shards),
            pin: flags.no_pin.then_some(false).or(flags.pin).or(self.pin),
            no_pin: false,
            driver: flags.driver.or(self.driver),
            engine: flags.engine.or(self.engine),
            tun_offload: flags.tun_offload.or(self.tun_offload),
            udp_gso: flags.udp_gso.or(self.udp_gso),
            udp_gro: flags.udp_gro.or(self.udp_gro),
            fwmark: flags.fwmark.or(self.fwmark),
            table: flags.table.or(self.table),
            advertise_routes_from: flags.advertise_routes_from.or(self.advertise_routes_from),
            // Naming one source of the network on the command line drops the file's other one.
            coord: flags
                .coord
                .clone()
                .or_else(|| self.coord.filter(|_| flags.network.is_none())),
            // A key on the command line is meant, whatever file the settings name.
            auth_key_file: flags
                .auth_key_file
                .or_else(|| self.auth_key_file.filter(|_| auth_key.is_none())),
            auth_key,
            advertise_tags: flags.advertise_tags.or(self.advertise_tags),
            status_group: flags.status_group.or(self.status_group),
            control_key: flags.control_key.or(self.control_key),
            ca_file: flags.ca_file.or(self.ca_file),
            network: flags
                .network
                .or_else(|| self.network.filter(|_| flags.coord.is_none())),
            relay_only: flags.relay_only || self.relay_only,
            validate: flags.validate.or(self.validate),
            retry_limit: flags.retry_limit.or(self.retry_limit),
            events: flags.events.or(self.events),
            prefs: flags.prefs.over(self.prefs),
            peers: self.peers,
        }
    }

    /// Checks values against each other and against their ranges.
    ///
    /// # Errors
    /// A sentence that says what to change.
    pub fn check(&self) -> Result<(), String> {
        if self.coord.is_some() && self.network.is_some() {
            return Err(
                "both a coordination server and a static network file are given; \
                        leave one out"
                    .into(),
            );
        }
        if self.coord.is_none() && self.network.is_none() {
            return Err("nothing says who is in the network: give --coord URL (and \
                        --auth-key-file FILE the first time) or --network FILE"
                .into());
        }
        if let Some(mtu) = self.mtu
            && !(Self::MTU_MIN..=Self::MTU_MAX).contains(&mtu)
        {
            return Err(format!(
                "mtu {mtu} is out of range; it can be {} to {}",
                Self::MTU_MIN,
                Self::MTU_MAX
            ));
        }
        if let Some(shards) = self.shards
            && !(1..=Self::SHARDS_MAX).contains(&shards)
        {
            return Err(format!(
                "shards = {shards} is out of range; it can be 1 to {}",
                Self::SHARDS_MAX
            ));
        }
        if let Some(0 | LOCAL) = self.advertise_routes_from {
            return Err("advertise_routes_from names no table of routes to other networks".into());
        }
        if let Some(table) = self.table
            && !(1..=TABLE_MAX).contains(&table)
        {
            return Err(format!(
                "table = {table} is the host's own; it can be 1 to {TABLE_MAX}"
            ));
        }
        // IFNAMSIZ counts the closing NUL.
        if let Some(tun) = &self.tun
            && (tun.is_empty() || tun.len() > 15 || tun.contains(['/', ' ']))
        {
            return Err(format!(
                "tun = {tun:?} cannot name an interface; use 1 to 15 characters without '/'"
            ));
        }
        plain::check(&self.peers)?;
        self.prefs.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NodeConfig, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn a_misspelt_key_is_refused_by_name() {
        let error = parse("listen-port = 1").unwrap_err().to_string();
        assert!(error.contains("listen-port"), "{error}");
    }

    #[test]
    fn a_route_with_host_bits_is_refused_with_the_right_prefix() {
        let text = "network = \"n\"\nadvertise_routes = [\"10.20.0.0/16\", \"10.30.0.1/16\"]";
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains("write 10.30.0.0/16"), "{error}");
    }

    #[test]
    fn a_flag_wins_over_the_file_and_replaces_the_source_of_the_network() {
        let file = parse("mtu = 1420\ncoord = \"http://10.0.0.1\"\nshards = 2").unwrap();
        let flags = NodeConfig {
            mtu: Some(1280),
            network: Some("n.toml".into()),
            ..Default::default()
        };
        let both = file.overridden_by(flags);
        assert_eq!((both.mtu, both.shards), (Some(1280), Some(2)));
        assert_eq!(
            (both.coord.as_deref(), both.network),
            (None, Some("n.toml".into()))
        );
    }

    #[test]
    fn tags_are_asked_for_by_their_whole_names() {
        let tags = |list: &[&str]| Tags(list.iter().map(ToString::to_string).collect());
        let want = tags(&["tag:router", "tag:web"]);
        assert_eq!("router, tag:web,".parse(), Ok(want.clone()));
        let file = parse("advertise_tags = [\"tag:router\", \"web\"]").unwrap();
        assert_eq!(file.advertise_tags, Some(want));
        assert_eq!("".parse(), Ok(tags(&[])));
        let error = "tag:9".parse::<Tags>().unwrap_err();
        assert!(error.contains("\"tag:9\" is no tag"), "{error}");
        assert!(parse("advertise_tags = [\"a b\"]").is_err());
    }

    #[test]
    fn an_auth_key_on_the_command_line_takes_the_place_of_the_file_but_an_empty_one_is_none() {
        for (given, file) in [
            ("tskey-1", None),
            ("", Some("k".into())),
            (" ", Some("k".into())),
        ] {
            let flags = NodeConfig {
                auth_key: Some(given.into()),
                ..Default::default()
            };
            let both = parse("auth_key_file = \"k\"").unwrap().overridden_by(flags);
            assert_eq!(both.auth_key.is_some(), file.is_none(), "{given:?}");
            assert_eq!(both.auth_key_file, file, "{given:?}");
        }
    }

    #[test]
    fn ranges_are_checked_with_a_sentence() {
        for text in [
            "",
            "mtu = 1000\nnetwork = \"n\"",
            "shards = 0\nnetwork = \"n\"",
            "table = 254\nnetwork = \"n\"",
            "tun = \"a/b\"\nnetwork = \"n\"",
            "coord = \"x\"\nnetwork = \"y\"",
        ] {
            assert!(parse(text).unwrap().check().is_err(), "{text}");
        }
        assert_eq!(parse("network = \"n\"").unwrap().check(), Ok(()));
    }
}
