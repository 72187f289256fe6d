//! DERP, the relay protocol, without sockets or clocks.
//!
//! A TLS stream per client carries length-prefixed frames ([`frame`]). A client sends
//! (destination node key, packet), the relay delivers (source node key, packet); packets are
//! opaque WireGuard or DISCO messages. After TLS comes an HTTP upgrade ([`upgrade`]), which a
//! client skips waiting for when the relay's key came inside the TLS handshake as an extra
//! certificate ([`cert`]); then both sides prove who they are with one sealed JSON object each
//! ([`info`]). [`client`] and [`server`] are the two ends as machines that take bytes and give
//! bytes; [`queue`] is what waits to be written, [`routes`] where peers are found, and [`news`] what
//! becomes of connections.
//!
//! Of a relay alone: [`admission`] is whom it serves, [`budget`] how much memory what waits may take, and of whom.
//!
//! Source: `derp/derp.go`, `derp/derp_client.go`, `derp/derpserver` in tailscale/tailscale.

pub mod admission;
pub mod budget;
pub mod cert;
pub mod client;
pub mod frame;
pub mod info;
pub mod news;
pub mod queue;
pub mod routes;
pub mod server;
pub mod upgrade;

#[cfg(test)]
pub(crate) mod testing;

use ringtail_dataplane::DISCO_MAGIC;

/// The protocol version both sides speak: RecvPacket carries its source key.
pub const PROTOCOL_VERSION: u8 = 2;

/// The first eight bytes of a ServerKey body: "DERP" and a key emoji.
pub const MAGIC: [u8; 8] = *b"DERP\xf0\x9f\x94\x91";

/// The shortest DISCO packet: magic, sender key, nonce.
pub const DISCO_LEN_MIN: usize = 6 + 32 + 24;

/// How a Health frame begins where several connections have one key.
pub const DUPLICATE: &str = "duplicate connection";

/// Whether a relayed packet is DISCO, by its first bytes and length, as the relays judge it.
pub fn is_disco(packet: &[u8]) -> bool {
    packet.len() >= DISCO_LEN_MIN && packet.starts_with(&DISCO_MAGIC)
}
