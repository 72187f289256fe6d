//! STUN Binding: how a node learns its public address and the latency to a relay.
//!
//! A node sends [`request`] from its WireGuard port to a relay; the relay's server half answers with
//! the address it saw ([`respond`]); the node finds the pending probe by transaction id and reads
//! that address out of the answer ([`parse_response`]). There is no state here: ids in flight are
//! `netcheck`'s.
//!
//! The wire is RFC 8489 narrowed to what relays of the field speak (`protocol/stun.md`,
//! net/stun/stun.go in tailscale/tailscale): requests carry SOFTWARE "tailnode" and a FINGERPRINT as
//! their last bytes, and a relay answers nothing else. Integers are big-endian.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ringtail_dataplane::{STUN_COOKIE as COOKIE, STUN_HEADER_LEN as HEADER_LEN};

/// Names one request and its answer: 96 random bits.
pub type TxId = [u8; 12];

/// Length of every [`request`] in bytes.
pub const REQUEST_LEN: usize = 40;

/// Longest answer in bytes: the header and one IPv6 XOR-MAPPED-ADDRESS.
pub const ANSWER_LEN_MAX: usize = 44;

const COOKIE_PORT: u16 = 0x2112;
const FINGERPRINT_XOR: u32 = 0x5354_554e;
const FINGERPRINT_LEN: usize = 8;
const SOFTWARE: &[u8] = b"tailnode";

const TYPE_REQUEST: u16 = 0x0001;
const TYPE_SUCCESS: u16 = 0x0101;
const ATTR_MAPPED_ADDRESS: u16 = 0x0001;
const ATTR_XOR_MAPPED_ADDRESS: u16 = 0x0020;
const ATTR_XOR_MAPPED_ADDRESS_OLD: u16 = 0x8020;
const ATTR_SOFTWARE: u16 = 0x8022;
const ATTR_FINGERPRINT: u16 = 0x8028;
const FAMILY_V4: u8 = 1;
const FAMILY_V6: u8 = 2;

/// Why a datagram is no usable answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Error {
    /// Too short, another cookie, or the top two bits set: some other protocol.
    #[error("not a STUN message")]
    NotStun,
    /// A STUN message other than a Binding success response.
    #[error("not a Binding success response")]
    NotSuccess,
    /// Lengths that run over the end, an unknown address family, or no address at all.
    #[error("malformed attributes")]
    Malformed,
}

/// What a Binding success response says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The id of the request it answers.
    pub tx_id: TxId,
    /// Where the request came from, as the server saw it; never a v4-mapped IPv6 address.
    pub address: SocketAddr,
}

/// Tells whether a datagram is STUN by its first 20 bytes, as the classifier of the one UDP socket
/// does; the message may still be malformed or of any method.
pub fn is_stun(datagram: &[u8]) -> bool {
    datagram.len() >= HEADER_LEN && datagram[0] & 0xc0 == 0 && datagram[4..8] == COOKIE
}

/// A Binding request: header, SOFTWARE "tailnode", FINGERPRINT. Exactly this layout: relays answer
/// nothing else, and some test it in the kernel at fixed offsets.
pub fn request(tx_id: TxId) -> [u8; REQUEST_LEN] {
    let mut bytes = [0; REQUEST_LEN];
    bytes[..2].copy_from_slice(&TYPE_REQUEST.to_be_bytes());
    bytes[2..4].copy_from_slice(&20u16.to_be_bytes());
    bytes[4..8].copy_from_slice(&COOKIE);
    bytes[8..20].copy_from_slice(&tx_id);
    bytes[20..22].copy_from_slice(&ATTR_SOFTWARE.to_be_bytes());
    bytes[22..24].copy_from_slice(&8u16.to_be_bytes());
    bytes[24..32].copy_from_slice(SOFTWARE);
    let crc = fingerprint(&bytes[..32]);
    bytes[32..34].copy_from_slice(&ATTR_FINGERPRINT.to_be_bytes());
    bytes[34..36].copy_from_slice(&4u16.to_be_bytes());
    bytes[36..40].copy_from_slice(&crc.to_be_bytes());
    bytes
}

/// Reads a Binding success response. XOR-MAPPED-ADDRESS (old type too; the last one counts) goes
/// before MAPPED-ADDRESS; every other attribute is skipped, and bytes behind the announced length
/// are ignored. The address is taken as it is: whether it can be an endpoint is the caller's to say.
///
/// # Errors
/// [`Error`], by the order of its variants.
pub fn parse_response(datagram: &[u8]) -> Result<Response, Error> {
    let message = Message::parse(datagram)?;
    if message.kind != TYPE_SUCCESS {
        return Err(Error::NotSuccess);
    }
    let (mut xored, mut plain) = (None, None);
    for attribute in message.attributes()? {
        let (kind, value) = attribute?;
        match kind {
            ATTR_XOR_MAPPED_ADDRESS | ATTR_XOR_MAPPED_ADDRESS_OLD => {
                xored = Some(read_address(value, Some(&message.tx_id))?);
            }
            ATTR_MAPPED_ADDRESS => plain = Some(read_address(value, None)?),
            _ => {}
        }
    }
    let address = xored.or(plain).ok_or(Error::Malformed)?;
    Ok(Response {
        tx_id: message.tx_id,
        address,
    })
}

/// The bytes of one answer, 32 for an IPv4 client and 44 for an IPv6 one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    bytes: [u8; ANSWER_LEN_MAX],
    len: usize,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The server: the answer to a Binding request of a node, to be sent to `from` from the address and
