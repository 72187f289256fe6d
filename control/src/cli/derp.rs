//! `ringtail derp`.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;

use crate::driver::derp_server::{DerpOptions, DerpServer, identity};
use crate::driver::signals::Blocked;
use crate::driver::state::StateDir;
use crate::driver::tls::verify::pin_of;
use crate::netmap::{DerpMap, DerpNode, DerpRegion};

/// How long the relay's tasks get to end after a signal.
const SHUTDOWN_LIMIT: Duration = Duration::from_millis(500);

/// Run a relay: DERP over TLS, with STUN beside it.
///
/// Makes its key and, unless files are given, a self-signed certificate in the state directory at
/// the first start. Prints its entry for the DERP map, with the pin by which nodes recognise it,
/// and keeps the same in derp-node.json of the state directory.
#[derive(Debug, Args)]
pub(super) struct DerpArgs {
    /// Name or address under which nodes reach this relay; it stands in the certificate.
    #[arg(long, value_name = "NAME")]
    hostname: String,
    /// Where keys and certificate live.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/ringtail-derp")]
    state_dir: PathBuf,
    /// Where to listen; may be given several times. Unless it is every address, what is given
    /// here also stands in the printed entry.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "[::]:443")]
    addr: Vec<SocketAddr>,
    /// UDP port of STUN.
    #[arg(long, value_name = "PORT", default_value_t = 3478)]
    stun_port: u16,
    /// No STUN.
    #[arg(long)]
    no_stun: bool,
    /// Answer any STUN Binding request, for debugging with ordinary tools.
    #[arg(long)]
    stun_any: bool,
    /// TCP port of the captive portal check without TLS, usually 80 [default: none].
    #[arg(long, value_name = "PORT")]
    http_port: Option<u16>,
    /// Certificate chain, PEM, leaf first [default: self-signed].
    #[arg(long, value_name = "FILE", requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// Key of the certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// Region id in the printed entry; 900 to 999 are for private relays.
    #[arg(long, value_name = "ID", default_value_t = 900)]
    region_id: u32,
    /// Short region label in the printed entry.
    #[arg(long, value_name = "CODE", default_value = "own")]
    region_code: String,
    /// Connections at most.
    #[arg(long, value_name = "COUNT", default_value_t = 20_000)]
    connections_max: usize,
    /// Threads [default: one per usable core].
    #[arg(long, value_name = "COUNT")]
    threads: Option<usize>,
}

/// Runs the relay until SIGTERM or SIGINT.
pub(super) fn run(args: DerpArgs) -> anyhow::Result<()> {
    let signals = Blocked::new()?;
    let state = StateDir::open(&args.state_dir)?;
    let private = identity::relay_key(&state.file("derp-key.json"))?;
    let (chain, key, pin) = match (&args.cert_file, &args.key_file) {
        (Some(chain), Some(key)) => {
            let (chain, key) = identity::read_chain(chain, key)?;
            (chain, key, None)
        }
        _ => {
            let (chain, key) = identity::self_signed(&args.state_dir, &args.hostname)?;
            let pin = chain.first().map(|leaf| pin_of(leaf));
            (chain, key, pin)
        }
    };
    let map = map_entry(&args, pin);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = args.threads {
        if threads == 0 {
            bail!("--threads must be at least 1");
        }
        runtime.worker_threads(threads);
    }
    let runtime = runtime
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let options = DerpOptions {
        private,
        chain,
        key,
        listen: args.addr.clone(),
        stun_port: (!args.no_stun).then_some(args.stun_port),
        stun_any: args.stun_any,
        http_port: args.http_port,
        connections_max: args.connections_max,
    };
    let result = runtime.block_on(async {
        let server = DerpServer::bind(options)?;
        let text = serde_json::to_string_pretty(&map)?;
        crate::driver::files::write(&state.file("derp-node.json"), text.as_bytes())?;
        writeln!(std::io::stdout(), "{text}")?;
        tracing::info!(addrs = ?server.addrs()?, stun = ?server.stun_addrs()?, "relay is up");
        let signals = signals.listen()?;
        let told = async {
            if let Err(error) = signals.end().await {
                tracing::error!(%error, "signals cannot be heard");
            }
        };
        server.run(told).await
    });
    runtime.shutdown_timeout(SHUTDOWN_LIMIT);
    result
}

/// A DERP map with this relay alone.
fn map_entry(args: &DerpArgs, pin: Option<String>) -> DerpMap {
    let host = args.hostname.parse::<IpAddr>().ok();
    let given = args.addr.iter().map(SocketAddr::ip);
    let known: Vec<IpAddr> = host
        .into_iter()
        .chain(given.filter(|ip| !ip.is_unspecified()))
        .collect();
    let family = |v4: bool| match known.iter().find(|ip| ip.is_ipv4() == v4) {
        Some(ip) => ip.to_string(),
        // Nothing can be resolved where the name is an address.
        None if host.is_some() => "none".to_owned(),
        None => String::new(),
    };
    let port = args.addr.first().map_or(443, SocketAddr::port);
    let node = DerpNode {
        name: format!("{}a", args.region_id),
        region_id: args.region_id,
        host_name: args.hostname.clone(),
        cert_name: pin.unwrap_or_default(),
        ipv4: family(true),
        ipv6: family(false),
        stun_port: match (args.no_stun, args.stun_port) {
            (true, _) => -1,
            (false, 3478) => 0,
            (false, stun_port) => i32::from(stun_port),
        },
        derp_port: if port == 443 { 0 } else { port },
        can_port80: args.http_port == Some(80),
        ..DerpNode::default()
    };
    let region = DerpRegion {
        region_id: args.region_id,
        region_code: args.region_code.clone(),
        region_name: args.region_code.clone(),
        nodes: vec![node],
        ..DerpRegion::default()
    };
    DerpMap {
        regions: BTreeMap::from([(args.region_id, region)]),
        ..DerpMap::default()
    }
}
