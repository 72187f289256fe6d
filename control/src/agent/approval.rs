//! Which of our offers the network has approved. It counts where this node lets others out to the Internet: they have a
//! route for everything to us, and must not get into networks of ours that no administrator gave them. Of a node that is
//! but a subnet router nobody has a route that was not approved, so there nothing is shut: a server that does not say
//! what it approved would have made a black hole of it.
//!
//! **What the server says of ourselves** is the word: the prefixes that it has us route. Two things are said otherwise.
//! Headscale (`ReduceRoutes` in hscontrol/policy, v0.29.2) leaves out of it what its policy gives this node itself no way
//! to: then the rules tell, which name of the networks behind a node those that are approved, or else let somebody reach
//! whatever there is. And of several routers of a prefix it names the one in use: who was it stays approved while another is.

use std::collections::BTreeSet;

use ipnet::IpNet;
use ringtail_dataplane::{Prefix, Rules};

use super::{Agent, Network};

impl Network {
    /// Whether a prefix that we offer has been approved.
    fn approves(&self, net: &IpNet) -> bool {
        let Some(routes) = &self.own.routes else {
            return true;
        };
        if routes
            .iter()
            .any(|route| route.prefix_len() > 0 && route.contains(net))
        {
            return true;
        }
        let Rules::List(rules) = &*self.rules else {
            return false;
        };
        let us = |prefix: &Prefix| {
            let prefix = IpNet::from(*prefix);
            self.addresses
                .iter()
                .any(|own| prefix.contains(&own.addr()))
        };
        let there = |prefix: &Prefix| {
            let prefix = IpNet::from(*prefix);
            prefix.contains(net) || net.contains(&prefix)
        };
        let mut leads_there = false;
        for rule in rules {
            let mut to = rule.destinations.iter().map(|(prefix, ..)| prefix);
            if !to.clone().any(there) {
                continue;
            }
            if !to.any(us) {
                // It is about the networks behind us.
                return true;
            }
            if rule.sources.iter().any(us) {
                // We may go there ourselves, and would be told of our route.
                return false;
            }
            leads_there = true;
        }
        leads_there
    }

    fn has_router(&self, net: &IpNet) -> bool {
        let mut peers = self.peers.iter();
        peers.any(|peer| peer.allowed_ips.contains(net) || peer.primary_routes.contains(net))
    }
}

impl Agent {
    /// What of our offers those reach whom we let out to the Internet, and everybody where we let nobody out.
    pub(super) fn open(&self) -> impl Iterator<Item = IpNet> {
        self.offered().filter(|net| !self.unapproved.contains(net))
    }

    /// Finds out what of our offers is approved, and says what is not.
    pub(super) fn judge_offers(&mut self) {
        let Some(told) = self
            .told
            .as_ref()
            .filter(|_| self.prefs.advertise_exit_node)
        else {
            self.approved.clear();
            self.unapproved.clear();
            self.set_health("offers", Vec::new());
            return;
        };
        let (approved, unapproved): (BTreeSet<IpNet>, BTreeSet<IpNet>) =
            self.offered().partition(|net| {
                told.approves(net) || self.approved.contains(net) && told.has_router(net)
            });
        let lines = unapproved.iter().map(|net| {
            let why = if told.has_router(net) {
                "is offered, and another node is its router"
            } else {
                "is offered, not approved"
            };
            format!("{net} {why}: who uses this exit node does not reach it")
        });
        let lines = lines.collect();
        (self.approved, self.unapproved) = (approved, unapproved);
        self.set_health("offers", lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringtail_dataplane::Rule;

    const LAN: &str = "192.168.8.0/24";

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// A network that says this of us.
    fn network(routes: &[&str], rules: Rules) -> Network {
        let mut network = Network {
            addresses: nets(&["100.64.0.1/32", "fd7a:115c:a1e0::1/128"]),
            rules: rules.into(),
            ..Network::default()
        };
        network.own.routes = Some(nets(routes));
        network
    }

    fn rule(sources: &[&str], destinations: &[&str]) -> Rule {
        let to = nets(destinations).into_iter();
        Rule {
            sources: nets(sources).into_iter().map(Into::into).collect(),
            destinations: to.map(|net| (net.into(), 0, u16::MAX)).collect(),
            protocols: vec![6],
        }
    }

    #[test]
    fn approved_is_what_the_server_has_us_route() {
        let lan = LAN.parse().unwrap();
        for (routes, approved) in [
            (&[][..], false),
            (&["0.0.0.0/0", "::/0"], false),
            (&["192.168.8.0/25"], false),
            (&[LAN], true),
            (&["192.168.0.0/16"], true),
        ] {
            let told = network(routes, Rules::AllowAll);
            assert_eq!(told.approves(&lan), approved, "{routes:?}");
        }
        assert!(
            Network::default().approves(&lan),
            "a file says nothing of it"
        );
    }

    #[test]
    fn where_a_policy_hides_our_own_routes_the_rules_tell() {
        let lan = LAN.parse().unwrap();
        let (us, other, all) = ("100.64.0.1/32", "100.64.0.9/32", "0.0.0.0/0");
        for (rules, approved) in [
            (vec![], false),
            (vec![rule(&[other], &[us])], false),
            // Whoever lets nobody there but whom it names has approved it.
            (vec![rule(&[other], &[LAN])], true),
            (vec![rule(&[all], &["192.168.8.7/32"])], true),
            // Of these Headscale sends the same whether it is approved or not: to a node that may go there itself
            // it says which.
            (vec![rule(&[other], &[all])], true),
            (vec![rule(&[all], &[all])], false),
            (vec![rule(&[other], &[all]), rule(&[us], &[us, LAN])], false),
        ] {
            let told = network(&["0.0.0.0/0", "::/0"], Rules::List(rules.clone()));
            assert_eq!(told.approves(&lan), approved, "{rules:?}");
        }
    }
}
