//! The primitives, and the hash and chaining key of a running handshake (WireGuard paper §5.4; Noise
//! specification §5.2, where it is called so). The control side's channel to coordination stands on it too.
//!
//! What is kept is overwritten when it is dropped: keys and shared secrets by their types, the
//! states of BLAKE2s and ChaCha20-Poly1305 by the `zeroize` features of their crates. Not so what
//! HKDF and its HMAC have on the stack while they run: the padded key, the key drawn from the input
//! and the blocks of the output stay there until something else is written over them. Their crates
//! do not erase these, and no crate can promise it for every copy that the compiler makes.

use blake2::digest::{FixedOutput as _, KeyInit as _, Update as _};
use blake2::{Blake2s256, Blake2sMac};
use chacha20poly1305::aead::AeadInOut as _;
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce, Tag};
use hkdf::SimpleHkdf;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize as _, Zeroizing};

use super::{Error, KEY_LEN, MAC_LEN, TAG_LEN};

/// Paper §5.4: `CONSTRUCTION`.
const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
/// Paper §5.4: `IDENTIFIER`.
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// `HASH(a || b)`.
pub(super) fn hash(a: &[u8], b: &[u8]) -> [u8; KEY_LEN] {
    let mut hasher = Blake2s256::default();
    hasher.update(a);
    hasher.update(b);
    hasher.finalize_fixed().into()
}

/// `MAC(key, a || b)`: keyed BLAKE2s with 16 bytes of output. The key has 1 to 32 bytes.
pub(super) fn mac(key: &[u8], a: &[u8], b: &[u8]) -> [u8; MAC_LEN] {
    type Mac = Blake2sMac<blake2::digest::consts::U16>;
    let mut mac = Mac::new_from_slice(key).expect("keys have 16 or 32 bytes");
    mac.update(a);
    mac.update(b);
    mac.finalize_fixed().into()
}

/// `DH(private, public)`.
///
/// # Errors
/// [`Error::LowOrder`] if the public key is of low order: the secret would be known to everybody.
pub fn dh(
    private: &StaticSecret,
    public: &[u8; KEY_LEN],
) -> Result<Zeroizing<[u8; KEY_LEN]>, Error> {
    let shared = private.diffie_hellman(&PublicKey::from(*public));
    if shared.was_contributory() {
        Ok(Zeroizing::new(shared.to_bytes()))
    } else {
        Err(Error::LowOrder)
    }
}

/// Hash `H` and chaining key `C` of a Noise handshake over X25519, ChaCha20-Poly1305 and BLAKE2s.
pub struct SymmetricState {
    hash: [u8; KEY_LEN],
    chain: Zeroizing<[u8; KEY_LEN]>,
}

impl Drop for SymmetricState {
    fn drop(&mut self) {
        self.hash.zeroize();
    }
}

/// The hash every handshake with this responder starts from: construction, identifier and the
/// responder's static public key.
pub(super) fn start_hash(responder: &[u8; KEY_LEN]) -> [u8; KEY_LEN] {
    let construction = hash(CONSTRUCTION, &[]);
    hash(&hash(&construction, IDENTIFIER), responder)
}

impl SymmetricState {
    /// A handshake of this name, which is longer than a hash and so is hashed and not padded. The caller
    /// mixes in the prologue and the keys known beforehand.
    #[must_use]
    pub fn new(name: &[u8]) -> SymmetricState {
        let hash = hash(name, &[]);
        SymmetricState {
            hash,
            chain: Zeroizing::new(hash),
        }
    }

    /// Starts a handshake from the responder's [`start_hash`] with the initiator's ephemeral key,
    /// which is the first thing of every handshake.
    pub(super) fn start(start_hash: &[u8; KEY_LEN], ephemeral: &[u8; KEY_LEN]) -> SymmetricState {
        let mut transcript = SymmetricState::new(CONSTRUCTION);
        transcript.hash = *start_hash;
        transcript.mix_public(ephemeral);
        transcript
    }

    /// A copy to go on from: a bad message must not touch the state of the handshake it claims to
    /// belong to.
    pub(super) fn fork(&self) -> SymmetricState {
        SymmetricState {
            hash: self.hash,
            chain: self.chain.clone(),
        }
    }

    /// Hash and chaining key, to be kept elsewhere. The hash is that of all that was said: the same at both
    /// ends, and of no other handshake.
    #[must_use]
    pub fn to_parts(&self) -> ([u8; KEY_LEN], Zeroizing<[u8; KEY_LEN]>) {
        (self.hash, self.chain.clone())
    }

