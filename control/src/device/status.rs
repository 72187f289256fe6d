//! The reply to `get`: what is configured, joined with what only the running data plane knows.

use std::net::SocketAddr;
use std::time::Duration;

use ringtail_dataplane::PeerId;

use super::Device;
use crate::uapi::{DeviceStatus, PeerStatus, Reply};

/// What the data plane knows of the device.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// UDP port in use.
    pub listen_port: u16,
    /// Keys of our own and their values, without `ringtail_`.
    pub extras: Vec<(String, String)>,
}

/// What the data plane knows of one peer.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Where we send now; none means where the peer was configured to be.
    pub endpoint: Option<SocketAddr>,
    /// Wall clock time of the last handshake since the Unix epoch.
    pub last_handshake: Option<Duration>,
    /// Bytes of WireGuard messages sent.
    pub tx_bytes: u64,
    /// Bytes of authenticated WireGuard messages received.
    pub rx_bytes: u64,
    /// Keys of our own and their values, without `ringtail_`.
    pub extras: Vec<(&'static str, String)>,
}

impl Device {
    /// The whole reply to a `get`.
    pub fn reply(&self, status: &Status, traffic: &dyn Fn(PeerId) -> Traffic) -> Reply {
        let device = DeviceStatus {
            private_key: self.private_key(),
            listen_port: status.listen_port,
            fwmark: self.fwmark(),
            extras: status.extras.clone(),
        };
        let mut reply = Reply::to_get(&device, self.peers_len(), self.allowed_ips_len());
        for (id, peer) in self.peers() {
            let traffic = traffic(id);
            let status = PeerStatus {
                public_key: peer.key(),
                preshared_key: peer.preshared_key(),
                endpoint: traffic.endpoint.or_else(|| peer.endpoint()),
                last_handshake: traffic.last_handshake,
                tx_bytes: traffic.tx_bytes,
                rx_bytes: traffic.rx_bytes,
                keepalive: peer.keepalive(),
                extras: traffic.extras,
            };
            reply.peer(&status, peer.allowed_ips());
        }
        reply.finish()
    }
}
