#![forbid(unsafe_code)]
//! Why a packet was dropped.

use crate::named;

named! {
    /// Why a packet was dropped: one counter each, per shard.
    ///
    /// The names are part of the JSON of `ringtail status` and stay stable.
    #[repr(u8)]
    pub enum DropReason {
        // Outbound: what the TUN device gave us.
        /// A TUN read is shorter than the virtio-net header.
        TunShort = "tun_short",
        /// The virtio-net header contradicts the packet or names a type we never asked for.
        VnetInvalid = "vnet_invalid",
        /// Not IPv4 or IPv6, truncated, or with lengths that contradict each other (either direction).
        InnerMalformed = "inner_malformed",
        /// A read of the TUN failed, though the device is there: the packet it was about, or none.
        TunReadFailed = "tun_read_failed",
        /// No peer has the destination among its allowed IPs.
        NoRoute = "no_route",
        /// No usable session, and the queue of packets that wait for one is full or disabled.
        NoSession = "no_session",
        /// The peer has neither a UDP address nor a relay.
        NoPath = "no_path",
        /// The packet does not fit the buffer or the path MTU.
        TooBig = "too_big",
        /// Encapsulation failed inside the transport engine.
        SealFailed = "seal_failed",
        /// The UDP send failed.
        SendFailed = "send_failed",
        /// The kernel's send queue stayed full.
        SendQueueFull = "send_queue_full",
        /// The lane to the relay client was full: the oldest went.
        RelayOutFull = "relay_out_full",
        // Inbound: what the underlay gave us.
        /// The lane from the relay client was full: the oldest went.
        RelayInFull = "relay_in_full",
        /// The lane to the shard that owns the packet was full.
        HandOverFull = "hand_over_full",
        /// The lane to the handshake or control thread was full.
        StrayFull = "stray_full",
        /// A socket's buffer was full: the kernel dropped the datagram before anybody saw it.
        SocketFull = "socket_full",
        /// A receive from a socket failed, though the socket is there: the datagram it was about, or none.
        UdpReadFailed = "udp_read_failed",
        /// A received datagram was cut short by our buffer.
        UdpTruncated = "udp_truncated",
        /// Not WireGuard, DISCO or STUN.
        UnknownMessage = "unknown_message",
        /// A WireGuard message whose length is wrong for its type.
        MessageLength = "message_length",
        /// No session has the receiver index.
        UnknownIndex = "unknown_index",
        /// Authentication of a data message failed.
        OpenFailed = "open_failed",
        /// The message counter was seen before, or is older than the replay window.
        Replayed = "replayed",
        /// The session is past `REJECT_AFTER_TIME` or has no keys yet.
        SessionExpired = "session_expired",
        /// A handshake message whose MAC1 is wrong: the sender does not know our public key.
        HandshakeMac = "handshake_mac",
        /// Under load, a handshake message without proof of its source: answered with a cookie.
        HandshakeCookie = "handshake_cookie",
        /// A handshake message was over the rate limit.
        HandshakeLimited = "handshake_limited",
        /// A handshake message could not be authenticated.
        HandshakeInvalid = "handshake_invalid",
        /// A handshake message carries a public key of low order, or came for a peer that has one.
        HandshakeLowOrder = "handshake_low_order",
        /// A handshake initiation of nobody we know.
        HandshakeUnknownPeer = "handshake_unknown_peer",
        /// A handshake initiation whose timestamp is not newer than the last one.
        HandshakeReplayed = "handshake_replayed",
        /// A handshake initiation less than 20 ms after its peer's last one.
        HandshakeTooSoon = "handshake_too_soon",
        /// A cookie reply that answers nothing we sent.
        CookieInvalid = "cookie_invalid",
        /// A handshake message came while we have no private key.
        HandshakeNoKey = "handshake_no_key",
        /// The queue of handshake messages of the shard that owns the peer was full.
        HandshakeQueueFull = "handshake_queue_full",
        /// The outer header says CE and the inner packet is not ECN-capable (RFC 6040 §4.2).
        EcnCongested = "ecn_congested",
        /// The inner source is not among the sender's allowed IPs.
        SourceNotAllowed = "source_not_allowed",
        /// The filter: destination is multicast or link-local.
        FilterDestination = "filter_destination",
        /// The filter: destination is neither our address nor a route we advertise.
        FilterNotLocal = "filter_not_local",
        /// The filter: a fragment that could overwrite or hide a transport header.
        FilterFragment = "filter_fragment",
        /// The filter: no rule and no remembered outbound flow lets the packet in.
        FilterDenied = "filter_denied",
        /// Meant for the node itself (TSMP), answered or not; never passed to the kernel.
        FilterConsumed = "filter_consumed",
        /// TSMP from the host or from behind it: that is the node's to send, and tells peers of its keys.
        TsmpForged = "tsmp_forged",
        /// The write to the TUN device failed.
        TunWriteFailed = "tun_write_failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_snake_case_and_indexes_dense() {
        let mut seen = std::collections::HashSet::new();
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert!(seen.insert(reason.name()), "{} twice", reason.name());
            assert!(
                reason
                    .name()
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{} is not snake_case",
                reason.name()
            );
        }
    }
}
