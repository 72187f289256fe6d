//! `ringtail coord`: the coordination server, and its auth keys; `nodes` has the rest.

mod nodes;

use std::io::{IsTerminal as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, Subcommand};
use ipnet::{Ipv4Net, Ipv6Net};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use zeroize::Zeroizing;

use self::nodes::{NodesArgs, RoutesArgs};
use crate::coord::address::{AddressPlan, V4_RANGE, V6_RANGE};
use crate::coord::auth_key::{self, AuthKey, KeySeed};
use crate::coord::routes::announced;
use crate::coord::server::{NodeRecord, ServerConfig};
use crate::coord::{CoordConfig, CoordEvent, NotAdmitted, SelfState};
use crate::driver::control_url::{ControlUrl, is_private};
use crate::driver::coord_admin;
use crate::driver::coord_client::CoordClient;
use crate::driver::coord_server::{CoordServer, CoordServerConfig};
use crate::driver::coord_store::Database;
use crate::driver::files::{self, Readers};
use crate::driver::names::Names;
use crate::driver::signals::{Blocked, Told};
use crate::driver::state::StateDir;
use crate::driver::underlay::Underlay;
use crate::driver::{runtime, tls};
use crate::key::{DiscoPrivate, MachinePrivate, MachinePublic, NodePrivate};
use crate::netmap::wire::EndpointKind;
use crate::netmap::{DerpMap, Netmap};

/// Turns of tasks after which a thread asks the sockets for news, at the latest: a turn may write a map
/// of thousands of nodes, and whoever comes waits for so many of them.
const TURNS_MAX: u32 = 4;

/// Where the server keeps its state unless told otherwise.
const STATE_DIR: &str = "/var/lib/ringtail-coord";

/// Ten years: longer than a process lives, and safe to add to any time.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A DERP map file at most, in bytes.
const DERP_MAP_LEN_MAX: u64 = 4 << 20;

/// Run a coordination server: it lets nodes into the network and tells them of each other.
///
/// ringtail nodes and Tailscale clients join it with an auth key, which
/// `ringtail coord keys create` prints. Without TLS it listens on loopback and private addresses
/// only. It keeps everything in its state directory and may be stopped or killed at any time:
/// nodes go on without it and come back by themselves.
///
///   ringtail coord --addr 10.0.0.1:8080 --derp-map map.json
///   (umask 077; ringtail coord keys create > auth-key)
///   ringtail up --coord http://10.0.0.1:8080 --auth-key-file auth-key
///   ringtail coord nodes                                  who is in; `delete` and `expire` NODE
///   ringtail coord routes approve edge1 10.20.0.0/16      lets edge1 route it, and nobody else
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, args_conflicts_with_subcommands = true)]
pub(super) struct CoordArgs {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make, list and revoke the keys new machines join with.
    #[command(subcommand)]
    Keys(KeysCommand),
    Nodes(NodesArgs),
    Routes(RoutesArgs),
    Watch(Box<WatchArgs>),
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    Create(CreateArgs),
    /// List the keys: name, kind, state. The keys themselves are not stored.
    List(StateArg),
    Expire(ExpireArgs),
}

#[derive(Debug, Args)]
struct StateArg {
    /// State directory of the server.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
}

