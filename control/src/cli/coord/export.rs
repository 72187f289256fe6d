//! `ringtail coord export`: all that the server knows, as a list.

use std::io::Write as _;

use clap::Args;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{StateArg, open};
use crate::coord::routes::announced;

/// Print users and nodes as JSON, to be set up anew at another server.
///
/// It is a list, and no other server reads it as it is: Headscale has no import, and a node's keys and
/// addresses cannot be taken along. docs/headscale.md says how nodes move all the same. No secret is in
/// it: auth keys are not stored. The policy is your file, and Headscale reads it as it is.
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    state: StateArg,
}

pub(super) fn export(args: &ExportArgs) -> anyhow::Result<()> {
    let (_, database) = open(&args.state)?;
    let loaded = database.load()?;
    let time = |at: Option<OffsetDateTime>| at.and_then(|at| at.format(&Rfc3339).ok());
    let nodes = loaded.nodes.iter().map(|node| {
        json!({
            "id": node.id, "name": node.name, "hostname": node.hostinfo["Hostname"],
            "user": loaded.users.get(&node.user), "tags": node.tags,
            "addresses": [node.v4.to_string(), node.v6.to_string()],
            "node_key": node.node_key, "machine_key": node.machine,
            "announced_routes": announced(&node.hostinfo), "approved_routes": node.approved,
            "ephemeral": node.ephemeral, "key_expired": time(node.expires),
            "key_expires": time(node.good_until), "created": time(Some(node.created)),
            "last_seen": time(node.last_seen),
        })
    });
    let list = json!({
        "users": loaded.users.values().collect::<Vec<_>>(),
        "nodes": nodes.collect::<Vec<_>>(),
    });
    writeln!(std::io::stdout().lock(), "{list:#}")?;
    Ok(())
}
