//! `ringtail coord nodes` and `ringtail coord routes`: what an administrator does with nodes.

use std::io::Write as _;

use clap::{Args, Subcommand};
use ipnet::IpNet;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{StateArg, open};
use crate::coord::admin::{Change, Done, Order};
use crate::coord::routes::announced;
use crate::driver::coord_admin::give;
use crate::driver::coord_store::Database;
use crate::netmap::prefix::parse_route;

/// List the nodes of the network, let one in, rename or tag one, delete one, or let its key expire.
///
/// NODE is the id, name, address or key of a node, as the list shows them. An order is carried out
/// by the server if it runs, in its state if it does not.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct NodesArgs {
    #[command(subcommand)]
    command: Option<NodesCommand>,
    #[command(flatten)]
    state: StateArg,
}

#[derive(Debug, Subcommand)]
enum NodesCommand {
    /// List the nodes, and who of them is connected or was when.
    List(StateArg),
    /// Let a machine in that asks without an auth key.
    ///
    /// It was shown a URL, which has the code. The server has to run; its log names those who wait.
    Approve(ApproveArgs),
    /// Call a node something else, whatever its host is called from then on.
    Rename(RenameArgs),
    /// Give a node tags, in place of those it has.
    ///
    /// With tags it is nobody's: a policy speaks of its tags, and its key does not expire.
    Tag(TagArgs),
    /// Remove a node from the network, at once and for all.
    ///
    /// Its streams end, the others drop it, and its id and approvals are gone; its addresses are
    /// given to nobody before all others of the range were. An auth key that is still good lets
    /// the machine in again, as a new node: `keys expire` ends that.
    Delete(NodeArg),
    /// Make a node's key worthless from now on.
    ///
    /// It sees no peers any more and its peers refuse it. Once it registers with an auth key that
    /// is good it is back, as the same node with the same addresses and approvals.
    Expire(NodeArg),
}

#[derive(Debug, Args)]
struct ApproveArgs {
    /// What the machine was shown: AAAA-BBBB, or the URL.
    code: String,
    /// Whose node it is. Without, it is whose it was, or of the user ringtail.
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    #[command(flatten)]
    state: StateArg,
}

#[derive(Debug, Args)]
struct RenameArgs {
    /// Id, name, address or key of the node.
    node: String,
    /// Its new name: letters, digits and -.
    name: String,
    #[command(flatten)]
    state: StateArg,
}

#[derive(Debug, Args)]
struct TagArgs {
    /// Id, name, address or key of the node.
    node: String,
    /// Tags such as tag:web, by comma; `none` gives it back to its user.
    #[arg(required = true, value_name = "TAG", value_delimiter = ',')]
    tags: Vec<String>,
    #[command(flatten)]
    state: StateArg,
}

#[derive(Debug, Args)]
struct NodeArg {
    /// Id, name, address or key of the node.
    node: String,
    #[command(flatten)]
    state: StateArg,
}

/// List the routes nodes offer, and approve or revoke them.
///
/// A route counts when a node announces it and it is approved for that node, exactly as announced.
/// Of several nodes with the same route, one that is connected carries it. An approval stays while
/// the node announces nothing, and goes with the node.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct RoutesArgs {
    #[command(subcommand)]
    command: Option<RoutesCommand>,
    #[command(flatten)]
    state: StateArg,
}

#[derive(Debug, Subcommand)]
enum RoutesCommand {
    /// List announced and approved routes, by node.
    List(StateArg),
    /// Approve routes for a node, also before it announces them.
    Approve(RouteArgs),
    /// Take approvals of a node back. Those of the policy's autoApprovers are taken back in the policy first.
    Revoke(RouteArgs),
}

#[derive(Debug, Args)]
struct RouteArgs {
    /// Id, name, address or key of the node.
    node: String,
    /// Routes such as 10.20.0.0/16; 0.0.0.0/0 and ::/0 make it an exit node.
    #[arg(required = true, value_name = "PREFIX", value_delimiter = ',', value_parser = parse_route)]
    routes: Vec<IpNet>,
    #[command(flatten)]
    state: StateArg,
}

/// Runs `ringtail coord nodes` and its verbs.
pub(super) fn nodes(args: &NodesArgs) -> anyhow::Result<()> {
    match &args.command {
        None => list(&args.state),
        Some(NodesCommand::List(state)) => list(state),
        Some(NodesCommand::Approve(ApproveArgs { code, user, state })) => {
            let (code, user) = (code.clone(), user.clone());
            let (_, done) = carry_out(state, &Order::Admit { code, user })?;
            say(&format!("node {} ({}) is let in", done.id, done.name))
        }
        Some(NodesCommand::Rename(RenameArgs { node, name, state })) => {
            let (_, done) = carry_out(state, &Change::Rename(name.clone()).of(node))?;
            say(&format!("node {} is called {}", done.id, done.name))
        }
        Some(NodesCommand::Tag(TagArgs { node, tags, state })) => {
            let tags = tags.iter().filter(|tag| *tag != "none").cloned().collect();
            let (_, done) = carry_out(state, &Change::Tag(tags).of(node))?;
            let tags = match &done.tags[..] {
                [] => "no tags: it is its user's".to_owned(),
                tags => tags.join(", "),
            };
            say(&format!("node {} ({}) has {tags}", done.id, done.name))
        }
        Some(NodesCommand::Delete(NodeArg { node, state })) => {
            let (database, done) = carry_out(state, &Change::Delete.of(node))?;
            say(&format!("node {} ({}) is deleted", done.id, done.name))?;
            tell_key(&database, &done, "as a new node")
        }
        Some(NodesCommand::Expire(NodeArg { node, state })) => {
            let (database, done) = carry_out(state, &Change::Expire.of(node))?;
            let since = if done.changed { "" } else { " already" };
            say(&format!(
                "the key of node {} ({}) has expired{since}",
                done.id, done.name
            ))?;
            tell_key(&database, &done, "as the same node")
        }
    }
}

