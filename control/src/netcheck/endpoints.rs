//! The addresses at which we can be reached (`protocol/paths.md` §2).
//!
//! Public ones, however learned, stay listed for five minutes after they were seen last, at most six
//! per IP; configured and local ones are listed while they are there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use ringtail_dataplane::PeerId;

use crate::netmap::wire::EndpointKind;

/// How long a public endpoint stays listed.
const CACHED: Duration = Duration::from_secs(5 * 60 + 10);
const PER_IP_MAX: usize = 6;
const PER_V6_SUBNET_MAX: usize = 2;
/// Public endpoints remembered.
const CACHED_MAX: usize = 64;
/// Own endpoints given out.
const LISTED_MAX: usize = 64;

/// One address we may be reached at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnEndpoint {
    /// The address.
    pub addr: SocketAddr,
    /// How we know.
    pub kind: EndpointKind,
}

/// One interface of this machine that is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addrs: Vec<IpAddr>,
}

/// Gathers own endpoints.
#[derive(Clone, Debug, Default)]
pub(super) struct OwnEndpoints {
    pub(super) port: u16,
    pub(super) port_is_fixed: bool,
    pub(super) loopback: bool,
    pub(super) configured: Vec<SocketAddr>,
    pub(super) port_mapped: Option<SocketAddr>,
    local: Vec<IpAddr>,
    /// Public endpoints with when they were seen last.
    cache: BTreeMap<OwnEndpoint, Instant>,
    /// When STUN showed a mapping last, IPv4 and IPv6.
    stun_at: [Option<Instant>; 2],
    /// What peers say, with up to two who say it.
    reported: BTreeMap<SocketAddr, BTreeSet<PeerId>>,
}

impl OwnEndpoints {
    pub(super) fn new(port: u16, port_is_fixed: bool, loopback: bool) -> Self {
        Self {
            port,
            port_is_fixed,
            loopback,
            ..Self::default()
        }
    }

    /// Takes the interfaces; returns whether the usable addresses changed.
    pub(super) fn set_interfaces(&mut self, interfaces: &[Interface], own_tun: &str) -> bool {
        let local = usable_addresses(interfaces, own_tun, self.loopback);
        let changed = local != self.local;
        self.local = local;
        changed
    }

    /// Whether an interface has an address good for leaving this machine.
    pub(super) fn have(&self, v6: bool) -> bool {
        self.local.iter().any(|ip| match ip {
            IpAddr::V4(ip) => !v6 && (self.loopback || !ip.is_loopback() && !ip.is_link_local()),
            IpAddr::V6(ip) => {
                let global = ip.segments()[0] & 0xe000 == 0x2000;
                v6 && (global || ip.is_unique_local() || self.loopback && ip.is_loopback())
            }
        })
    }

    /// A public endpoint was seen.
    pub(super) fn seen(&mut self, now: Instant, addr: SocketAddr, kind: EndpointKind) {
        self.cache.insert(OwnEndpoint { addr, kind }, now);
        while self.cache.len() > CACHED_MAX {
            let oldest = self
                .cache
                .iter()
                .min_by_key(|(_, at)| **at)
                .map(|(found, _)| *found);
            if let Some(oldest) = oldest {
                self.cache.remove(&oldest);
            }
        }
    }

    /// A peer sees us at `addr`. It counts where STUN saw nothing of that family lately, or when
    /// another peer says the same: the view of one peer may hold for that peer alone.
    pub(super) fn reported(&mut self, now: Instant, peer: PeerId, addr: SocketAddr) {
        if self.local.contains(&addr.ip()) || !super::usable(addr, self.loopback) {
            return;
        }
        let known = self.stun_at[usize::from(addr.is_ipv6())].is_some_and(|at| fresh(now, at));
        if self.reported.len() >= CACHED_MAX && !self.reported.contains_key(&addr) {
            self.reported.clear();
        }
        let witnesses = self.reported.entry(addr).or_default();
        if witnesses.len() < 2 {
            witnesses.insert(peer);
        }
        if !known || witnesses.len() >= 2 {
            self.seen(now, addr, EndpointKind::Stun);
        }
    }