#[derive(Debug, Args)]
struct ServeArgs {
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

/// Make a key that lets machines in, and print it.
///
/// It works at once, also while the server runs.
#[derive(Debug, Args)]
struct CreateArgs {
    #[command(flatten)]
    state: StateArg,
    /// Let any number of machines in; otherwise the first one only.
    #[arg(long)]
    reusable: bool,
    /// Forget the nodes it lets in when they stay away.
    #[arg(long)]
    ephemeral: bool,
    /// How long it is good: 90s, 10m, 1h, 7d, or never.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
    expires: Time,
}

/// Make a key worthless from now on; nodes that joined with it stay.
#[derive(Debug, Args)]
struct ExpireArgs {
    #[command(flatten)]
    state: StateArg,
    /// The key's name, as `keys list` prints it.
    name: String,
}

/// Join a network without moving packets, and print what its coordination server says.
///
/// One JSON object per line, until interrupted. Works with Headscale too. The node is made anew
/// at every call unless a seed is given.
#[derive(Debug, Args)]
struct WatchArgs {
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
    /// End after so many seconds.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
}

/// What was an approval for any node that announced the prefix.
fn approve_route(route: &str) -> Result<(), String> {
    Err(format!(
        "a route is approved for one node, once that has joined: ringtail coord routes approve \
         NODE {route}"
    ))
}

/// A length of time, or for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Time(Option<Duration>);

fn parse_time(text: &str) -> Result<Time, String> {
    if text == "never" {
        return Ok(Time(None));
    }
    let unit = text.chars().last().unwrap_or_default();
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err("write a number and s, m, h or d, or never".to_owned()),
    };
    let number: u32 = text[..text.len() - 1]
        .parse()
        .map_err(|_| "write a number and s, m, h or d, or never".to_owned())?;
    Ok(Time(Some(Duration::from_secs(u64::from(number) * seconds))))
}

/// Runs `ringtail coord` and its verbs.
///
/// # Errors
/// Whatever keeps the server from starting, or the verb from doing its work.
pub(super) fn run(args: CoordArgs) -> anyhow::Result<()> {
    match args.command {
        None => serve(&args.serve),
        Some(Command::Keys(KeysCommand::Create(create))) => keys_create(&create),
        Some(Command::Keys(KeysCommand::List(state))) => keys_list(&state),
        Some(Command::Keys(KeysCommand::Expire(expire))) => keys_expire(&expire),
        Some(Command::Nodes(args)) => nodes::nodes(&args),
        Some(Command::Routes(args)) => nodes::routes(&args),
        Some(Command::Watch(watch)) => watch_network(*watch),
    }
}

fn open(state: &StateArg) -> anyhow::Result<(StateDir, Database)> {
    let dir = StateDir::open(&state.state_dir)?;
    let database = Database::open(&dir.file("coord.db"))?;
    Ok((dir, database))
}

/// Makes a key and stores what recognises it.
fn new_key(
    database: &Database,
    reusable: bool,
    ephemeral: bool,
    expires: Time,
) -> anyhow::Result<Zeroizing<String>> {
    let text = std::iter::repeat_with(|| auth_key::make(&KeySeed::new(rand::random())))
        .flatten()
        .next()
        .context("no randomness")?;
    let created = OffsetDateTime::now_utc();
    database.put_key(&AuthKey {
        id: 0,
        name: auth_key::name(&text),
        hash: auth_key::hash(&text),
        reusable,
        ephemeral,
        used: false,
        expires: expires.0.map(|wait| created + wait),
        created,
    })?;
    Ok(text)
}

fn keys_create(args: &CreateArgs) -> anyhow::Result<()> {
    let (_, database) = open(&args.state)?;
    let text = new_key(&database, args.reusable, args.ephemeral, args.expires)?;
    writeln!(std::io::stdout().lock(), "{}", *text)?;
    Ok(())
}

fn keys_list(state: &StateArg) -> anyhow::Result<()> {
    let (_, database) = open(state)?;
    let now = OffsetDateTime::now_utc();
    let mut out = std::io::stdout().lock();
    for key in database.keys()? {
        let kind = match (key.reusable, key.ephemeral) {
            (false, false) => "single-use",
            (true, false) => "reusable",
            (false, true) => "single-use, ephemeral",
            (true, true) => "reusable, ephemeral",
        };
        let state = match key.expires {
            Some(at) if at <= now => "expired".to_owned(),
            _ if key.used && !key.reusable => "used".to_owned(),
            Some(at) => format!("good until {}", at.format(&Rfc3339)?),
            None => "good".to_owned(),
        };
        writeln!(out, "{}  {kind}  {state}", key.name)?;
    }
    Ok(())
}

