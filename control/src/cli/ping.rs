//! `ringtail ping`.

use std::io::Write as _;
use std::time::Duration;

use anyhow::bail;
use clap::Args;

use super::ask::{NodeArg, text};
use crate::driver::local_api::{PingBy, Request, ask};
use crate::driver::runtime;

/// Ping a peer below the tunnel and say which way each reply came; or by the tunnel.
///
/// Prints one line per reply: by relay, with the region, or direct, with the address. By the tunnel the first
/// reply is the last.
#[derive(Debug, Args)]
pub(super) struct PingArgs {
    /// A peer's name, inner address or node key.
    peer: String,
    #[command(flatten)]
    node: NodeArg,
    /// Pings to send.
    #[arg(short, long, value_name = "COUNT", default_value_t = 4)]
    count: u32,
    /// Seconds between them.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// Stop at the first direct reply.
    #[arg(long)]
    until_direct: bool,
    /// Ping by the tunnel, from node to node: no packet filter or firewall has a say in it.
    #[arg(long, conflicts_with_all = ["peerapi", "until_direct"])]
    tsmp: bool,
    /// Ask the peer's HTTP server for other peers, by this host and the tunnel.
    #[arg(long, conflicts_with = "until_direct")]
    peerapi: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds, from 0.01 to 3600".into()),
    }
}

pub(super) fn run(args: &PingArgs) -> anyhow::Result<()> {
    let socket = args.node.path();
    let by = match (args.tsmp, args.peerapi) {
        (true, _) => PingBy::Tsmp,
        (false, true) => PingBy::Peerapi,
        (false, false) => PingBy::Disco,
    };
    let mut replies = 0u32;
    let mut direct = false;
    runtime::block_on(async |_| {
        for n in 0..args.count {
            if n > 0 {
                tokio::time::sleep(Duration::from_secs_f64(args.interval)).await;
            }
            ask(
                &socket,
                &Request::Ping {
                    peer: args.peer.clone(),
                    by,
                },
                |answer| {
                    let mut out = std::io::stdout().lock();
                    let name = text(&answer["peer"]);
                    match answer["via"].as_str() {
                        None => writeln!(out, "no reply from {name}: {}", text(&answer["reason"]))?,
                        Some(via) => {
                            replies += 1;
                            direct |= via == "direct";
                            let ms = answer["latency_ms"].as_f64().unwrap_or_default();
                            let place = match via {
                                "direct" => format!("direct, {}", text(&answer["address"])),
                                "tsmp" => match answer["peerapi"].as_u64() {
                                    Some(port) if port > 0 => {
                                        format!("TSMP, {}, {port}", text(&answer["address"]))
                                    }
                                    Some(_) | None => {
                                        format!("TSMP, {}", text(&answer["address"]))
                                    }
                                },
                                "peerapi" => format!("http://{}", text(&answer["address"])),
                                _ => format!("relay {}", text(&answer["region"])),
                            };
                            writeln!(out, "pong from {name} ({place}) in {ms:.3} ms")?;
                        }
                    }
                    Ok(())
                },
            )
            .await?;
            if args.until_direct && direct || by != PingBy::Disco && replies > 0 {
                break;
            }
        }
        Ok(())
    })?;
    if replies == 0 {
        bail!(
            "{} did not answer; `ringtail status` shows what is known of it",
            args.peer
        );
    }
    if args.until_direct && !direct {
        bail!("no direct path to {} yet", args.peer);
    }
    Ok(())
}