/// port the request came to; `None` for everything else, which is to be dropped and counted. An
/// IPv4 client is answered in family 1 even where a dual-stack socket saw it as v4-mapped.
pub fn respond(datagram: &[u8], from: SocketAddr) -> Option<Answer> {
    let message = Message::parse(datagram).ok()?;
    let fingerprint_at = datagram.len().checked_sub(FINGERPRINT_LEN)?;
    let (mut software, mut last) = (false, 0);
    for attribute in message.attributes().ok()? {
        let (kind, value) = attribute.ok()?;
        software |= kind == ATTR_SOFTWARE && value == SOFTWARE;
        last = kind;
    }
    let (body, tail) = datagram.split_at(fingerprint_at);
    let mut wanted = [0x80, 0x28, 0x00, 0x04, 0, 0, 0, 0];
    wanted[4..].copy_from_slice(&fingerprint(body).to_be_bytes());
    let ours = message.kind == TYPE_REQUEST && software && last == ATTR_FINGERPRINT;
    (ours && tail == wanted).then(|| answer(&message.tx_id, from))
}

/// As [`respond`], but for any valid Binding request: for debugging with ordinary tools only,
/// because it lets anyone bounce packets off the relay.
pub fn respond_to_any(datagram: &[u8], from: SocketAddr) -> Option<Answer> {
    let message = Message::parse(datagram).ok()?;
    let valid = message.kind == TYPE_REQUEST && message.attributes().ok()?.all(|a| a.is_ok());
    valid.then(|| answer(&message.tx_id, from))
}

/// A message whose header has been checked.
struct Message<'a> {
    kind: u16,
    tx_id: TxId,
    attributes_len: usize,
    rest: &'a [u8],
}

impl<'a> Message<'a> {
    fn parse(datagram: &'a [u8]) -> Result<Self, Error> {
        if !is_stun(datagram) {
            return Err(Error::NotStun);
        }
        let (header, rest) = datagram.split_at(HEADER_LEN);
        let mut tx_id = [0; 12];
        tx_id.copy_from_slice(&header[8..]);
        Ok(Self {
            kind: be16(header),
            tx_id,
            attributes_len: usize::from(be16(&header[2..])),
            rest,
        })
    }

    fn attributes(&self) -> Result<Attributes<'a>, Error> {
        let bytes = self.rest.get(..self.attributes_len);
        bytes.map(Attributes).ok_or(Error::Malformed)
    }
}

/// Walks type, length and value, each value padded to four bytes; ends after the first error.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.0);
        if bytes.len() < 4 {
            return Some(Err(Error::Malformed));
        }
        let (kind, len) = (be16(bytes), usize::from(be16(&bytes[2..])));
        let Some(rest) = bytes.get(4 + len.next_multiple_of(4)..) else {
            return Some(Err(Error::Malformed));
        };
        self.0 = rest;
        Some(Ok((kind, &bytes[4..4 + len])))
    }
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn fingerprint(covered: &[u8]) -> u32 {
    crc32fast::hash(covered) ^ FINGERPRINT_XOR
}

/// Reads `0, family, port, address`; with a transaction id, port and address are XORed.
fn read_address(value: &[u8], xor: Option<&TxId>) -> Result<SocketAddr, Error> {
    if value.len() < 8 {
        return Err(Error::Malformed);
    }
    let mut mask = [0; 16];
    let mut port = be16(&value[2..]);
    if let Some(tx_id) = xor {
        mask[..4].copy_from_slice(&COOKIE);
        mask[4..].copy_from_slice(tx_id);
        port ^= COOKIE_PORT;
    }
    let ip = match (value[1], value.len()) {
        (FAMILY_V4, _) => {
            let mut octets = [0; 4];
            octets.copy_from_slice(&value[4..8]);
            IpAddr::from(Ipv4Addr::from(
                u32::from_be_bytes(octets)
                    ^ u32::from_be_bytes([mask[0], mask[1], mask[2], mask[3]]),
            ))
        }
        (FAMILY_V6, 20..) => {
            let mut octets = [0; 16];
            octets.copy_from_slice(&value[4..20]);
            let bits = u128::from_be_bytes(octets) ^ u128::from_be_bytes(mask);
            IpAddr::from(Ipv6Addr::from(bits)).to_canonical()
        }
        _ => return Err(Error::Malformed),
    };
    Ok(SocketAddr::new(ip, port))
}

fn answer(tx_id: &TxId, from: SocketAddr) -> Answer {
    let mut bytes = [0; ANSWER_LEN_MAX];
    let mut mask = [0; 16];
    mask[..4].copy_from_slice(&COOKIE);
    mask[4..].copy_from_slice(tx_id);
    let (family, address_len) = match from.ip().to_canonical() {
        IpAddr::V4(ip) => {
            bytes[28..32].copy_from_slice(&ip.octets());
            (FAMILY_V4, 4u8)
        }
        IpAddr::V6(ip) => {
            bytes[28..44].copy_from_slice(&ip.octets());
            (FAMILY_V6, 16)
        }
    };
    let len = 28 + usize::from(address_len);
    bytes[..2].copy_from_slice(&TYPE_SUCCESS.to_be_bytes());
    bytes[3] = 8 + address_len;
    bytes[4..20].copy_from_slice(&mask);
    bytes[20..22].copy_from_slice(&ATTR_XOR_MAPPED_ADDRESS.to_be_bytes());
    bytes[23] = 4 + address_len;
    bytes[25] = family;
    bytes[26..28].copy_from_slice(&(from.port() ^ COOKIE_PORT).to_be_bytes());
    for (byte, mask) in bytes[28..len].iter_mut().zip(mask) {
        *byte ^= mask;
    }
    Answer { bytes, len }
}

#[cfg(test)]
mod tests;
