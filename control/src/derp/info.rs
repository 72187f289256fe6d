//! ClientInfo and ServerInfo: one JSON object each way, sealed in a NaCl box.
//!
//! The box is `crypto_box` (X25519, HSalsa20, XSalsa20-Poly1305) with a random 24-byte nonce in
//! front and its 16-byte tag first. ClientInfo is sealed by the client's node key to the relay's
//! key and so proves possession of the former; ServerInfo goes the other way.

use crypto_box::aead::Aead as _;
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use super::PROTOCOL_VERSION;
use super::frame::{self, FrameType};
use crate::key::{NodePrivate, NodePublic, parse_hex};

/// Length of a box's nonce in bytes.
pub const NONCE_LEN: usize = 24;

/// Why an info frame was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InfoError {
    /// Shorter than key, nonce and tag.
    #[error("the info frame is too short")]
    Short,
    /// The client's key is all zero.
    #[error("the client's key is all zero")]
    ZeroKey,
    /// The box does not open: sealed to another key, or damaged.
    #[error("the info frame's box does not open with these keys")]
    Box,
    /// The plain text is not the JSON it has to be.
    #[error("the info frame's JSON is not valid")]
    Json,
}

/// What a client says of itself; fields in the order of derp_client.go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ClientInfo {
    /// Proves that the client is a relay of the same region. Left out when there is none: relays
    /// refuse an empty one.
    #[serde(
        rename = "meshKey",
        serialize_with = "hex",
        skip_serializing_if = "Option::is_none"
    )]
    pub mesh_key: Option<[u8; 32]>,
    /// The protocol version; relays ignore it.
    pub version: i64,
    /// The client answers Pings.
    #[serde(rename = "CanAckPings")]
    pub can_ack_pings: bool,
    /// The client is a monitoring probe.
    #[serde(rename = "IsProber", skip_serializing_if = "std::ops::Not::not")]
    pub is_prober: bool,
}

impl ClientInfo {
    /// What a node says.
    pub fn node() -> Self {
        Self {
            version: i64::from(PROTOCOL_VERSION),
            can_ack_pings: true,
            ..Self::default()
        }
    }

    /// The JSON text.
    pub fn to_json(&self) -> Vec<u8> {
        json(self)
    }

    /// Reads the JSON text as derper does: keys in any case, unknown ones ignored, `null` for
    /// defaults, nothing behind the object.
    ///
    /// # Errors
    /// [`InfoError::Json`], also for a mesh key that is not 64 hex digits.
    pub fn from_json(text: &[u8]) -> Result<Self, InfoError> {
        let mut info = Self::default();
        for (name, value) in members(text)? {
            match name.as_str() {
                "meshkey" => {
                    let text = value.as_str().ok_or(InfoError::Json)?;
                    info.mesh_key = Some(parse_hex(text).map_err(|_| InfoError::Json)?);
                }
                "version" => info.version = value.as_i64().ok_or(InfoError::Json)?,
                "canackpings" => info.can_ack_pings = value.as_bool().ok_or(InfoError::Json)?,
                "isprober" => info.is_prober = value.as_bool().ok_or(InfoError::Json)?,
                "appname" if !value.is_string() => return Err(InfoError::Json),
                _ => {}
            }
        }
        Ok(info)
    }
}

/// What a relay says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ServerInfo {
    /// The protocol version; clients ignore it.
    pub version: i64,
    /// SendPacket bytes per second the relay wants at most; 0 is no limit.
    #[serde(rename = "TokenBucketBytesPerSecond", skip_serializing_if = "is_zero")]
    pub bytes_per_second: u64,
    /// The burst that goes with it, in bytes.
    #[serde(rename = "TokenBucketBytesBurst", skip_serializing_if = "is_zero")]
    pub bytes_burst: u64,
}

impl ServerInfo {
    /// What a relay without limits says.
    pub fn relay() -> Self {
        Self {
            version: i64::from(PROTOCOL_VERSION),
            ..Self::default()
        }
    }

    /// The JSON text.
    pub fn to_json(&self) -> Vec<u8> {
        json(self)
    }

    /// Reads the JSON text leniently: a member of another type than expected is ignored, because
    /// nothing in it is needed to use the relay.
    ///
    /// # Errors
    /// [`InfoError::Json`] when it is no JSON object.
    pub fn from_json(text: &[u8]) -> Result<Self, InfoError> {
        let mut info = Self::default();
        for (name, value) in members(text)? {
            match name.as_str() {
                "version" => info.version = value.as_i64().unwrap_or(0),
                "tokenbucketbytespersecond" => info.bytes_per_second = value.as_u64().unwrap_or(0),
                "tokenbucketbytesburst" => info.bytes_burst = value.as_u64().unwrap_or(0),
                _ => {}
            }
        }
        Ok(info)
    }
}

