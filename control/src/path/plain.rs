//! The path to a plain WireGuard peer, which speaks no DISCO and has no relay: the address that somebody
//! named for it, and wherever it is heard from since, for only the owner of its key is heard at all
//! (WireGuard paper §2.1).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ringtail_dataplane::PathDecision;

use super::{PeerSetup, StateName, Status};
use crate::key::NodePublic;

/// The address is the only one there is, so it is trusted for good and silence says nothing against it.
const FOR_GOOD: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// No Ping asks what passes.
const PATH_MTU: u16 = 1500;

/// One such peer.
#[derive(Clone, Debug)]
pub(super) struct Plain {
    pub(super) node_key: NodePublic,
    /// What was named for it last, best first.
    named: Vec<SocketAddr>,
    /// Where it is.
    pub(super) at: Option<SocketAddr>,
    generation: u64,
    since: Instant,
    switches: u32,
}

impl Plain {
    pub(super) fn new(now: Instant, node_key: NodePublic) -> Self {
        Self {
            node_key,
            named: Vec::new(),
            at: None,
            generation: 0,
            since: now,
            switches: 0,
        }
    }

    /// Takes what is named for it, of which `admits` may be sent to. It moves there only if that is another
    /// than before: it may have roamed since. Whether it moved.
    pub(super) fn set(
        &mut self,
        now: Instant,
        setup: &PeerSetup,
        admits: impl Fn(SocketAddr) -> bool,
    ) -> bool {
        if self.named == setup.endpoints {
            return false;
        }
        self.named.clone_from(&setup.endpoints);
        let first = self.named.iter().copied().find(|addr| admits(*addr));
        first.is_some_and(|addr| self.move_to(now, addr))
    }

    /// It was heard from there. Whether it moved.
    pub(super) fn move_to(&mut self, now: Instant, addr: SocketAddr) -> bool {
        let moved = self.at != Some(addr);
        if moved {
            self.switches += u32::from(self.at.is_some());
            self.at = Some(addr);
            self.since = now;
            self.generation += 1;
        }
        moved
    }

    pub(super) fn decision(&self) -> PathDecision {
        PathDecision {
            generation: self.generation,
            udp: self.at,
            local: None,
            derp: None,
            trust_until: self.since.checked_add(FOR_GOOD),
            silence_limit: FOR_GOOD,
            path_mtu: PATH_MTU,
            relayed_alone: false,
        }
    }

    pub(super) fn status(&self, now: Instant) -> Status {
        Status {
            state: StateName::Plain,
            since: now.saturating_duration_since(self.since),
            decision: self.decision(),
            region: None,
            relay_rtt: None,
            best: None,
            validating: None,
            candidates: self.named.iter().map(|addr| (*addr, None)).collect(),
            switches: self.switches,
        }
    }
}

#[cfg(test)]
mod tests {
    use ringtail_dataplane::{PeerId, now};

    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn it_is_where_it_was_heard_last_until_another_place_is_named() {
        let now = now();
        let mut plain = Plain::new(now, NodePublic([1; 32]));
        let setup = |named: &[&str]| PeerSetup {
            id: PeerId(1),
            node_key: NodePublic([1; 32]),
            disco_key: None,
            home: None,
            endpoints: named.iter().map(|text| addr(text)).collect(),
        };
        let admits = |addr: SocketAddr| addr.port() != 9;
        assert!(!plain.set(now, &setup(&[]), admits));
        assert_eq!(plain.decision().udp, None);
        assert!(plain.set(now, &setup(&["192.0.2.1:9", "192.0.2.1:1"]), admits));
        let first = plain.decision();
        assert_eq!(first.udp, Some(addr("192.0.2.1:1")));
        assert!(
            first
                .trust_until
                .is_some_and(|until| until > now + Duration::from_secs(1 << 30))
        );
        assert!(plain.move_to(now, addr("192.0.2.2:7")));
        assert!(!plain.move_to(now, addr("192.0.2.2:7")));
        // The same said again does not call it back.
        assert!(!plain.set(now, &setup(&["192.0.2.1:9", "192.0.2.1:1"]), admits));
        assert_eq!(plain.at, Some(addr("192.0.2.2:7")));
        assert!(plain.set(now, &setup(&["192.0.2.3:1"]), admits));
        let last = plain.decision();
        assert_eq!((last.udp, last.derp), (Some(addr("192.0.2.3:1")), None));
        assert!(last.generation > first.generation);
        assert_eq!(plain.status(now).switches, 2);
    }
}
