//! Cookies (WireGuard paper §5.3, §5.4.4, §5.4.7): under load a responder makes senders prove that
//! they receive at the address they send from.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use chacha20poly1305::aead::{AeadInOut as _, KeyInit as _};
use chacha20poly1305::{Key, Tag, XChaCha20Poly1305, XNonce};
use rand::CryptoRng;
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromZeros as _, IntoBytes as _};
use zeroize::{Zeroize as _, Zeroizing};

use super::message::{CookieReply, KIND_COOKIE_REPLY, check_mac2, view};
use super::symmetric::mac;
use super::{COOKIE_REPLY_LEN, Error, KEY_LEN, LocalKeys, MAC_LEN, Remote};

/// Paper §5.4.7: a responder's secret changes this often, and an initiator forgets a cookie of this
/// age (§5.4.4).
pub(super) const COOKIE_LIFE: Duration = Duration::from_secs(120);

/// A cookie: 16 bytes that only the receiver at one address and port can know.
#[derive(Clone, PartialEq, Eq)]
pub struct Cookie(pub(super) [u8; MAC_LEN]);

impl Drop for Cookie {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Opens a cookie reply to the message that carried `mac1_sent`.
///
/// # Errors
/// Length or type are wrong, or [`Error::Authentication`]: it was not made by the peer, or answers
/// another message.
pub fn consume_cookie_reply(
    remote: &Remote,
    message: &[u8],
    mac1_sent: &[u8; MAC_LEN],
) -> Result<Cookie, Error> {
    let reply: &CookieReply = view(message, KIND_COOKIE_REPLY)?;
    let (sealed, tag) = reply
        .sealed_cookie
        .split_first_chunk::<MAC_LEN>()
        .ok_or(Error::Length)?;
    let tag = Tag::try_from(tag).map_err(|_| Error::Length)?;
    let mut cookie = Cookie(*sealed);
    XChaCha20Poly1305::new(&Key::from(remote.labels.cookie))
        .decrypt_inout_detached(
            &XNonce::from(reply.nonce),
            mac1_sent,
            cookie.0.as_mut_slice().into(),
            &tag,
        )
        .map_err(|_| Error::Authentication)?;
    Ok(cookie)
}

/// What one end of a handshake remembers of cookies: MAC1 of its last message to the peer, and the
/// peer's cookie while it is good.
#[derive(Debug, Default)]
pub struct CookieStore {
    last_mac1: Option<[u8; MAC_LEN]>,
    cookie: Option<(Cookie, Instant)>,
}

impl CookieStore {
    /// Remembers MAC1 of a message that is sent now.
    pub fn sent(&mut self, mac1: &[u8; MAC_LEN]) {
        self.last_mac1 = Some(*mac1);
    }

    /// Takes a cookie reply to the last message. Each message is good for one cookie.
    ///
    /// # Errors
    /// Those of [`consume_cookie_reply`]; [`Error::NoCookieExpected`] if nothing was sent, or it
    /// was answered before.
    pub fn receive(&mut self, now: Instant, remote: &Remote, reply: &[u8]) -> Result<(), Error> {
        let last_mac1 = self.last_mac1.as_ref().ok_or(Error::NoCookieExpected)?;
        let cookie = consume_cookie_reply(remote, reply, last_mac1)?;
        self.cookie = Some((cookie, now));
        self.last_mac1 = None;
        Ok(())
    }

    /// The whole state, with the cookie's age.
    #[must_use]
    pub fn export(&self, now: Instant) -> CookieStoreState {
        CookieStoreState {
            last_mac1: self.last_mac1,
            cookie: self.cookie.as_ref().map(|(cookie, since)| {
                let age = now.saturating_duration_since(*since);
                (Zeroizing::new(cookie.0), age)
            }),
        }
    }

    /// The opposite of [`CookieStore::export`]. A cookie older than an instant can say is
    /// dropped.
    #[must_use]
    pub fn import(now: Instant, state: &CookieStoreState) -> CookieStore {
        let cookie = state.cookie.as_ref().and_then(|(cookie, age)| {
            let since = now.checked_sub(*age)?;
            Some((Cookie(**cookie), since))
        });
        CookieStore {
            last_mac1: state.last_mac1,
            cookie,
        }
    }

    /// The cookie for the next message's MAC2, unless it is [`COOKIE_LIFE`] old.
    #[must_use]
    pub fn cookie(&self, now: Instant) -> Option<&Cookie> {
        let (cookie, since) = self.cookie.as_ref()?;
        (now.saturating_duration_since(*since) < COOKIE_LIFE).then_some(cookie)
    }
}

/// A [`CookieStore`] as plain data.
#[derive(Clone, Default)]
#[cfg_attr(test, derive(PartialEq))]
pub struct CookieStoreState {
    /// MAC1 of the last message.
    pub last_mac1: Option<[u8; MAC_LEN]>,
    /// The cookie and its age.
    pub cookie: Option<(Zeroizing<[u8; MAC_LEN]>, Duration)>,
}

/// The responder's side: makes and checks cookies from a secret that changes.
#[derive(Default)]
pub(super) struct CookieChecker {
    secret: Zeroizing<[u8; KEY_LEN]>,
    /// When the secret was made; `None` before the first.
    since: Option<Instant>,
}

impl CookieChecker {
    fn cookie(&mut self, now: Instant, from: SocketAddr, rng: &mut impl CryptoRng) -> Cookie {
        let fresh = self
            .since
            .is_some_and(|since| now.saturating_duration_since(since) < COOKIE_LIFE);
        if !fresh {
            rng.fill_bytes(&mut *self.secret);
            self.since = Some(now);
        }
        // Address and port in network byte order, as the kernel and wireguard-go do: the paper's
        // text says address, and the port tells apart who shares one behind a NAT.
        let port = from.port().to_be_bytes();
        Cookie(match from.ip() {
            IpAddr::V4(ip) => mac(&*self.secret, &ip.octets(), &port),
            IpAddr::V6(ip) => mac(&*self.secret, &ip.octets(), &port),
        })
    }

    /// True if MAC2 of a message proves that its sender got our cookie where it sends from.
    pub(super) fn check(
        &mut self,
        now: Instant,
        from: SocketAddr,
        message: &[u8],
        rng: &mut impl CryptoRng,
    ) -> bool {
        check_mac2(&self.cookie(now, from, rng), message)
    }

    /// Writes a cookie reply to the message with this sender index and MAC1.
    pub(super) fn reply(
        &mut self,
        now: Instant,
        from: SocketAddr,
        local: &LocalKeys,
        receiver: u32,
        mac1: &[u8; MAC_LEN],
        rng: &mut impl CryptoRng,
        out: &mut [u8; COOKIE_REPLY_LEN],
    ) {
        let mut cookie = self.cookie(now, from, rng);
        let mut reply = CookieReply::new_zeroed();
        reply.kind = U32::new(KIND_COOKIE_REPLY);
        reply.receiver = U32::new(receiver);
        rng.fill_bytes(&mut reply.nonce);
        let tag = XChaCha20Poly1305::new(&Key::from(local.labels.cookie))
            .encrypt_inout_detached(
                &XNonce::from(reply.nonce),
                mac1,
                cookie.0.as_mut_slice().into(),
            )
            .expect("a cookie is far below the cipher's limit");
        let (sealed, room) = reply.sealed_cookie.split_at_mut(MAC_LEN);
        sealed.copy_from_slice(&cookie.0);
        room.copy_from_slice(&tag);
        out.copy_from_slice(reply.as_bytes());
    }
}