    /// All of them now: those seen in this check first (`fresh_public`), then by their kind.
    pub(super) fn list(&mut self, now: Instant, fresh_public: &[OwnEndpoint]) -> Vec<OwnEndpoint> {
        self.cache.retain(|_, at| fresh(now, *at));
        for endpoint in fresh_public {
            self.stun_at[usize::from(endpoint.addr.is_ipv6())] = Some(now);
            self.seen(now, endpoint.addr, endpoint.kind);
        }
        let mapped = self.port_mapped.map(|addr| OwnEndpoint {
            addr,
            kind: EndpointKind::PortMapped,
        });
        let mut cached: Vec<_> = self.cache.iter().map(|(found, at)| (*at, *found)).collect();
        cached.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        let mut per_ip: BTreeMap<IpAddr, usize> = BTreeMap::new();
        let public = mapped
            .into_iter()
            .chain(fresh_public.iter().copied())
            .chain(cached.into_iter().map(|(_, found)| found));
        let mut listed = Vec::new();
        let mut seen = BTreeSet::new();
        for endpoint in public {
            let count = per_ip.entry(endpoint.addr.ip()).or_default();
            if *count < PER_IP_MAX && seen.insert(endpoint.addr) {
                *count += 1;
                listed.push(endpoint);
            }
        }
        let configured = self
            .configured
            .iter()
            .map(|addr| (*addr, EndpointKind::Configured));
        let local = self.local.iter().map(|ip| {
            let addr = SocketAddr::new(*ip, self.port);
            (addr, EndpointKind::Local)
        });
        for (addr, kind) in configured.chain(local) {
            if addr.port() != 0 && seen.insert(addr) {
                listed.push(OwnEndpoint { addr, kind });
            }
        }
        listed.truncate(LISTED_MAX);
        listed
    }
}

fn fresh(now: Instant, at: Instant) -> bool {
    now.saturating_duration_since(at) <= CACHED
}

/// The addresses worth advertising, in the order of the interfaces.
fn usable_addresses(interfaces: &[Interface], own_tun: &str, loopback: bool) -> Vec<IpAddr> {
    let foreign_tunnel = |name: &str| name.starts_with("zt") || name == "wt0" || name == own_tun;
    let all: Vec<IpAddr> = interfaces
        .iter()
        .filter(|interface| !foreign_tunnel(&interface.name))
        .flat_map(|interface| interface.addrs.iter().map(|ip| ip.to_canonical()))
        .filter(|ip| !is_tailscale(*ip) && !ip.is_unspecified() && !ip.is_multicast())
        .collect();
    let last_resort = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    };
    let never = |ip: &IpAddr| match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let mut per_subnet: BTreeMap<u128, usize> = BTreeMap::new();
    let mut room = |ip: &IpAddr| match ip {
        IpAddr::V4(_) => true,
        IpAddr::V6(ip) => {
            let count = per_subnet.entry(u128::from(*ip) >> 64).or_default();
            *count += 1;
            *count <= PER_V6_SUBNET_MAX
        }
    };
    let ordinary: Vec<IpAddr> = all
        .iter()
        .filter(|ip| !never(ip) && !last_resort(ip) && !ip.is_loopback() && room(ip))
        .copied()
        .collect();
    let loops = || all.iter().filter(|ip| ip.is_loopback()).copied();
    if !ordinary.is_empty() {
        let extra = loops().filter(|_| loopback);
        return ordinary.into_iter().chain(extra).collect();
    }
    let resort: Vec<IpAddr> = all.iter().filter(|ip| last_resort(ip)).copied().collect();
    if resort.is_empty() {
        loops().collect()
    } else {
        resort
    }
}

