//! Ranking of direct addresses (`protocol/paths.md` §7).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::mtu::MTU_UNPROVED;

/// What an address is ranked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rank {
    /// The address.
    pub(super) addr: SocketAddr,
    /// Round trip.
    pub(super) latency: Duration,
    /// Largest wire packet known to pass, in bytes.
    pub(super) mtu: u16,
    /// Full packets are known to pass only in fragments.
    pub(super) fragments: bool,
}

impl Rank {
    /// Of an address whose largest packets are not known.
    pub(super) fn unproved(addr: SocketAddr, latency: Duration, fragments: bool) -> Self {
        Self {
            addr,
            latency,
            mtu: MTU_UNPROVED,
            fragments,
        }
    }
}

/// Whether `a` should replace `b`: it carries full packets whole and `b` does not, or it is clearly
/// faster, or about as fast and nearer by the kind of its address. One point of a hundred is no
/// reason to switch.
pub(super) fn better(a: &Rank, b: &Rank) -> bool {
    if a.addr == b.addr {
        return a.mtu > b.mtu;
    }
    if a.fragments != b.fragments {
        return b.fragments;
    }
    let (a_points, b_points) = latency_points(a.latency, b.latency);
    let a_points = a_points + kind_points(a.addr.ip());
    let b_points = b_points + kind_points(b.addr.ip());
    if a_points <= 1 && b_points == 0 {
        return false;
    }
    a_points > b_points
}

/// Points for being faster: how many percent of the other's latency are saved.
fn latency_points(a: Duration, b: Duration) -> (u128, u128) {
    let saved = |fast: Duration, slow: Duration| {
        let rest = (100 * fast.as_nanos()).checked_div(slow.as_nanos());
        rest.map_or(0, |rest| 100 - rest)
    };
    if a > b {
        (0, saved(b, a))
    } else {
        (saved(a, b), 0)
    }
}

/// Points for an address that is near by its kind, and for IPv6.
fn kind_points(ip: IpAddr) -> u128 {
    let (loopback, link_local, private, v6) = match ip {
        IpAddr::V4(ip) => (ip.is_loopback(), ip.is_link_local(), ip.is_private(), 0),
        IpAddr::V6(ip) => {
            let kinds = (ip.is_unicast_link_local(), ip.is_unique_local());
            (ip.is_loopback(), kinds.0, kinds.1, 10)
        }
    };
    let near = match (loopback, link_local, private) {
        (true, _, _) => 50,
        (_, true, _) => 30,
        (_, _, true) => 20,
        (false, false, false) => 0,
    };
    near + v6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(ip: &str, ms: u64) -> Rank {
        Rank {
            addr: SocketAddr::new(ip.parse().unwrap(), 41641),
            latency: Duration::from_millis(ms),
            mtu: 0,
            fragments: false,
        }
    }

    #[test]
    fn whole_packets_go_before_fragments() {
        let (whole, mut cut) = (rank("203.0.113.7", 90), rank("2001:db8::7", 10));
        cut.fragments = true;
        assert!(better(&whole, &cut) && !better(&cut, &whole));
    }

    #[test]
    fn the_table_of_the_page_holds_in_both_orders() {
        for (a, b, ab, ba) in [
            (("203.0.113.7", 100), ("198.51.100.8", 101), false, false),
            (("203.0.113.7", 100), ("198.51.100.8", 102), true, false),
            (("192.168.1.10", 25), ("203.0.113.7", 20), false, false),
            (("192.168.1.10", 26), ("203.0.113.7", 20), false, true),
            (("2001:db8::7", 22), ("203.0.113.7", 20), false, false),
            (("2001:db8::7", 23), ("203.0.113.7", 20), false, true),
            (("192.168.1.10", 20), ("2001:db8::7", 20), true, false),
            (("fd00:1::2", 20), ("192.168.1.10", 20), true, false),
            (("169.254.3.4", 20), ("192.168.1.10", 20), true, false),
            (("203.0.113.7", 1), ("192.168.1.10", 5), true, false),
            (("203.0.113.7", 0), ("198.51.100.8", 0), false, false),
            (("127.0.0.1", 20), ("169.254.3.4", 20), true, false),
            (("100.64.0.1", 20), ("198.51.100.8", 20), false, false),
        ] {
            let (a, b) = (rank(a.0, a.1), rank(b.0, b.1));
            assert_eq!(better(&a, &b), ab, "{a:?} against {b:?}");
            assert_eq!(better(&b, &a), ba, "{b:?} against {a:?}");
        }
    }

    #[test]
    fn of_one_address_the_larger_mtu_wins_whatever_the_latency() {
        let (small, mut large) = (rank("203.0.113.7", 1), rank("203.0.113.7", 90));
        assert!(!better(&large, &small));
        large.mtu = 1400;
        assert!(better(&large, &small));
        assert!(!better(&small, &large));
    }
}