fn json(info: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(info).expect("plain fields always serialise")
}

fn hex<S: Serializer>(key: &Option<[u8; 32]>, serializer: S) -> Result<S::Ok, S::Error> {
    let text = key.map(|key| NodePublic(key).to_hex());
    text.serialize(serializer)
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// The non-null members of a JSON object, names in lower case.
fn members(text: &[u8]) -> Result<Vec<(String, Value)>, InfoError> {
    let object: Option<Map<String, Value>> =
        serde_json::from_slice(text).map_err(|_| InfoError::Json)?;
    Ok(object
        .into_iter()
        .flatten()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .collect())
}

fn pair(private: &NodePrivate, public: &NodePublic) -> SalsaBox {
    SalsaBox::new(
        &PublicKey::from_bytes(public.0),
        &SecretKey::from_bytes(*private.as_bytes()),
    )
}

fn seal(
    private: &NodePrivate,
    public: &NodePublic,
    nonce: [u8; NONCE_LEN],
    plain: &[u8],
) -> Vec<u8> {
    pair(private, public)
        .encrypt(&nonce.into(), plain)
        .expect("sealing a short text in memory cannot fail")
}

fn open(
    private: &NodePrivate,
    public: &NodePublic,
    nonce_and_box: &[u8],
) -> Result<Vec<u8>, InfoError> {
    let (nonce, sealed) = nonce_and_box
        .split_first_chunk::<NONCE_LEN>()
        .ok_or(InfoError::Short)?;
    pair(private, public)
        .decrypt(&(*nonce).into(), sealed)
        .map_err(|_| InfoError::Box)
}

/// Appends a ClientInfo frame. `nonce` has to be random.
pub fn put_client_info(
    out: &mut Vec<u8>,
    private: &NodePrivate,
    server: &NodePublic,
    nonce: [u8; NONCE_LEN],
    info: &ClientInfo,
) {
    let sealed = seal(private, server, nonce, &info.to_json());
    let key = private.public();
    frame::put(out, FrameType::CLIENT_INFO, &[&key.0, &nonce, &sealed]);
}

/// Opens a ClientInfo body with the relay's key.
///
/// # Errors
/// [`InfoError`]; each means that the connection is to be closed.
pub fn open_client_info(
    private: &NodePrivate,
    body: &[u8],
) -> Result<(NodePublic, ClientInfo), InfoError> {
    let (key, rest) = frame::split_key(body).ok_or(InfoError::Short)?;
    if key.is_zero() {
        return Err(InfoError::ZeroKey);
    }
    let info = ClientInfo::from_json(&open(private, &key, rest)?)?;
    Ok((key, info))
}

/// Appends a ServerInfo frame. `nonce` has to be random.
pub fn put_server_info(
    out: &mut Vec<u8>,
    private: &NodePrivate,
    client: &NodePublic,
    nonce: [u8; NONCE_LEN],
    info: &ServerInfo,
) {
    let sealed = seal(private, client, nonce, &info.to_json());
    frame::put(out, FrameType::SERVER_INFO, &[&nonce, &sealed]);
}

/// Opens a ServerInfo body with the client's key.
///
/// # Errors
/// [`InfoError`].
pub fn open_server_info(
    private: &NodePrivate,
    server: &NodePublic,
    body: &[u8],
) -> Result<ServerInfo, InfoError> {
    ServerInfo::from_json(&open(private, server, body)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derp::frame::HEADER_LEN;
    use crate::derp::testing::{live, vectors};

    fn counting(from: u8) -> [u8; NONCE_LEN] {
        std::array::from_fn(|i| from + u8::try_from(i).unwrap())
    }

    #[test]
    fn the_published_boxes_are_made_and_opened() {
        let v = vectors();
        let (a, server) = (v.private("node_a"), v.private("derp_server"));
        let mut out = Vec::new();
        put_client_info(
            &mut out,
            &a,
            &server.public(),
            counting(0),
            &ClientInfo::node(),
        );
        assert_eq!(out, v.derp("client_info_frame"));
        assert_eq!(
            open_client_info(&server, &out[HEADER_LEN..]),
            Ok((a.public(), ClientInfo::node()))
        );
        out.clear();
        put_server_info(
            &mut out,
            &server,
            &a.public(),
            counting(0x80),
            &ServerInfo::relay(),
        );
        assert_eq!(out, v.derp("server_info_frame"));
        assert_eq!(
            open_server_info(&a, &server.public(), &out[HEADER_LEN..]),
            Ok(ServerInfo::relay())
        );
        let mesh = v.derp("client_info_mesh_frame");
        let (_, info) = open_client_info(&server, &mesh[HEADER_LEN..]).unwrap();
        assert_eq!(info.mesh_key, Some(v.mesh_key()));
        assert_eq!(info.version, 2);
    }

    #[test]
    fn every_recorded_info_opens_to_its_plain_text() {
        let mut opened = 0;
        for session in live("derp-session").sessions() {
            let client: NodePrivate = session.key("client_private");
            let server = NodePublic(session.bytes("server_public").try_into().unwrap());
            for frame in session.frames("ClientInfo") {
                // The box's shared key is the same from both ends, so the client's half opens it.
                let (key, rest) = frame::split_key(&frame[HEADER_LEN..]).unwrap();
                assert_eq!(key, client.public());
                let plain = open(&client, &server, rest).unwrap();
                ClientInfo::from_json(&plain).unwrap();
                opened += 1;
            }
            for frame in session.frames("ServerInfo") {
                let plain = open(&client, &server, &frame[HEADER_LEN..]).unwrap();
                assert_eq!(plain, session.text("server_info_plain").as_bytes());
                assert_eq!(plain, ServerInfo::relay().to_json());
                opened += 1;
            }
        }
        for session in live("tailscaled-as-client").sessions() {
            let relay: NodePrivate = session.key("relay_private");
            for frame in session.frames("ClientInfo") {
                let (_, info) = open_client_info(&relay, &frame[HEADER_LEN..]).unwrap();
                assert_eq!(info, ClientInfo::node());
                opened += 1;
            }
        }
        assert_eq!(opened, 13);
    }

    #[test]
    fn a_box_for_another_relay_or_a_damaged_one_does_not_open() {
        let v = vectors();
        let frame = v.derp("client_info_frame");
        assert_eq!(
            open_client_info(&v.private("node_b"), &frame[HEADER_LEN..]),
            Err(InfoError::Box)
        );
        let server = v.private("derp_server");
        for at in HEADER_LEN..frame.len() {
            let mut damaged = frame.clone();
            damaged[at] ^= 4;
            assert!(open_client_info(&server, &damaged[HEADER_LEN..]).is_err());
        }
        for len in 0..frame.len() - HEADER_LEN {
            assert!(open_client_info(&server, &frame[HEADER_LEN..][..len]).is_err());
        }
        let mut zero = frame;
        zero[HEADER_LEN..HEADER_LEN + 32].fill(0);
        assert_eq!(
            open_client_info(&server, &zero[HEADER_LEN..]),
            Err(InfoError::ZeroKey)
        );
    }

    #[test]
    fn client_info_json_is_judged_as_derper_judges_it() {
        let good = [
            r#"{"version":2,"CanAckPings":true}"#,
            "null",
            "{}",
            r#"{"VERSION":99,"canackpings":false,"new":[1]}"#,
            r#"{"AppName":"x","IsProber":true}"#,
            r#"{"meshKey":null}"#,
        ];
        for text in good {
            assert!(ClientInfo::from_json(text.as_bytes()).is_ok(), "{text}");
        }
        let bad = [
            "",
            r#"{"version":"2"}"#,
            r#"{"version":2.0}"#,
            r#"{"meshKey":""}"#,
            r#"{"meshKey":"12"}"#,
            r#"{"version":2} x"#,
            r#"{"CanAckPings":1}"#,
            "[]",
        ];
        for text in bad {
            assert_eq!(
                ClientInfo::from_json(text.as_bytes()),
                Err(InfoError::Json),
                "{text}"
            );
        }
    }

    #[test]
    fn server_info_json_carries_the_rate_a_relay_asks_for() {
        let asked = ServerInfo {
            version: 2,
            bytes_per_second: 50_000,
            bytes_burst: 70_000,
        };
        assert_eq!(ServerInfo::from_json(&asked.to_json()), Ok(asked));
        let odd = br#"{"version":77,"zzz":[1,2]}"#;
        assert_eq!(ServerInfo::from_json(odd).unwrap().version, 77);
    }
}
