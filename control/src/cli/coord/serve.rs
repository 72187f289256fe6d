//! The server itself: what it is told, where it listens, what it says at its start.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use ipnet::{Ipv4Net, Ipv6Net};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use super::keys::{Kind, Time, accept_key_file, new_key, parse_time};
use super::names::NamesArgs;
use super::policy::read_policy;
use super::{FOR_EVER, STATE_DIR, StateArg, open, read_text};
use crate::coord::address::AddressPlan;
use crate::coord::routes::announced;
use crate::coord::server::{NodeRecord, ServerConfig};
use crate::driver::control_url::is_private;
use crate::driver::coord_server::{CoordServer, CoordServerConfig, Settings};
use crate::driver::coord_store::Database;
use crate::driver::files::Readers;
use crate::driver::signals::{Blocked, Told};
use crate::driver::state::StateDir;
use crate::driver::{coord_admin, files, tls};
use crate::key::{MachinePrivate, MachinePublic};
use crate::netmap::DerpMap;
use crate::netmap::prefix::{V4_RANGE, V6_RANGE};

/// Turns of tasks after which a thread asks the sockets for news, at the latest: a turn may seal and
/// write much of a map, or look at what changed for thousands of streams, and whoever comes waits for so
/// many of them.
const TURNS_MAX: u32 = 4;

/// A DERP map file at most, in bytes.
const DERP_MAP_LEN_MAX: u64 = 4 << 20;

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Address and port to listen on; may be repeated.
    #[arg(
        long = "addr",
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:8080"
    )]
    addrs: Vec<SocketAddr>,
    #[command(flatten)]
    state: StateArg,
    /// The relays, as a DERP map in JSON, or in TOML with the same names. Read again on SIGHUP.
    #[arg(long, value_name = "FILE")]
    derp_map: Option<PathBuf>,
    /// Accept the auth key in this file, for any number of machines and without end; a new one is
    /// written there when the file is missing.
    #[arg(long, value_name = "FILE")]
    auth_key_file: Option<PathBuf>,
    /// Who may reach what: a policy file in HuJSON, as Headscale reads it (groups, hosts, tagOwners, acls,
    /// autoApprovers). Without one all may reach all. Read again on SIGHUP.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    #[command(flatten)]
    names: NamesArgs,
    /// How long a node's key is good: then it has to be let in again. Nodes with tags keep theirs.
    #[arg(long, value_name = "TIME", default_value = "never", value_parser = parse_time)]
    key_expiry: Time,
    /// Suffix of all node names.
    #[arg(long, value_name = "DOMAIN", default_value = "tail.internal")]
    base_domain: String,
    /// Where IPv4 addresses come from; inside 100.64.0.0/10.
    #[arg(long, value_name = "PREFIX", default_value_t = V4_RANGE)]
    prefix4: Ipv4Net,
    /// Where IPv6 addresses come from; inside fd7a:115c:a1e0::/48.
    #[arg(long, value_name = "PREFIX", default_value_t = V6_RANGE)]
    prefix6: Ipv6Net,
    /// Routes are approved per node; this only says so.
    #[arg(long = "approve-route", hide = true, value_parser = approve_route)]
    _approve_route: Vec<()>,
    /// Forget a node that joined with an ephemeral key when it stays away for this long.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_time)]
    ephemeral_timeout: Time,
    /// Speak TLS with this certificate chain (PEM); needs --tls-key.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Speak TLS with a self-signed certificate, made in the state directory at the first start.
    /// ringtail nodes that are given --control-key need no other trust.
    #[arg(long, conflicts_with = "tls_cert")]
    tls_self_signed: bool,
}

/// What was an approval for any node that announced the prefix.
fn approve_route(route: &str) -> Result<(), String> {
    Err(format!(
        "a route is approved for one node, once that has joined: ringtail coord routes approve \
         NODE {route}"
    ))
}