/// Tailscale's own address ranges, 100.64.0.0/10 and fd7a:115c:a1e0::/48.
fn is_tailscale(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => u32::from(ip) >> 22 == 0x6440_0000 >> 22,
        IpAddr::V6(ip) => {
            let net = Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0);
            u128::from(ip) >> 80 == u128::from(net) >> 80
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    fn interface(name: &str, addrs: &[&str]) -> Interface {
        Interface {
            name: name.into(),
            addrs: addrs.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    fn usable(interfaces: &[Interface]) -> Vec<String> {
        let found = usable_addresses(interfaces, "ringtail0", false);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn interface_addresses_are_those_that_others_could_reach() {
        let lo = interface("lo", &["127.0.0.1", "::1"]);
        let eth = interface(
            "eth0",
            &[
                "192.168.1.2",
                "169.254.9.9",
                "fe80::1",
                "fd00::1",
                "2001:db8::1",
                "2001:db8::2",
                "2001:db8::3",
            ],
        );
        let tunnels = [
            interface("zt7", &["10.1.1.1"]),
            interface("wt0", &["10.1.1.2"]),
            interface("ringtail0", &["10.1.1.3"]),
            interface("tailscale0", &["100.64.0.7", "fd7a:115c:a1e0::7"]),
        ];
        let docker = interface("docker0", &["172.17.0.1"]);
        let all = [[lo.clone(), eth, docker].as_slice(), &tunnels].concat();
        let wanted = ["192.168.1.2", "2001:db8::1", "2001:db8::2", "172.17.0.1"];
        assert_eq!(usable(&all), wanted);
        let poor = interface("eth0", &["169.254.9.9", "fd00::1"]);
        assert_eq!(usable(&[lo.clone(), poor]), ["169.254.9.9", "fd00::1"]);
        assert_eq!(usable(&[lo]), ["127.0.0.1", "::1"]);
    }

    fn stun(port: u16) -> OwnEndpoint {
        OwnEndpoint {
            addr: SocketAddr::from(([203, 0, 113, 11], port)),
            kind: EndpointKind::Stun,
        }
    }

    #[test]
    fn public_endpoints_stay_for_five_minutes_and_six_per_ip() {
        let mut own = OwnEndpoints {
            port: 41641,
            ..OwnEndpoints::default()
        };
        own.set_interfaces(&[interface("eth0", &["192.168.1.2"])], "");
        let begin = start();
        for n in 0..8 {
            own.list(
                begin + Duration::from_secs(n),
                &[stun(1000 + u16::try_from(n).unwrap())],
            );
        }
        let now = begin + Duration::from_secs(8);
        let ports = |listed: Vec<OwnEndpoint>| -> Vec<u16> {
            listed.iter().map(|endpoint| endpoint.addr.port()).collect()
        };
        assert_eq!(
            ports(own.list(now, &[stun(1003)])),
            [1003, 1007, 1006, 1005, 1004, 1002, 41641]
        );
        assert_eq!(ports(own.list(now + CACHED, &[])), [1003, 41641]);
        let after = now + CACHED + Duration::from_millis(1);
        assert_eq!(ports(own.list(after, &[])), [41641]);
    }

    #[test]
    fn what_one_peer_says_counts_only_where_stun_is_silent() {
        let begin = start();
        let listed = |own: &mut OwnEndpoints| own.list(begin, &[]).len();
        let mut blocked = OwnEndpoints::default();
        blocked.reported(begin, PeerId(1), stun(5000).addr);
        assert_eq!(listed(&mut blocked), 1);
        let mut known = OwnEndpoints::default();
        known.list(begin, &[stun(1000)]);
        known.reported(begin, PeerId(1), stun(5000).addr);
        assert_eq!(listed(&mut known), 1);
        known.reported(begin, PeerId(2), stun(5000).addr);
        assert_eq!(listed(&mut known), 2);
    }

    #[test]
    fn the_order_is_mapped_seen_configured_local() {
        let mut own = OwnEndpoints {
            port: 41641,
            port_mapped: Some(stun(50001).addr),
            configured: vec![stun(50002).addr],
            ..OwnEndpoints::default()
        };
        own.set_interfaces(&[interface("eth0", &["192.168.1.2"])], "");
        let kinds: Vec<EndpointKind> = own
            .list(start(), &[stun(1000)])
            .iter()
            .map(|endpoint| endpoint.kind)
            .collect();
        let wanted = [
            EndpointKind::PortMapped,
            EndpointKind::Stun,
            EndpointKind::Configured,
            EndpointKind::Local,
        ];
        assert_eq!(kinds, wanted);
    }
}
