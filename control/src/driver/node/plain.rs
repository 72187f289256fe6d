//! Plain WireGuard peers of the settings file: their keys, and where those that are named by host are.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use super::intake::Finding;
use crate::agent::{NetworkPeer, Plain};
use crate::config::{Endpoint, PlainPeer};
use crate::driver::files::{self, Readers};
use crate::driver::interface::source_address;
use crate::driver::names::Names;
use crate::key::NodePublic;
use crate::uapi::PresharedKey;

/// Names are looked up again this often, and so soon where there was no answer.
const LOOK_UP_PERIOD: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(5);
const LOOK_UP_LIMIT: Duration = Duration::from_secs(10);

/// The peers as the agent takes them.
///
/// # Errors
/// A preshared key cannot be read, is open to others, or is none.
pub(super) fn peers(settings: &[PlainPeer]) -> anyhow::Result<Vec<NetworkPeer>> {
    let peer = |peer: &PlainPeer| -> anyhow::Result<NetworkPeer> {
        let file = peer.preshared_key_file.as_deref();
        let alone = |net: &&IpNet| net.prefix_len() == net.max_prefix_len();
        Ok(NetworkPeer {
            name: peer.label(),
            node_key: peer.public_key,
            addresses: peer.allowed_ips.iter().filter(alone).copied().collect(),
            allowed_ips: peer.allowed_ips.clone(),
            endpoints: match &peer.endpoint {
                Some(Endpoint::Address(address)) => vec![*address],
                Some(Endpoint::Name(..)) | None => Vec::new(),
            },
            plain: Some(Plain {
                preshared_key: file.map(preshared_key).transpose()?,
                keepalive: peer.persistent_keepalive,
                allow_in: peer.allow_in,
            }),
            ..NetworkPeer::default()
        })
    };
    settings.iter().map(peer).collect()
}

fn preshared_key(path: &Path) -> anyhow::Result<PresharedKey> {
    let none = || {
        format!(
            "{} holds no preshared key, which `wg genpsk` makes",
            path.display()
        )
    };
    let text = files::read(path, Readers::Nobody)?;
    let text = text.with_context(|| format!("there is no {}", path.display()))?;
    let bytes = STANDARD.decode(text.trim_ascii()).map(Zeroizing::new);
    let bytes = bytes.ok().with_context(none)?;
    let key = bytes.as_slice().try_into().ok().with_context(none)?;
    Ok(PresharedKey(key))
}

/// Looks up the hosts that peers are at, again and again, as long as `tasks` are there.
pub(super) fn follow_names(
    settings: &[PlainPeer],
    names: &Names,
    fwmark: u32,
    findings: &mpsc::Sender<Finding>,
    tasks: &mut JoinSet<()>,
) {
    for peer in settings {
        if let Some(Endpoint::Name(host, port)) = &peer.endpoint {
            let (key, host, port) = (peer.public_key, host.clone(), *port);
            let (names, findings) = (names.clone(), findings.clone());
            tasks.spawn_local(async move {
                follow(key, &host, port, &names, fwmark, &findings).await;
            });
        }
    }
}

async fn follow(
    key: NodePublic,
    host: &str,
    port: u16,
    names: &Names,
    fwmark: u32,
    findings: &mpsc::Sender<Finding>,
) {
    let mut at: Option<IpAddr> = None;
    loop {
        let found = names.look_up(host, LOOK_UP_LIMIT).await.unwrap_or_default();
        let has_way = |ip: IpAddr| source_address(SocketAddr::new(ip, port), fwmark).is_some();
        let best = best(&found, at, &has_way);
        if let Some(best) = best
            && at.replace(best) != Some(best)
        {
            tracing::info!(host, address = %best, "a plain peer's host is found");
            let found = Finding::PlainPeer(key, SocketAddr::new(best, port));
            if findings.send(found).await.is_err() {
                return;
            }
        }
        let wait = if best.is_some() {
            LOOK_UP_PERIOD
        } else {
            RETRY
        };
        tokio::time::sleep(wait).await;
    }
}

/// Of the addresses that a host has, the one to take: one that a way leads to. While the one we have is as good,
/// their order says nothing.
fn best(found: &[IpAddr], at: Option<IpAddr>, has_way: &dyn Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let stays = at.filter(|at| found.contains(at));
    let in_turn = || stays.iter().chain(found).copied();
    in_turn()
        .find(|ip| has_way(*ip))
        .or_else(|| in_turn().next())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_host_of_both_families_is_reached_by_the_one_that_leads_there() {
        let [v4, v6]: [IpAddr; 2] = ["192.0.2.1", "2001:db8::1"].map(|ip| ip.parse().unwrap());
        let only = |family: Option<IpAddr>| move |ip| Some(ip) == family;
        for (found, at, way, taken) in [
            (&[v4, v6][..], None, Some(v6), Some(v6)),
            (&[v4, v6], None, None, Some(v4)),
            (&[v4, v6], Some(v6), None, Some(v6)),
            (&[v4, v6], Some(v4), Some(v6), Some(v6)),
            (&[v4], Some(v6), None, Some(v4)),
            (&[], Some(v6), Some(v6), None),
        ] {
            assert_eq!(
                best(found, at, &only(way)),
                taken,
                "{found:?} {at:?} {way:?}"
            );
        }
        assert_eq!(best(&[v4, v6], Some(v6), &|_| true), Some(v6), "it stays");
    }

    #[test]
    fn a_preshared_key_is_read_from_a_file_of_ours_alone_and_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("psk");
        let settings = |path: &Path| {
            vec![PlainPeer {
                name: "office".into(),
                public_key: NodePublic([1; 32]),
                preshared_key_file: Some(path.to_owned()),
                allowed_ips: vec![
                    "10.9.0.0/24".parse().unwrap(),
                    "10.9.1.1/32".parse().unwrap(),
                ],
                endpoint: None,
                persistent_keepalive: 25,
                allow_in: false,
            }]
        };
        let error = |path: &Path| format!("{:#}", peers(&settings(path)).unwrap_err());
        assert!(error(&path).contains("there is no"));
        let text = STANDARD.encode([7; 32]);
        std::fs::write(&path, format!("{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(error(&path).contains("open to others"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let found = peers(&settings(&path)).unwrap();
        let plain = found[0].plain.as_ref().unwrap();
        assert_eq!(plain.preshared_key, Some(PresharedKey([7; 32])));
        assert_eq!(found[0].addresses, ["10.9.1.1/32".parse().unwrap()]);
        assert!(!format!("{found:?}").contains("7, 7"));
        std::fs::write(&path, "Bwc=").unwrap();
        let said = error(&path);
        assert!(
            said.contains("no preshared key") && !said.contains("Bwc="),
            "{said}"
        );
    }
}
