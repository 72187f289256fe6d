//! `ringtail up`.

use std::path::PathBuf;

use clap::Args;

use crate::config::{DriverName, EngineName, NodeConfig, ValidateMode};
use crate::netmap::prefix::parse_route;

/// Run a node: join a network and move its traffic until stopped.
///
/// Who is in the network comes from a coordination server (--coord) or from a static network file
/// (--network). All settings can stand in a TOML file (--config) under the same names with
/// underscores; a flag wins over the file.
#[derive(Debug, Args)]
pub(super) struct UpArgs {
    /// Settings file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// URL of the coordination server, such as https://coord.example or http://10.0.0.1:8080.
    #[arg(long, value_name = "URL")]
    coord: Option<String>,
    /// File with a pre-auth key, needed the first time.
    #[arg(long, value_name = "FILE")]
    auth_key_file: Option<PathBuf>,
    /// Accept only this key (mkey:…) from the coordination server.
    #[arg(long, value_name = "KEY")]
    control_key: Option<String>,
    /// Certificates (PEM) that may vouch for relays and the coordination server, besides the web's roots
    /// and the host's (SSL_CERT_FILE and SSL_CERT_DIR count in its place).
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Static network file, instead of a coordination server.
    #[arg(long, value_name = "FILE")]
    network: Option<PathBuf>,
    /// Where keys, caches and the status socket live [default: /var/lib/ringtail].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Name shown to others [default: the host's].
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Name of the TUN interface [default: ringtail0].
    #[arg(long, value_name = "NAME")]
    tun: Option<String>,
    /// UDP port of the tunnel; 0 takes any free one [default: 41641].
    #[arg(long, value_name = "PORT")]
    listen_port: Option<u16>,
    /// Inner MTU in bytes [default: 1280].
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,
    /// Data plane threads [default: one per usable core].
    #[arg(long, value_name = "COUNT")]
    shards: Option<usize>,
    /// Keep each shard on one core: true or false [default: true with more than two cores].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pin: Option<bool>,
    /// Let the scheduler place shards; the same as --pin false.
    #[arg(long, conflicts_with = "pin")]
    no_pin: bool,
    /// I/O driver of the shards [default: auto].
    #[arg(long, value_enum)]
    driver: Option<DriverName>,
    /// Transport engine: our own, or boringtun's for comparison where that was built in [default: ringtail].
    #[arg(long, value_enum)]
    engine: Option<EngineName>,
    /// Super-packets from the TUN, and merging for writes to it: true or false [default: true].
    #[arg(long, value_name = "BOOL")]
    tun_offload: Option<bool>,
    /// UDP GSO on sends: true or false [default: true].
    #[arg(long, value_name = "BOOL")]
    udp_gso: Option<bool>,
    /// UDP GRO on receives: true or false [default: true].
    #[arg(long, value_name = "BOOL")]
    udp_gro: Option<bool>,
    /// Mark on every underlay socket; 0 is none [default: 0x80000, 524288].
    #[arg(long, value_name = "MARK", value_parser = mark)]
    fwmark: Option<u32>,
    /// Routing table of our own, 1 to 252, with rules from 100 times that number on, those of 53 to 59 among
    /// those of 52 [default: 52, or the next that no other program uses].
    #[arg(long, value_name = "NUMBER")]
    table: Option<u8>,
    /// Prefixes this node offers to route for others, separated by commas.
    #[arg(long, value_name = "PREFIXES", value_delimiter = ',', value_parser = parse_route)]
    advertise_routes: Vec<ipnet::IpNet>,
    /// Stay on relays: no direct paths.
    #[arg(long)]
    relay_only: bool,
    /// How direct paths are tested [default: full].
    #[arg(long, value_enum)]
    validate: Option<ValidateMode>,
    /// Unanswered discovery rounds before a peer that never was direct stays on the relay; 0 is no limit [default: 8].
    #[arg(long, value_name = "ROUNDS")]
    retry_limit: Option<u32>,
    /// Append what happens on the paths to this file, as JSON lines.
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
}

pub(super) fn run(args: UpArgs) -> anyhow::Result<()> {
    let file = match &args.config {
        Some(path) => NodeConfig::read(path)?,
        None => NodeConfig::default(),
    };
    let config = file.overridden_by(args.into_config());
    config.check().map_err(anyhow::Error::msg)?;
    crate::driver::node::run(config)
}

impl UpArgs {
    fn into_config(self) -> NodeConfig {
        NodeConfig {
            hostname: self.hostname,
            state_dir: self.state_dir,
            tun: self.tun,
            listen_port: self.listen_port,
            mtu: self.mtu,
            shards: self.shards,
            pin: if self.no_pin { Some(false) } else { self.pin },
            driver: self.driver,
            engine: self.engine,
            tun_offload: self.tun_offload,
            udp_gso: self.udp_gso,
            udp_gro: self.udp_gro,
            fwmark: self.fwmark,
            table: self.table,
            coord: self.coord,
            auth_key_file: self.auth_key_file,
            control_key: self.control_key,
            ca_file: self.ca_file,
            network: self.network,
            advertise_routes: self.advertise_routes,
            relay_only: self.relay_only,
            validate: self.validate,
            retry_limit: self.retry_limit,
            events: self.events,
        }
    }
}

/// A mark in decimal, or in hexadecimal behind `0x` as other tools print it.
fn mark(text: &str) -> Result<u32, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
}
