//! Pre-auth keys: what lets a new machine in.
//!
//! A key we make is `rtkey-`, 12 characters that name it, `-`, and 43 characters of secret (32
//! random bytes in base64url). Any other text may serve too, from a file; it is named by the head
//! of its hash. Only the name and SHA-256 of the whole text are stored: the secret has full
//! entropy, so a slow hash would gain nothing (`protocol/coordination-server.md` §3).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use zeroize::Zeroizing;

const HEAD: &str = "rtkey-";
const NAME_LEN: usize = 12;
const SECRET_LEN: usize = 43;

/// What real clients interpret in a key, so that it must not occur in ours.
const FORBIDDEN: &str = "--TL";

/// Random bytes for one key: 9 for the name, 32 for the secret.
pub type KeySeed = Zeroizing<[u8; 41]>;

/// Makes a key's text. A seed in ten million gives none, and another has to be tried.
pub fn make(seed: &KeySeed) -> Option<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(
        HEAD.len() + NAME_LEN + 1 + SECRET_LEN,
    ));
    text.push_str(HEAD);
    URL_SAFE_NO_PAD.encode_string(&seed[..9], &mut text);
    text.push('-');
    URL_SAFE_NO_PAD.encode_string(&seed[9..], &mut text);
    (!text.contains(FORBIDDEN)).then_some(text)
}

/// The name a key is stored and logged under; not secret.
pub fn name(text: &str) -> String {
    let ours = text.strip_prefix(HEAD).filter(|rest| {
        rest.len() == NAME_LEN + 1 + SECRET_LEN
            && rest.is_ascii()
            && rest.as_bytes()[NAME_LEN] == b'-'
    });
    match ours {
        Some(rest) => rest[..NAME_LEN].to_owned(),
        None => {
            let head = hash(text);
            format!("file:{}", URL_SAFE_NO_PAD.encode(&head[..9]))
        }
    }
}

/// SHA-256 of the whole text.
pub fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

/// A stored key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthKey {
    /// Row id.
    pub id: i64,
    /// The key's name.
    pub name: String,
    /// SHA-256 of its text.
    pub hash: [u8; 32],
    /// Lets any number of machines in.
    pub reusable: bool,
    /// Its nodes are forgotten when they stay away.
    pub ephemeral: bool,
    /// Who owns the nodes it lets in, if it gives them no tags.
    pub user: i64,
    /// What it gives them.
    pub tags: Vec<String>,
    /// Has let a machine in.
    pub used: bool,
    /// No good from then on.
    pub expires: Option<OffsetDateTime>,
    /// When it was made.
    pub created: OffsetDateTime,
}

/// What a key somebody presented is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyCheck {
    /// None was presented.
    Absent,
    /// We never made it, or its secret is wrong.
    Unknown,
    /// It was good once.
    Expired,
    /// Single-use, and used.
    Used,
    /// Good: its row and whether it makes ephemeral nodes.
    Valid {
        /// Row id of the key.
        id: i64,
        /// Its nodes are forgotten when they stay away.
        ephemeral: bool,
        /// Who owns them.
        user: i64,
        /// Their tags.
        tags: Vec<String>,
    },
}

impl KeyCheck {
    /// Judges a presented text against what is stored under its name.
    pub fn of(text: &str, stored: Option<&AuthKey>, now: OffsetDateTime) -> Self {
        let Some(key) = stored else {
            return Self::Unknown;
        };
        // Every byte is looked at, whatever the first difference is.
        let presented = hash(text);
        let differences = presented.iter().zip(&key.hash).map(|(a, b)| a ^ b);
        if differences.fold(0, |all, bits| all | bits) != 0 {
            return Self::Unknown;
        }
        if key.expires.is_some_and(|expires| expires <= now) {
            return Self::Expired;
        }
        if key.used && !key.reusable {
            return Self::Used;
        }
        Self::Valid {
            id: key.id,
            ephemeral: key.ephemeral,
            user: key.user,
            tags: key.tags.clone(),
        }
    }

    /// The text the client gets when the key it shows is no good; Headscale's, which clients know.
    pub fn error(&self) -> Option<&'static str> {
        match self {
            Self::Unknown => Some("invalid pre auth key"),
            Self::Expired => Some("authkey expired"),
            Self::Used => Some("authkey already used"),
            Self::Absent | Self::Valid { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: OffsetDateTime = time::macros::datetime!(2026-11-22 05:00 UTC);

    fn stored(text: &str) -> AuthKey {
        AuthKey {
            id: 7,
            name: name(text),
            hash: hash(text),
            reusable: false,
            ephemeral: false,
            user: 1,
            tags: Vec::new(),
            used: false,
            expires: None,
            created: NOW,
        }
    }

    #[test]
    fn keys_have_the_documented_form_and_are_named_by_their_head() {
        let text = make(&Zeroizing::new([0x5a; 41])).unwrap();
        assert_eq!(text.len(), 6 + 12 + 1 + 43);
        assert_eq!(name(&text), text[6..18]);
        assert!(name("some text of a file").starts_with("file:"));
        assert_ne!(name("one"), name("two"));
        // Bytes whose base64url begins with the forbidden text.
        let mut seed = Zeroizing::new([0; 41]);
        let forbidden = URL_SAFE_NO_PAD.decode("--TLAAAA").unwrap();
        seed[9..15].copy_from_slice(&forbidden);
        assert_eq!(make(&seed), None);
    }

    #[test]
    fn a_key_is_worth_what_its_row_says() {
        let key = stored("secret");
        let check = |key: &AuthKey| KeyCheck::of("secret", Some(key), NOW);
        let valid = KeyCheck::Valid {
            id: 7,
            ephemeral: false,
            user: 1,
            tags: Vec::new(),
        };
        assert_eq!(check(&key), valid);
        assert_eq!(KeyCheck::of("secrex", Some(&key), NOW), KeyCheck::Unknown);
        assert_eq!(KeyCheck::of("secret", None, NOW), KeyCheck::Unknown);
        let used = AuthKey {
            used: true,
            ..key.clone()
        };
        assert_eq!(check(&used), KeyCheck::Used);
        assert_eq!(
            check(&AuthKey {
                reusable: true,
                ..used
            }),
            valid
        );
        let expired = AuthKey {
            expires: Some(NOW),
            ..key
        };
        assert_eq!(check(&expired), KeyCheck::Expired);
    }
}
