//! A node as its configuration socket shows it: what `wg show` prints of it. Nothing can be set
//! there, for coordination owns it all.

use std::time::{Duration, Instant};

use ringtail_dataplane::{Activity, PeerId};

use super::Agent;
use crate::path::Status;
use crate::uapi::{DeviceStatus, PeerStatus, Reply};

impl Agent {
    /// The reply to a `get`. `traffic` gives what the shards know of a peer and the wall clock time
    /// of its last handshake. An endpoint is shown while there is a direct path.
    pub fn configuration(
        &self,
        now: Instant,
        device: &DeviceStatus<'_>,
        traffic: &dyn Fn(PeerId) -> (Activity, Option<Duration>),
    ) -> Reply {
        let allowed_ips = self
            .directory
            .iter()
            .map(|(_, peer)| peer.allowed_ips.len());
        let peers = self.directory.iter().count();
        let mut reply = Reply::to_get(device, peers, allowed_ips.sum());
        for (id, peer) in self.directory.iter() {
            let (activity, last_handshake) = traffic(id);
            let plain = peer.plain.as_ref();
            let path = self.paths.status(now, id);
            let best = path.as_ref().and_then(|path| path.best);
            let mut extras = vec![("name", super::short_name(&peer.name))];
            if let Some(path) = &path {
                extras.push(("path", path.state.name().to_owned()));
                extras.extend(path.region.map(|id| ("relay", self.region_code(id))));
            }
            let mtu = best.and_then(|best| best.mtu);
            extras.extend(mtu.map(|mtu| ("path_mtu", mtu.to_string())));
            extras.push(("tx_relay_bytes", activity.tx_relay_bytes.to_string()));
            extras.push(("rx_relay_bytes", activity.rx_relay_bytes.to_string()));
            let status = PeerStatus {
                public_key: peer.node_key,
                preshared_key: plain.and_then(|plain| plain.preshared_key.as_ref()),
                endpoint: path.as_ref().and_then(Status::address),
                last_handshake,
                tx_bytes: activity.tx_bytes,
                rx_bytes: activity.rx_bytes,
                keepalive: plain.map_or(0, |plain| plain.keepalive),
                extras,
            };
            reply.peer(&status, peer.allowed_ips.iter().map(|net| (*net).into()));
        }
        reply.finish()
    }
}
