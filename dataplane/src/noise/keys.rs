//! What is computed once per key: ours and a peer's.

use std::time::Instant;

use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize as _, ZeroizeOnDrop, Zeroizing};

use super::message::check_mac1;
use super::symmetric::{dh, hash, start_hash};
use super::{Error, KEY_LEN};

/// Paper §5.4.4.
const LABEL_MAC1: &[u8] = b"mac1----";
/// Paper §5.4.7.
const LABEL_COOKIE: &[u8] = b"cookie--";

/// The keys of messages towards a static public key; whoever knows that one knows them.
#[derive(Clone)]
pub(super) struct Labels {
    /// Key of MAC1.
    pub(super) mac1: [u8; KEY_LEN],
    /// Key that cookie replies are sealed with.
    pub(super) cookie: [u8; KEY_LEN],
    /// Hash that a handshake starts from where this is the responder's key.
    pub(super) start: [u8; KEY_LEN],
}

impl Labels {
    fn new(public: &[u8; KEY_LEN]) -> Labels {
        Labels {
            mac1: hash(LABEL_MAC1, public),
            cookie: hash(LABEL_COOKIE, public),
            start: start_hash(public),
        }
    }
}

/// Our static key pair and what follows from it.
pub struct LocalKeys {
    pub(super) private: StaticSecret,
    pub(super) public: [u8; KEY_LEN],
    pub(super) labels: Labels,
}

impl LocalKeys {
    /// Computes the public key and the keys of messages to us.
    #[must_use]
    pub fn new(private: &[u8; KEY_LEN]) -> LocalKeys {
        let private = StaticSecret::from(*private);
        let public = PublicKey::from(&private).to_bytes();
        LocalKeys {
            private,
            public,
            labels: Labels::new(&public),
        }
    }

    /// Our public key.
    #[cfg(feature = "internals")]
    #[must_use]
    pub fn public(&self) -> &[u8; KEY_LEN] {
        &self.public
    }
}

/// The key that ours has replaced: what was made for it counts up to a moment.
pub struct Previous {
    local: LocalKeys,
    until: Instant,
}

impl Previous {
    /// Computes as [`LocalKeys::new`].
    #[must_use]
    pub fn new(private: &[u8; KEY_LEN], until: Instant) -> Previous {
        Previous {
            local: LocalKeys::new(private),
            until,
        }
    }

    /// The key, while it counts.
    #[must_use]
    pub fn at(&self, now: Instant) -> Option<&LocalKeys> {
        (now < self.until).then_some(&self.local)
    }
}

/// The keys of ours that a message may be made for.
#[derive(Clone, Copy)]
pub struct Ours<'a> {
    local: &'a LocalKeys,
    previous: Option<&'a LocalKeys>,
}

impl<'a> Ours<'a> {
    /// Those that count at a moment.
    #[must_use]
    pub fn at(now: Instant, local: &'a LocalKeys, previous: Option<&'a Previous>) -> Ours<'a> {
        Ours {
            local,
            previous: previous.and_then(|previous| previous.at(now)),
        }
    }

    /// The one that messages are made with now.
    #[must_use]
    pub fn local(&self) -> &'a LocalKeys {
        self.local
    }

    /// The one before it.
    #[must_use]
    pub fn previous(&self) -> Option<&'a LocalKeys> {
        self.previous
    }

    /// The key that an initiation or response was made for, by its MAC1.
    ///
    /// # Errors
    /// [`Error::Mac1`] if for none of them, [`Error::Length`] if it is too short for one.
    pub fn addressed(&self, message: &[u8]) -> Result<&'a LocalKeys, Error> {
        match (check_mac1(&self.local.labels.mac1, message), self.previous) {
            (Err(Error::Mac1), Some(previous)) => {
                check_mac1(&previous.labels.mac1, message).map(|()| previous)
            }
            (checked, _) => checked.map(|()| self.local),
        }
    }
}

/// The public key that belongs to a private one.
#[cfg(feature = "internals")]
#[must_use]
pub fn public_key(private: &[u8; KEY_LEN]) -> [u8; KEY_LEN] {
    *LocalKeys::new(private).public()
}

/// A peer's static public key, the preshared key, and what follows from them and our own key.
pub struct Remote {
    pub(super) public: [u8; KEY_LEN],
    /// `DH(ours, theirs)`; none for a key of low order, and when it was erased.
    shared: Option<Zeroizing<[u8; KEY_LEN]>>,
    /// All zero where there is none.
    pub(super) preshared: [u8; KEY_LEN],
    pub(super) labels: Labels,
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.preshared.zeroize();
    }
}

impl ZeroizeOnDrop for Remote {}

impl Remote {
    /// Computes what both static keys share. A public key of low order gives a remote that can
    /// never handshake.
    #[must_use]
    pub fn new(
        local: &LocalKeys,
        public: &[u8; KEY_LEN],
        preshared: Option<&[u8; KEY_LEN]>,
    ) -> Remote {
        Remote {
            public: *public,
            shared: dh(&local.private, public).ok(),
            preshared: preshared.copied().unwrap_or_default(),
            labels: Labels::new(public),
        }
    }

    /// The same peer for another key of ours.
    #[must_use]
    pub fn towards(&self, local: &LocalKeys) -> Remote {
        Remote {
            public: self.public,
            shared: dh(&local.private, &self.public).ok(),
            preshared: self.preshared,
            labels: self.labels.clone(),
        }
    }

    /// The peer's public key.
    #[cfg(feature = "internals")]
    #[must_use]
    pub fn public(&self) -> &[u8; KEY_LEN] {
        &self.public
    }

    /// Erases what both static keys share; the remote can never handshake then.
    pub fn forget_shared(&mut self) {
        self.shared = None;
    }

    /// Changes the preshared key, for handshakes from now on.
    pub fn set_preshared(&mut self, preshared: Option<&[u8; KEY_LEN]>) {
        self.preshared = preshared.copied().unwrap_or_default();
    }

    /// What both static keys share.
    ///
    /// # Errors
    /// [`Error::LowOrder`].
    pub(super) fn shared(&self) -> Result<Zeroizing<[u8; KEY_LEN]>, Error> {
        self.shared.clone().ok_or(Error::LowOrder)
    }

    #[cfg(test)]
    pub(crate) fn has_shared(&self) -> bool {
        self.shared.is_some()
    }
}