    /// The opposite of [`SymmetricState::to_parts`].
    pub(super) fn from_parts(
        hash: [u8; KEY_LEN],
        chain: Zeroizing<[u8; KEY_LEN]>,
    ) -> SymmetricState {
        SymmetricState { hash, chain }
    }

    /// What both ends know: a prologue, a public key, what was sealed.
    pub fn mix_hash(&mut self, data: &[u8]) {
        self.hash = hash(&self.hash, data);
    }

    /// `KDFn(C, secret)`: the first output becomes the chaining key, the others are given. It is
    /// HKDF without info (RFC 5869) over HMAC-BLAKE2s.
    fn kdf<const LEN: usize>(&mut self, secret: &[u8]) -> Zeroizing<[u8; LEN]> {
        let mut out = Zeroizing::new([0; LEN]);
        SimpleHkdf::<Blake2s256>::new(Some(&*self.chain), secret)
            .expand(&[], &mut *out)
            .expect("at most three hashes are asked for, 255 can be had");
        self.chain.copy_from_slice(&out[..KEY_LEN]);
        out
    }

    /// An ephemeral public key: into the hash and into the chaining key.
    pub(super) fn mix_public(&mut self, ephemeral: &[u8; KEY_LEN]) {
        self.mix_hash(ephemeral);
        self.kdf::<32>(ephemeral);
    }

    /// A shared secret after which nothing is sealed.
    pub fn mix_secret(&mut self, secret: &[u8; KEY_LEN]) {
        self.kdf::<32>(secret);
    }

    /// A shared secret; gives the key for what follows.
    #[must_use]
    pub fn mix_key(&mut self, secret: &[u8; KEY_LEN]) -> Zeroizing<[u8; KEY_LEN]> {
        output(1, &*self.kdf::<64>(secret))
    }

    /// The pre-shared key (all zero where there is none); gives the key for what follows.
    pub(super) fn mix_preshared(&mut self, key: &[u8; KEY_LEN]) -> Zeroizing<[u8; KEY_LEN]> {
        let out = self.kdf::<96>(key);
        self.mix_hash(&*output(1, &*out));
        output(2, &*out)
    }

    /// Seals all but the last 16 bytes of `buffer` in place and puts the tag there. Every
    /// handshake key seals once, so the counter is always 0.
    ///
    /// # Panics
    /// If the buffer is shorter than a tag.
    pub fn seal(&mut self, key: &[u8; KEY_LEN], buffer: &mut [u8]) {
        let (text, tag) = buffer.split_at_mut(buffer.len() - TAG_LEN);
        let sealed = ChaCha20Poly1305::new(&Key::from(*key))
            .encrypt_inout_detached(&Nonce::default(), &self.hash, (&mut *text).into())
            .expect("a handshake payload is far below the cipher's limit");
        tag.copy_from_slice(&sealed);
        self.mix_hash(buffer);
    }

    /// Opens `buffer` in place; its last 16 bytes are the tag.
    ///
    /// # Errors
    /// [`Error::Authentication`]; the plaintext is not written then.
    ///
    /// # Panics
    /// If the buffer is shorter than a tag.
    pub fn open(&mut self, key: &[u8; KEY_LEN], buffer: &mut [u8]) -> Result<(), Error> {
        let mixed = hash(&self.hash, buffer);
        let (text, tag) = buffer.split_at_mut(buffer.len() - TAG_LEN);
        let tag = Tag::try_from(&*tag).map_err(|_| Error::Length)?;
        ChaCha20Poly1305::new(&Key::from(*key))
            .decrypt_inout_detached(&Nonce::default(), &self.hash, text.into(), &tag)
            .map_err(|_| Error::Authentication)?;
        self.hash = mixed;
        Ok(())
    }

    /// The keys of both directions: of what the initiator sends, of what the responder sends
    /// (paper §5.4.5).
    #[must_use]
    pub fn split(mut self) -> [Zeroizing<[u8; KEY_LEN]>; 2] {
        let out = self.kdf::<64>(&[]);
        [0, 1].map(|n| output(n, &*out))
    }
}

/// Output `n` of a KDF, from 0.
fn output(n: usize, of: &[u8]) -> Zeroizing<[u8; KEY_LEN]> {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    key.copy_from_slice(&of[n * KEY_LEN..][..KEY_LEN]);
    key
}
