//! `ringtail derp`.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;

use crate::driver::derp_server::{
    BURST_MIN, DerpHandle, DerpOptions, DerpServer, VerifyBy, VerifyOptions, identity,
};
use crate::driver::descriptors;
use crate::driver::signals::{Blocked, Signals, Told};
use crate::driver::state::StateDir;
use crate::driver::tls::verify::pin_of;
use crate::netmap::{DerpMap, DerpNode, DerpRegion};
use crate::rate::Rate;

/// How long the relay's tasks get to end after a signal.
const SHUTDOWN_LIMIT: Duration = Duration::from_millis(500);

/// A rate file at most, in bytes.
const RATE_CONFIG_LEN_MAX: u64 = 64 << 10;

/// Turns of tasks after which a thread asks the sockets for news, at the latest. A turn is up to a
/// quarter of a megabyte to forward, and whoever comes waits for so many of them.
const TURNS_MAX: u32 = 8;

/// Run a relay: DERP over TLS, with STUN beside it.
///
/// It serves whoever connects, unless --verify-clients says whom. Makes its key and, unless files are given, a self-signed certificate in the state directory at
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
    /// Serve only nodes that this knows: the /verify of a coordination server (`ringtail coord`,
    /// Headscale, whatever derper can ask), such as http://10.0.0.1:8080/verify, or a file with one
    /// node key a line, which is read again when it changes and on SIGHUP.
    #[arg(long, value_name = "URL|FILE", visible_alias = "verify-client-url", value_parser = verify_by)]
    verify_clients: Option<VerifyBy>,
    /// Serve everybody while the verifier cannot be reached (derper's way; ours is to serve nobody
    /// new).
    #[arg(long, requires = "verify_clients")]
    verify_fail_open: bool,
    /// Certificates (PEM) that may vouch for an https verifier, besides the web's roots and the host's.
    #[arg(long, value_name = "FILE", requires = "verify_clients")]
    ca_file: Option<PathBuf>,
    /// Ask the verifier again about those who are connected, so often; who is refused then goes.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    verify_every: u64,
    /// What a client may send, as a JSON file like derper's, read again on SIGHUP:
    /// {"PerClientRateLimitBytesPerSec": 1000000, "PerClientRateBurstBytes": 2000000}. Who sends
    /// more is read later, nothing is dropped [default: no limit].
    #[arg(long, value_name = "FILE")]
    rate_config: Option<PathBuf>,
    /// Connections accepted per second; more are closed at once [default: no limit].
    #[arg(long, value_name = "RATE", value_parser = connection_rate)]
    accept_connection_limit: Option<u64>,
    /// Connections accepted at once, after a pause [default: those of one second].
    #[arg(long, value_name = "COUNT", requires = "accept_connection_limit", value_parser = clap::value_parser!(u32).range(1..))]
    accept_connection_burst: Option<u32>,
    /// Clients at most; those who have not said who they are have 2048 places beside them, 256 for
    /// one address (IPv6: /64), and make room for the next. The limit of open files is raised as far
    /// as it may be, and bounds both.
    #[arg(long, value_name = "COUNT", default_value_t = 20_000)]
    connections_max: usize,
    /// Memory at most, in MiB, for what waits for clients and what they have half sent: of all
    /// together, and no more than half of it for one address (IPv6: /64). Who holds most loses first.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    memory_max: u32,
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
    let client_rate = args.rate_config.as_deref().map(read_rate).transpose()?;
    descriptors::raise_limit();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = args.threads {
        if threads == 0 {
            bail!("--threads must be at least 1");
        }
        runtime.worker_threads(threads);
    }
    let runtime = runtime
        .event_interval(TURNS_MAX)
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
        memory_max: usize::try_from(args.memory_max)? << 20,
        verify: args.verify_clients.clone().map(|by| VerifyOptions {
            by,
            fail_open: args.verify_fail_open,
            ca_file: args.ca_file.clone(),
            every: Duration::from_secs(args.verify_every),
        }),
        client_rate: client_rate.flatten(),
        accept_rate: args.accept_connection_limit.map(|limit| Rate {
            per_second: limit,
            burst: args
                .accept_connection_burst
                .map_or_else(|| limit.max(1000), |count| u64::from(count) * 1000),
        }),
    };
    let result = runtime.block_on(async {
        let server = DerpServer::bind(options)?;
        let text = serde_json::to_string_pretty(&map)?;
        crate::driver::files::write(&state.file("derp-node.json"), text.as_bytes())?;
        writeln!(std::io::stdout(), "{text}")?;
        tracing::info!(addrs = ?server.addrs()?, stun = ?server.stun_addrs()?, "relay is up");
        let signals = signals.listen()?;
        let handle = server.handle();
        let told = async {
            if let Err(error) = obey(&signals, &handle, &args).await {
                tracing::error!(%error, "signals cannot be heard");
            }
        };
        server.run(told).await
    });
    runtime.shutdown_timeout(SHUTDOWN_LIMIT);
    result
}

/// Reads files again as often as it is told to, until it is told to end.
async fn obey(signals: &Signals, handle: &DerpHandle, args: &DerpArgs) -> anyhow::Result<()> {
    while signals.next().await? == Told::ReadAgain {
        handle.verify_again();
        match args.rate_config.as_deref().map(read_rate).transpose() {
            Ok(Some(rate)) => {
                tracing::info!(?rate, "SIGHUP: the rate was read again");
                handle.set_client_rate(rate);
            }
            Ok(None) => {}
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "SIGHUP: the old rate stays in force");
            }
        }
    }
    Ok(())
}

/// derper's file of rates; 0 is no limit.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RateConfig {
    #[serde(rename = "PerClientRateLimitBytesPerSec")]
    per_second: u64,
    #[serde(rename = "PerClientRateBurstBytes")]
    burst: u64,
}

fn read_rate(file: &Path) -> anyhow::Result<Option<Rate>> {
    let shown = file.display();
    let about = || format!("cannot use the rates of {shown}");
    if std::fs::metadata(file).with_context(about)?.len() > RATE_CONFIG_LEN_MAX {
        bail!("{shown} is longer than {RATE_CONFIG_LEN_MAX} bytes");
    }
    let text = std::fs::read(file).with_context(about)?;
    let config: RateConfig = serde_json::from_slice(&text).with_context(about)?;
    Ok((config.per_second > 0).then_some(Rate {
        per_second: config.per_second,
        burst: config.burst.max(BURST_MIN),
    }))
}

fn verify_by(text: &str) -> Result<VerifyBy, String> {
    if text.is_empty() {
        return Err("a URL or a file is needed".to_owned());
    }
    Ok(if text.contains("://") {
        VerifyBy::Url(text.to_owned())
    } else {
        VerifyBy::File(text.into())
    })
}

/// Connections per second, in thousandths.
fn connection_rate(text: &str) -> Result<u64, String> {
    let rate: f64 = text.parse().map_err(|_| "a number is needed".to_owned())?;
    if !(0.001..=1e9).contains(&rate) {
        return Err("a rate is between 0.001 and 1e9 per second".to_owned());
    }
    let thousandths = Duration::from_secs_f64(rate).as_millis();
    u64::try_from(thousandths).map_err(|error| error.to_string())
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
