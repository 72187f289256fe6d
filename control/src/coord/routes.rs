//! Which announced routes count, and who is the router of each.
//!
//! A node announces prefixes (`Hostinfo.RoutableIPs`); an administrator approves a prefix for one
//! node. What is both, exactly, counts: an approved 10.0.0.0/8 says nothing of 10.1.0.0/16. An
//! approval belongs to the node, not to its name or address: it stays while the node announces
//! nothing, and goes with the node. (`protocol/coordination-server.md` §5, Routes.)

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde_json::Value;

/// Routes of one node that are looked at: the first ones it announces.
pub const ROUTES_MAX: usize = 256;

/// Routes that can be approved for one node.
pub const APPROVALS_MAX: usize = 256;

/// The well-formed prefixes a node announces, sorted, of the first [`ROUTES_MAX`] entries.
pub fn announced(hostinfo: &Value) -> Vec<IpNet> {
    let routes = entries(hostinfo).iter().take(ROUTES_MAX);
    let routes = routes.filter_map(|route| route.as_str()?.parse::<IpNet>().ok());
    let mut routes: Vec<IpNet> = routes.filter(|route| route.trunc() == *route).collect();
    routes.sort_unstable();
    routes.dedup();
    routes
}

/// How many announced entries are past [`ROUTES_MAX`] and not looked at.
pub fn left_out(hostinfo: &Value) -> usize {
    entries(hostinfo).len().saturating_sub(ROUTES_MAX)
}

fn entries(hostinfo: &Value) -> &[Value] {
    let routes = hostinfo["RoutableIPs"].as_array();
    routes.map_or(&[], Vec::as_slice)
}

/// The router of every prefix that is no exit route: of its candidates, each with the routes that
/// count for it and by ascending id, the one that has been it, else the first. Exit routes need
/// none, for their users choose.
pub fn primaries<'a>(
    old: &BTreeMap<IpNet, i64>,
    candidates: impl Iterator<Item = (i64, &'a [IpNet])>,
) -> BTreeMap<IpNet, i64> {
    let mut routers: BTreeMap<IpNet, Vec<i64>> = BTreeMap::new();
    for (id, routes) in candidates {
        for route in routes.iter().filter(|route| !is_exit(route)) {
            routers.entry(*route).or_default().push(id);
        }
    }
    let choose = |(net, ids): (IpNet, Vec<i64>)| {
        let kept = old.get(&net).filter(|id| ids.contains(id));
        (net, *kept.unwrap_or(&ids[0]))
    };
    routers.into_iter().map(choose).collect()
}

/// Whether a route is one to everywhere.
pub fn is_exit(route: &IpNet) -> bool {
    route.prefix_len() == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_announced_is_read_as_it_stands_up_to_a_bound() {
        let info = json!({"RoutableIPs": ["10.20.0.0/16", "10.20.0.1/16", 7, "x", "::/0", "10.20.0.0/16"]});
        assert_eq!(announced(&info), nets(&["10.20.0.0/16", "::/0"]));
        for none in [
            json!({}),
            json!({"RoutableIPs": null}),
            json!({"RoutableIPs": "10.0.0.0/8"}),
        ] {
            assert_eq!((announced(&none), left_out(&none)), (Vec::new(), 0));
        }
        let many: Vec<String> = (0..300)
            .map(|n| format!("10.{}.{}.0/24", n / 256, n % 256))
            .collect();
        let info = json!({"RoutableIPs": many});
        assert_eq!((announced(&info).len(), left_out(&info)), (ROUTES_MAX, 44));
    }

    #[test]
    fn who_has_been_the_router_of_a_prefix_stays_it_while_it_is_a_candidate() {
        let (lan, exit) = (
            nets(&["10.20.0.0/16"]),
            nets(&["0.0.0.0/0", "10.20.0.0/16", "10.0.0.0/8"]),
        );
        let old = BTreeMap::new();
        let first = primaries(&old, [(1, &lan[..]), (2, &exit[..])].into_iter());
        let want: BTreeMap<IpNet, i64> = [(lan[0], 1), (exit[2], 2)].into();
        assert_eq!(
            first, want,
            "the first; no exit route; each prefix by itself"
        );
        let second = primaries(&first, [(2, &exit[..])].into_iter());
        assert_eq!(second[&lan[0]], 2);
        let back = primaries(&second, [(1, &lan[..]), (2, &exit[..])].into_iter());
        assert_eq!(back[&lan[0]], 2);
    }
}