pub(super) fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let tls_on = args.tls_self_signed || args.tls_cert.is_some();
    for addr in &args.addrs {
        if !tls_on && !is_private(addr.ip()) {
            bail!(
                "without TLS the server listens on loopback and private addresses only, and {} is \
                 neither: choose one such as 10.0.0.1:8080, or add --tls-self-signed or --tls-cert",
                addr.ip()
            );
        }
    }
    let signals = Blocked::new()?;
    let (dir, database) = open(&args.state)?;
    let _lock = dir.lock()?;
    let control = control_key(&dir)?;
    if let Some(file) = &args.auth_key_file {
        accept_key_file(&database, file)?;
    }
    let loaded = database.load()?;
    let first_start = !loaded.has_keys;
    tell_unapproved(&loaded.nodes);
    let derp_map = match &args.derp_map {
        Some(file) => read_derp_map(file)?,
        None => DerpMap::default(),
    };
    if derp_map.regions.is_empty() {
        tracing::warn!(
            "the DERP map has no regions: nodes have no relay, and Tailscale clients will not start; \
             give --derp-map FILE"
        );
    }
    let policy = args.policy.as_deref().map(read_policy).transpose()?;
    let dns = args.names.config()?;
    let addresses = AddressPlan::new(args.prefix4, args.prefix6).map_err(anyhow::Error::msg)?;
    let mut listeners = Vec::new();
    let mut urls = Vec::new();
    for addr in &args.addrs {
        let listener =
            TcpListener::bind(addr).with_context(|| format!("cannot listen on {addr}"))?;
        let scheme = if tls_on { "https" } else { "http" };
        urls.push(format!("{scheme}://{}", listener.local_addr()?));
        listeners.push(listener);
    }
    let tls = tls_on.then(|| tls_config(args, &dir)).transpose()?;
    let public = control.public();
    announce(&database, &urls, public, first_start, &args.state.state_dir)?;
    let server = ServerConfig {
        base_domain: args.base_domain.trim_matches('.').to_owned(),
        users: BTreeMap::new(),
        domain: args.base_domain.trim_matches('.').to_owned(),
        addresses,
        derp_map,
        dns,
        ephemeral_timeout: args.ephemeral_timeout.0.unwrap_or(FOR_EVER),
        key_expiry: args.key_expiry.0,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("rt-coord")
        .event_interval(TURNS_MAX)
        .enable_all()
        .build()
        .context("cannot start the server's threads")?;
    runtime.block_on(async {
        let mut server = CoordServer::start(CoordServerConfig {
            listeners,
            tls: tls.map(Arc::new),
            control,
            database,
            server,
            policy,
        })?;
        let _socket = coord_admin::listen(&dir, server.orders())?;
        let signals = signals.listen()?;
        loop {
            let told = tokio::select! {
                told = signals.next() => told?,
                why = server.failed() => bail!("{why}"),
            };
            if told != Told::ReadAgain {
                break;
            }
            server.set(read_again(args)).await;
        }
        tracing::info!(counters = ?server.counters(), "stopping");
        server.stop().await;
        Ok(())
    })
}

/// Reads the files again that may change. One that makes no sense changes nothing.
fn read_again(args: &ServeArgs) -> Settings {
    fn read<T>(what: &str, read: Option<anyhow::Result<T>>) -> Option<T> {
        match read? {
            Ok(new) => {
                tracing::info!("SIGHUP: {what} was read again");
                Some(new)
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "SIGHUP: {what} stays as it was");
                None
            }
        }
    }
    let names = args.names.has_file().then(|| args.names.config());
    Settings {
        derp_map: read("the DERP map", args.derp_map.as_deref().map(read_derp_map)),
        dns: read("the list of extra records", names),
        policy: read("the policy", args.policy.as_deref().map(read_policy)),
    }
}

/// Says that nodes announce what nobody approved for them.
fn tell_unapproved(nodes: &[NodeRecord]) {
    let waits = |node: &&NodeRecord| {
        let announced = announced(&node.hostinfo);
        announced.iter().any(|route| !node.approved.contains(route))
    };
    let nodes = nodes.iter().filter(waits).count();
    if nodes > 0 {
        tracing::warn!(
            nodes,
            "some nodes announce routes that are not approved for them: `ringtail coord routes` \
             lists and approves them"
        );
    }
}

/// Says where the server is and how to join it. A first auth key is made and shown only when a
/// person is watching: it must not land in a log.
fn announce(
    database: &Database,
    urls: &[String],
    public: MachinePublic,
    first_start: bool,
    state_dir: &Path,
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let url = urls.first().map_or("", String::as_str);
    writeln!(out, "coordination server at {}", urls.join(", "))?;
    writeln!(out, "control key {public}")?;
    if first_start && std::io::stdout().is_terminal() {
        let key = new_key(
            database,
            Kind::plain(true),
            Time(Some(Duration::from_secs(3600))),
        )?;
        writeln!(
            out,
            "\nAny machine may join within the next hour with this key:\n"
        )?;
        writeln!(out, "  echo {} > auth-key", *key)?;
    } else {
        writeln!(
            out,
            "\nTo let a machine in, make a key here and use it there:\n"
        )?;
        let place = if state_dir == Path::new(STATE_DIR) {
            String::new()
        } else {
            format!(" --state-dir {}", state_dir.display())
        };
        writeln!(out, "  ringtail coord keys create{place} > auth-key")?;
    }
    writeln!(
        out,
        "  ringtail up --coord {url} --control-key {public} --auth-key-file auth-key\n"
    )?;
    out.flush()?;
    Ok(())
}

