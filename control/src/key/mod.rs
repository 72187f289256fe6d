//! Newtypes for the keys of the field, with their text forms.
//!
//! All are X25519 keys of 32 bytes. Public text is a type prefix and 64 lower-case hex digits
//! (`nodekey:`, `mkey:`, `discokey:`); private text of every type is `privkey:` and 64 digits.
//! Parsing is strict about prefix and length and takes both cases of hex
//! (`protocol/coordination-transport.md` §1, types/key in tailscale/tailscale).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of every key in bytes.
pub const KEY_LEN: usize = 32;

/// Why a key's text was refused. The text itself is not repeated: it may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseKeyError {
    /// The type prefix is not the one wanted.
    #[error("a key of the form {0}<64 hex digits> is wanted")]
    Prefix(&'static str),
    /// After the prefix there are not exactly 64 hex digits.
    #[error("a key has exactly 64 hex digits after its prefix")]
    Hex,
}

/// Parses exactly 64 hex digits.
///
/// # Errors
/// [`ParseKeyError::Hex`] for another length or any other character.
pub fn parse_hex(text: &str) -> Result<[u8; KEY_LEN], ParseKeyError> {
    let digits = text.as_bytes();
    if digits.len() != 2 * KEY_LEN {
        return Err(ParseKeyError::Hex);
    }
    let mut key = [0; KEY_LEN];
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(key)
}

fn digit(c: u8) -> Result<u8, ParseKeyError> {
    match c {
        b'0'..=b'9' => Ok(c - b'0'),
        b'a'..=b'f' => Ok(c - b'a' + 10),
        b'A'..=b'F' => Ok(c - b'A' + 10),
        _ => Err(ParseKeyError::Hex),
    }
}

/// Writes bytes as lower-case hex.
pub fn write_hex(f: &mut impl fmt::Write, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; KEY_LEN]);

        impl $name {
            /// Whether this is the all-zero key, which stands for "none".
            pub fn is_zero(&self) -> bool {
                self.0 == [0; KEY_LEN]
            }

            /// 64 lower-case hex digits without prefix.
            pub fn to_hex(self) -> String {
                let mut text = String::with_capacity(2 * KEY_LEN);
                write_hex(&mut text, &self.0).expect("a String takes every write");
                text
            }

            /// The short form for logs: `[AbCdE]`, the first five characters of the base64.
            pub fn short(&self) -> String {
                use base64::Engine as _;
                let text = base64::engine::general_purpose::STANDARD.encode(self.0);
                format!("[{}]", &text[..5])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($prefix)?;
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.short())
            }
        }

        impl FromStr for $name {
            type Err = ParseKeyError;

            fn from_str(text: &str) -> Result<Self, ParseKeyError> {
                let hex = text.strip_prefix($prefix).ok_or(ParseKeyError::Prefix($prefix))?;
                parse_hex(hex).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! private_key {
    ($(#[$doc:meta])* $name:ident, $public:ident) => {
        $(#[$doc])*
        #[derive(Clone, Zeroize, ZeroizeOnDrop)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// A new key from the operating system's randomness, clamped.
            pub fn generate() -> Self {
                Self::clamped(rand::random())
            }

            /// A key from 32 bytes, random ones for a new key, clamped as every private key is when it is made.
            pub fn clamped(mut bytes: [u8; KEY_LEN]) -> Self {
                bytes[0] &= 248;
                bytes[31] = bytes[31] & 127 | 64;
                Self(bytes)
            }

            /// The secret bytes.
            pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
                &self.0
            }

            /// The public half.
            pub fn public(&self) -> $public {
                $public(PublicKey::from(&StaticSecret::from(self.0)).to_bytes())
            }

            /// The text form, `privkey:` and 64 hex digits; wiped when dropped.
            pub fn to_text(&self) -> zeroize::Zeroizing<String> {
                let mut text = zeroize::Zeroizing::new(String::with_capacity(8 + 2 * KEY_LEN));
                text.push_str("privkey:");
                write_hex(&mut *text, &self.0).expect("a String takes every write");
                text
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}(secret)", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseKeyError;

            fn from_str(text: &str) -> Result<Self, ParseKeyError> {
                let hex = text.strip_prefix("privkey:").ok_or(ParseKeyError::Prefix("privkey:"))?;
                parse_hex(hex).map(Self)
            }
        }
    };
}

public_key! {
    /// A node's WireGuard identity, which is also its DERP address.
    NodePublic, "nodekey:"
}
private_key! {
    /// The private half of a [`NodePublic`].
    NodePrivate, NodePublic
}
public_key! {
    /// A host's identity towards the coordination server, or that server's own.
    MachinePublic, "mkey:"
}
private_key! {
    /// The private half of a [`MachinePublic`].
    MachinePrivate, MachinePublic
}
public_key! {
    /// The key a node's DISCO messages are sealed with.
    DiscoPublic, "discokey:"
}
private_key! {
    /// The private half of a [`DiscoPublic`].
    DiscoPrivate, DiscoPublic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms_round_trip_and_refuse_other_types() {
        let private = NodePrivate::clamped([7; 32]);
        let public = private.public();
        assert_eq!(public.to_string().parse::<NodePublic>().unwrap(), public);
        assert_eq!(
            private.to_text().parse::<NodePrivate>().unwrap().public(),
            public
        );
        assert_eq!(
            public.to_string().parse::<DiscoPublic>(),
            Err(ParseKeyError::Prefix("discokey:"))
        );
        assert_eq!("nodekey:12".parse::<NodePublic>(), Err(ParseKeyError::Hex));
        assert_eq!(
            public
                .to_string()
                .replace("nodekey:", "nodekey:+")
                .parse::<NodePublic>(),
            Err(ParseKeyError::Hex)
        );
    }

    #[test]
    fn a_private_key_never_prints_itself() {
        let private = NodePrivate::clamped([7; 32]);
        assert_eq!(format!("{private:?}"), "NodePrivate(secret)");
    }

    #[test]
    fn the_vector_keys_have_the_published_public_halves() {
        let mut bytes = [0xa1; 32];
        (bytes[0], bytes[31]) = (0xa0, 0x61);
        assert_eq!(
            NodePrivate::clamped(bytes).public().to_hex(),
            "c306fb0ef2bf8b7f93bad98155fa37daec74db0c4cbeda6c6f1dba9d36558252"
        );
    }
}
