//! `ringtail coord watch`: what a coordination server says, as JSON lines.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;
use tokio::sync::watch;

use super::FOR_EVER;
use super::keys::read_key_file;
use crate::coord::{CoordConfig, CoordEvent, NotAdmitted, SelfState};
use crate::driver::control_url::ControlUrl;
use crate::driver::coord_client::CoordClient;
use crate::driver::names::Names;
use crate::driver::state::StateDir;
use crate::driver::underlay::Underlay;
use crate::driver::{runtime, tls};
use crate::key::{DiscoPrivate, MachinePrivate, MachinePublic, NodePrivate};
use crate::netmap::Netmap;
use crate::netmap::prefix::parse_route;
use crate::netmap::wire::EndpointKind;

/// Join a network without moving packets, and print what its coordination server says.
///
/// One JSON object per line, until interrupted. Works with Headscale too. The node is made anew
/// at every call unless a seed is given.
#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// URL of the server.
    url: String,
    /// File with a pre-auth key.
    #[arg(long, value_name = "FILE")]
    auth_key_file: Option<PathBuf>,
    /// Accept only this key of the server.
    #[arg(long, value_name = "MKEY")]
    control_key: Option<MachinePublic>,
    /// Certificates (PEM) that may vouch for the server, besides the web's roots and the host's.
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// What the node calls itself.
    #[arg(long, value_name = "NAME", default_value = "watch")]
    hostname: String,
    /// Directory that keeps the node's keys for the next call.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// UDP endpoint to report; may be repeated.
    #[arg(long = "endpoint", value_name = "ADDR:PORT")]
    endpoints: Vec<SocketAddr>,
    /// Home relay region to report.
    #[arg(long, value_name = "REGION")]
    home: Option<u32>,
    /// Prefixes to offer to route, by comma.
    #[arg(long, value_name = "PREFIX", value_delimiter = ',', value_parser = parse_route)]
    advertise_routes: Vec<IpNet>,
    /// End after so many seconds.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
}

/// Joins with throw-away keys, or those of a directory, and prints events as JSON lines.
pub(super) fn watch_network(args: WatchArgs) -> anyhow::Result<()> {
    ControlUrl::parse(&args.url)?;
    let keys = match &args.state_dir {
        Some(dir) => {
            let keys = StateDir::open(dir)?.keys()?;
            (
                keys.machine.clone(),
                keys.node.public(),
                keys.disco.public(),
            )
        }
        None => (
            MachinePrivate::generate(),
            NodePrivate::generate().public(),
            DiscoPrivate::generate().public(),
        ),
    };
    let (machine, node, disco) = keys;
    let auth_key = args
        .auth_key_file
        .as_deref()
        .map(read_key_file)
        .transpose()?;
    let config = CoordConfig {
        url: args.url.clone(),
        auth_key,
        hostname: args.hostname.clone(),
        tags: Vec::new(),
        machine,
        node,
        old_node: None,
        followup: None,
        disco,
        control_key: args.control_key,
    };
    runtime::block_on(|_| async move {
        let state = SelfState {
            endpoints: args
                .endpoints
                .iter()
                .map(|endpoint| (*endpoint, EndpointKind::Configured))
                .collect(),
            home_derp: args.home,
            routes: args.advertise_routes.clone(),
            ..SelfState::default()
        };
        let (_state, own_state) = watch::channel(state);
        let (_client, mut events) = CoordClient::start(
            config,
            Names::default(),
            Underlay::default(),
            tls::roots::load(args.ca_file.as_deref())?,
            own_state,
        )?;
        let end = args.seconds.map_or(FOR_EVER, Duration::from_secs);
        let end = tokio::time::sleep(end);
        tokio::pin!(end);
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = &mut end => return Ok(()),
                _ = tokio::signal::ctrl_c() => return Ok(()),
            };
            let Some(event) = event else { return Ok(()) };
            writeln!(std::io::stdout().lock(), "{}", describe(&event))?;
            if let CoordEvent::Fatal(text) = event {
                return Err(NotAdmitted(text).into());
            }
        }
    })
}

fn describe(event: &CoordEvent) -> serde_json::Value {
    use serde_json::json;
    match event {
        CoordEvent::ControlKey(key) => json!({"event": "control_key", "key": key}),
        CoordEvent::Registered { user } => json!({"event": "registered", "user": user}),
        CoordEvent::Netmap(netmap) => describe_netmap(netmap),
        CoordEvent::AuthUrl(url) => json!({"event": "auth_url", "url": url}),
        CoordEvent::KeyExpired => json!({"event": "key_expired"}),
        CoordEvent::Lost { error, retry_in } => {
            json!({"event": "lost", "error": error, "retry_in_s": retry_in.as_secs_f64()})
        }
        CoordEvent::Fatal(text) => json!({"event": "fatal", "error": text}),
    }
}

fn describe_netmap(netmap: &Netmap) -> serde_json::Value {
    use serde_json::json;
    let peers = netmap.peers.iter().chain(&netmap.held_back);
    let peers: Vec<_> = peers
        .map(|peer| {
            json!({"id": peer.id, "name": peer.name, "key": peer.key, "disco": peer.disco,
                   "addresses": peer.addresses, "allowed_ips": peer.allowed_ips,
                   "endpoints": peer.endpoints, "home": peer.home, "online": peer.online,
                   "expired": peer.expired})
        })
        .collect();
    json!({"event": "netmap", "id": netmap.self_node.id, "name": netmap.self_node.name,
           "addresses": netmap.self_node.addresses, "key": netmap.self_node.key, "expired": netmap.self_node.expired,
           "regions": netmap.derp_map.regions.keys().collect::<Vec<_>>(),
           "rules": format!("{:?}", netmap.rules), "domain": netmap.domain, "peers": peers})
}
