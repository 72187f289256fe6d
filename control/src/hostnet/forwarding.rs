//! By which interfaces the host has to forward for the network.
//!
//! Not by all: `net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding` change more than forwarding on every interface
//! (redirects are believed or not, router advertisements are ignored, which cuts a host off that has its
//! address by them), and writing the old value back does not give back what was there. So the interfaces
//! concerned are switched each for itself: `net.ipv4.conf.NAME.forwarding`, and
//! `net.ipv6.conf.NAME.force_forwarding`, which kernels have since 6.17. What such an interface could forward to
//! others than the tunnel from then on, our table drops ([`super::firewall`]).

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{Host, Overlay};

/// Index of the loopback interface.
const LOOPBACK: u32 = 1;

/// The interfaces other than the tunnel to which the host forwards for the network, and from which answers come
/// back, by family (IPv6 or not). Where the host has routes inside an offered prefix, theirs; else the
/// one of the longest route around it.
pub fn interfaces(tun: u32, overlay: &Overlay, host: &Host) -> BTreeSet<(u32, bool)> {
    let mut found = BTreeSet::new();
    for net in &overlay.offered {
        let ways = |wanted: &dyn Fn(&IpNet) -> bool| {
            let ways = host.ways.iter().filter(|(way, _)| wanted(way));
            ways.copied().collect::<Vec<_>>()
        };
        let mut by = ways(&|way| net.contains(way));
        let around = ways(&|way| way.contains(net));
        let longest = around.iter().map(|(way, _)| way.prefix_len()).max();
        // By a default route only if there is nothing better: it leads to the Internet.
        if longest.is_some_and(|len| len > 0) || by.is_empty() {
            by.extend(
                around
                    .into_iter()
                    .filter(|(way, _)| Some(way.prefix_len()) == longest),
            );
        }
        found.extend(
            by.into_iter()
                .map(|(way, interface)| (interface, is_v6(&way))),
        );
    }
    if overlay.offers_exit {
        let defaults = host.ways.iter().filter(|(way, _)| way.prefix_len() == 0);
        found.extend(defaults.map(|(way, interface)| (*interface, is_v6(way))));
    }
    found.retain(|(interface, _)| *interface != tun && *interface != LOOPBACK);
    found
}

/// Whether a route of the host says how to reach what is offered.
pub fn concerns(overlay: &Overlay, way: &IpNet) -> bool {
    let offered = overlay.offered.iter();
    let meets = |net: &IpNet| net.contains(way) || way.contains(net);
    overlay.offers_exit && way.prefix_len() == 0 || offered.into_iter().any(meets)
}

fn is_v6(net: &IpNet) -> bool {
    net.addr().is_ipv6()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_forwards_that_leads_to_what_is_offered() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let (wan, lan, second, tun) = (2, 3, 4, 9);
        let ways = [
            ("0.0.0.0/0", wan),
            ("::/0", wan),
            ("203.0.113.0/24", wan),
            ("192.168.77.0/24", lan),
            ("192.168.78.0/24", second),
            ("172.16.0.0/12", second),
            ("fd77::/64", lan),
            ("10.5.0.0/16", tun),
            ("127.0.0.0/8", LOOPBACK),
        ];
        let host = Host {
            ways: ways.map(|(way, by)| (net(way), by)).into(),
            ..Host::default()
        };
        let by = |offered: &[&str], offers_exit| {
            let overlay = Overlay {
                offered: offered.iter().map(|text| net(text)).collect(),
                offers_exit,
                ..Overlay::default()
            };
            interfaces(tun, &overlay, &host)
        };
        assert_eq!(by(&["192.168.77.0/24"], false), [(lan, false)].into());
        assert_eq!(
            by(&["192.168.0.0/16"], false),
            [(lan, false), (second, false)].into()
        );
        assert_eq!(by(&["192.168.77.128/25"], false), [(lan, false)].into());
        assert_eq!(by(&["172.20.0.0/16"], false), [(second, false)].into());
        assert_eq!(by(&["fd77::/64"], false), [(lan, true)].into());
        assert_eq!(by(&["10.9.0.0/16"], false), [(wan, false)].into());
        assert_eq!(by(&["10.5.0.0/16"], false), [].into());
        assert_eq!(by(&[], true), [(wan, false), (wan, true)].into());
        assert_eq!(by(&[], false), [].into());
    }
}