/// Runs `ringtail coord routes` and its verbs.
pub(super) fn routes(args: &RoutesArgs) -> anyhow::Result<()> {
    match &args.command {
        None => list_routes(&args.state),
        Some(RoutesCommand::List(state)) => list_routes(state),
        Some(RoutesCommand::Approve(args)) => {
            let order = Change::Approve(args.routes.clone()).of(&args.node);
            let (_, done) = carry_out(&args.state, &order)?;
            tell_routes(&done)
        }
        Some(RoutesCommand::Revoke(args)) => {
            let order = Change::Revoke(args.routes.clone()).of(&args.node);
            let (_, done) = carry_out(&args.state, &order)?;
            tell_routes(&done)
        }
    }
}

fn carry_out(state: &StateArg, order: &Order) -> anyhow::Result<(Database, Done)> {
    let (dir, database) = open(state)?;
    let done = give(&dir, order)?;
    Ok((database, done))
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{line}")?;
    Ok(())
}

/// Says that the key a node came with is still good, which an administrator may not want.
fn tell_key(database: &Database, done: &Done, how: &str) -> anyhow::Result<()> {
    let now = OffsetDateTime::now_utc();
    let keys = database.keys()?;
    let good = keys.iter().find(|key| {
        let over = key.expires.is_some_and(|at| at <= now) || (key.used && !key.reusable);
        Some(key.id) == done.auth_key && !over
    });
    let Some(key) = good else { return Ok(()) };
    say(&format!(
        "the auth key it came with is still good and lets it in again, {how}; to end that: \
         ringtail coord keys expire {}",
        key.name
    ))
}

fn tell_routes(done: &Done) -> anyhow::Result<()> {
    let name = format!("node {} ({})", done.id, done.name);
    if done.approved.is_empty() {
        return say(&format!("{name} has no approved routes"));
    }
    let list: Vec<String> = done.approved.iter().map(IpNet::to_string).collect();
    say(&format!("approved for {name}: {}", list.join(", ")))?;
    let quiet = done.approved.iter();
    let quiet = quiet.filter(|route| !done.announced.contains(route));
    let quiet: Vec<String> = quiet.map(IpNet::to_string).collect();
    if !quiet.is_empty() {
        say(&format!("not announced by it so far: {}", quiet.join(", ")))?;
    }
    Ok(())
}

fn list(state: &StateArg) -> anyhow::Result<()> {
    let (dir, database) = open(state)?;
    // What a server that was killed has left says nothing of now.
    let online = if dir.is_in_use()? {
        database.online()?
    } else {
        Vec::new()
    };
    let mut out = std::io::stdout().lock();
    let loaded = database.load()?;
    for node in loaded.nodes {
        let whose = if node.tags.is_empty() {
            loaded.users.get(&node.user).cloned().unwrap_or_default()
        } else {
            node.tags.join(",")
        };
        let seen = node.last_seen.map(|at| at.format(&Rfc3339)).transpose()?;
        let seen = match seen {
            _ if online.contains(&node.id) => "online".to_owned(),
            Some(at) => format!("last seen {at}"),
            None => "last seen never".to_owned(),
        };
        let expired = node.expires.map(|at| at.format(&Rfc3339)).transpose()?;
        let until = node.good_until.map(|at| at.format(&Rfc3339)).transpose()?;
        let expired = match (expired, until) {
            (Some(at), _) => format!("  key expired {at}"),
            (None, Some(at)) => format!("  key good until {at}"),
            (None, None) => String::new(),
        };
        writeln!(
            out,
            "{}  {}  {}  {}  {}  {whose}  {seen}{expired}",
            node.id, node.name, node.v4, node.v6, node.node_key,
        )?;
    }
    Ok(())
}

fn list_routes(state: &StateArg) -> anyhow::Result<()> {
    let (_, database) = open(state)?;
    let mut out = std::io::stdout().lock();
    for node in database.load()?.nodes {
        let announced = announced(&node.hostinfo);
        let mut routes: Vec<&IpNet> = announced.iter().chain(&node.approved).collect();
        routes.sort_unstable();
        routes.dedup();
        for route in routes {
            let state = match (announced.contains(route), node.approved.contains(route)) {
                (true, true) => "approved",
                (false, _) => "approved, not announced",
                (true, false) => "not approved",
            };
            writeln!(out, "{}  {}  {route}  {state}", node.id, node.name)?;
        }
    }
    Ok(())
}
