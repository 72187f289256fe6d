//! The reply to `get`: what is configured, joined with what only the running data plane knows.

use ringtail_dataplane::PeerId;

use super::Device;
use crate::uapi::{DeviceStatus, PeerStatus, Reply};

impl Device {
    /// The whole reply to a `get`. `status` and `traffic` say what the data plane knows of the device
    /// and of a peer; without an endpoint there, a peer is where it was configured to be.
    pub fn reply(
        &self,
        status: DeviceStatus<'_>,
        traffic: &dyn Fn(PeerId) -> PeerStatus<'static>,
    ) -> Reply {
        let device = DeviceStatus {
            private_key: self.private_key(),
            fwmark: self.fwmark,
            ..status
        };
        let mut reply = Reply::to_get(&device, self.peers_len(), self.allowed_ips_len());
        for (id, peer) in self.peers() {
            let traffic = traffic(id);
            let status = PeerStatus {
                public_key: peer.key,
                preshared_key: peer.preshared_key.as_ref(),
                endpoint: traffic.endpoint.or(peer.endpoint),
                keepalive: peer.keepalive,
                ..traffic
            };
            reply.peer(&status, peer.allowed_ips());
        }
        reply.finish()
    }
}