fn keys_expire(args: &ExpireArgs) -> anyhow::Result<()> {
    let (_, database) = open(&args.state)?;
    if !database.expire_key(&args.name, OffsetDateTime::now_utc())? {
        bail!(
            "no key is named {}; `ringtail coord keys list` shows them",
            args.name
        );
    }
    Ok(())
}

fn serve(args: &ServeArgs) -> anyhow::Result<()> {
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
        user: "ringtail".to_owned(),
        domain: args.base_domain.trim_matches('.').to_owned(),
        addresses,
        derp_map,
        ephemeral_timeout: args.ephemeral_timeout.0.unwrap_or(FOR_EVER),
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
            let Some(file) = &args.derp_map else {
                tracing::info!("SIGHUP: there is no DERP map to read again");
                continue;
            };
            match read_derp_map(file) {
                Ok(map) => {
                    tracing::info!(
                        regions = map.regions.len(),
                        "SIGHUP: the DERP map was read again"
                    );
                    server.set_derp_map(map).await;
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::error!(error, "SIGHUP: the old DERP map stays in force");
                }
            }
        }
        tracing::info!(counters = ?server.counters().list(), "stopping");
        server.stop().await;
        Ok(())
    })
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
        let key = new_key(database, true, false, Time(Some(Duration::from_secs(3600))))?;
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

fn read_key_file(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    let key = files::read_auth_key(path)?;
    if key.is_empty() || key.len() > 256 {
        bail!("{} must hold one auth key on one line", path.display());
    }
    Ok(key)
}

fn accept_key_file(database: &Database, path: &Path) -> anyhow::Result<()> {
    if !path.exists() {
        let key = new_key(database, true, false, Time(None))?;
        return files::write(path, key.as_bytes());
    }
    let key = read_key_file(path)?;
    database.put_key(&AuthKey {
        id: 0,
        name: auth_key::name(&key),
        hash: auth_key::hash(&key),
        reusable: true,
        ephemeral: false,
        used: false,
        expires: None,
        created: OffsetDateTime::now_utc(),
    })
}

fn read_derp_map(path: &Path) -> anyhow::Result<DerpMap> {
    let wrong = |why: String| anyhow!("{} is no DERP map: {why}", path.display());
    let len = std::fs::metadata(path)
        .with_context(|| format!("cannot read {}", path.display()))?
        .len();
    if len > DERP_MAP_LEN_MAX {
        bail!("{} is too long for a DERP map", path.display());
    }
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
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

/// Joins with throw-away keys, or those of a directory, and prints events as JSON lines.
fn watch_network(args: WatchArgs) -> anyhow::Result<()> {
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
        machine,
        node,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_numbers_with_a_unit_or_never() {
        let time = |text| parse_time(text).map(|time| time.0.map(|wait| wait.as_secs()));
        assert_eq!(time("90s"), Ok(Some(90)));
        assert_eq!(time("10m"), Ok(Some(600)));
        assert_eq!(time("7d"), Ok(Some(604_800)));
        assert_eq!(time("never"), Ok(None));
        for bad in ["", "h", "1", "-1h", "1 h", "1µ"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }

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

    #[test]
    fn a_key_file_is_made_when_missing_and_keys_made_here_are_good() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("coord.db")).unwrap();
        let file = dir.path().join("auth-key");
        accept_key_file(&database, &file).unwrap();
        let text = read_key_file(&file).unwrap();
        let stored = database.find_key(&auth_key::name(&text)).unwrap();
        let check = auth_key::KeyCheck::of(&text, stored.as_ref(), OffsetDateTime::now_utc());
        assert_eq!(check.error(), None);
        std::fs::write(&file, "my own key\n").unwrap();
        accept_key_file(&database, &file).unwrap();
        accept_key_file(&database, &file).unwrap();
        assert_eq!(database.keys().unwrap().len(), 2);
    }
}