/// The server's Noise key, in a file of its own so that the database can be copied without it.
fn control_key(dir: &StateDir) -> anyhow::Result<MachinePrivate> {
    let path = dir.file("noise.key");
    let Some(text) = files::read(&path, Readers::Nobody)? else {
        let key = MachinePrivate::generate();
        files::write(&path, key.to_text().as_bytes())?;
        return Ok(key);
    };
    let key = std::str::from_utf8(&text)
        .ok()
        .map(|text| text.trim().parse());
    let why = || format!("{} holds no private key", path.display());
    key.with_context(why)?.with_context(why)
}

fn read_derp_map(path: &Path) -> anyhow::Result<DerpMap> {
    let wrong = |why: String| anyhow!("{} is no DERP map: {why}", path.display());
    let text = read_text(path, DERP_MAP_LEN_MAX)?;
    let is_toml = path
        .extension()
        .is_some_and(|extension| extension == "toml");
    let value = if is_toml {
        // By way of JSON, whose object keys may be numbers.
        let value: toml::Value = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        serde_json::to_value(value)?
    } else {
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?
    };
    DerpMap::from_file(value).map_err(wrong)
}

fn tls_config(args: &ServeArgs, dir: &StateDir) -> anyhow::Result<rustls::ServerConfig> {
    let (cert, key) = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => (cert.clone(), key.clone()),
        _ => self_signed(args, dir)?,
    };
    let chain = CertificateDer::pem_file_iter(&cert)
        .and_then(Iterator::collect)
        .with_context(|| format!("{} holds no certificate chain", cert.display()))?;
    let key = PrivateKeyDer::from_pem_file(&key)
        .with_context(|| format!("{} holds no private key", key.display()))?;
    tls::server_config(chain, key).context("certificate and key do not fit together")
}

/// A certificate for the addresses we listen on, made once.
fn self_signed(args: &ServeArgs, dir: &StateDir) -> anyhow::Result<(PathBuf, PathBuf)> {
    let (cert_path, key_path) = (dir.file("tls-cert.pem"), dir.file("tls-key.pem"));
    if !cert_path.exists() || files::read(&key_path, Readers::Nobody)?.is_none() {
        let mut names: Vec<String> = args
            .addrs
            .iter()
            .map(|addr| addr.ip().to_string())
            .collect();
        names.dedup();
        let key = rcgen::KeyPair::generate().context("cannot make a TLS key")?;
        let cert = rcgen::CertificateParams::new(names)
            .and_then(|params| params.self_signed(&key))
            .context("cannot make a certificate")?;
        files::write(&key_path, Zeroizing::new(key.serialize_pem()).as_bytes())?;
        files::write(&cert_path, cert.pem().as_bytes())?;
    }
    Ok((cert_path, key_path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derp_maps_are_read_from_json_and_toml() {
        let dir = tempfile::tempdir().unwrap();
        let (json, toml) = (dir.path().join("map.json"), dir.path().join("map.toml"));
        let text = r#"{"Regions":{"900":{"RegionID":900,"RegionCode":"lab","RegionName":"Lab",
            "Nodes":[{"Name":"900a","RegionID":900,"HostName":"10.0.0.9"}]}}}"#;
        std::fs::write(&json, text).unwrap();
        let text = "[Regions.900]\nRegionID = 900\nRegionCode = \"lab\"\nRegionName = \"Lab\"\n\
                    [[Regions.900.Nodes]]\nName = \"900a\"\nRegionID = 900\nHostName = \"10.0.0.9\"\n";
        std::fs::write(&toml, text).unwrap();
        assert_eq!(read_derp_map(&json).unwrap(), read_derp_map(&toml).unwrap());
        std::fs::write(&json, "7").unwrap();
        assert!(read_derp_map(&json).is_err());
    }
}
