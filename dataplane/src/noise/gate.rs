//! The gate that every handshake message from the network passes, cheapest checks first (WireGuard
//! paper §5.3):
//!
//! 1. Length and type.
//! 2. Cookie replies: a limit for all together, because they carry no MAC1 and any shard's session
//!    might be meant.
//! 3. MAC1: the sender knows our public key. It costs about half a microsecond.
//! 4. Load. Messages with a right MAC1 make it, because they lead to Diffie-Hellman computations: an
//!    initiation here and in the shard of its peer, a response only there. [`LOAD_PER_SECOND`] on
//!    average and [`LOAD_BURST`] at once are taken; when there are more, we are under load until a
//!    second has passed without any above that. The kernel and wireguard-go measure the length of
//!    their queue instead, which says the same about the worker behind it: that it does not keep up.
//!    Here the queue is the socket's buffer, whose length nobody tells.
//! 5. Under load only: MAC2, which proves the sender's address, else a cookie reply, while there
//!    are not too many of those, and nothing more; then the limit per source.
//! 6. For an initiation one Diffie-Hellman computation, which says who made it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::CryptoRng;

use super::cookie::Baker;
use super::handshake::peek_checked;
use super::message::{
    CookieReply, Initiation, KIND_COOKIE_REPLY, KIND_INITIATION, KIND_RESPONSE, Macs, Response,
    check_mac1, kind_of, view,
};
use super::sources::{PER_SOURCE_BURST, PER_SOURCE_PER_SECOND, Sources};
use super::{COOKIE_REPLY_LEN, Error, Half, LocalKeys};
use crate::stats::DropReason;

/// Messages with a right MAC1 taken in a second on average before senders must prove their
/// addresses: about 1 % of a core here and 3 % in the shards. It is well below what the handshake
/// thread's budget can pay for, so that a flood is seen as load before it eats the budget.
pub const LOAD_PER_SECOND: u32 = 200;
/// Such messages taken at once: peers of a node that restarted all come together.
pub const LOAD_BURST: u32 = 500;
/// How long load lasts after the last message that was too many.
pub const LOAD_LASTS: Duration = Duration::from_secs(1);
/// Cookie replies passed on in a second, and at once.
pub const COOKIE_REPLIES_PER_SECOND: u32 = 500;
/// Cookies given out in a second. A reply costs more than all that leads to it: with what the
/// network stack does for it, 25 us against 3.
pub const CHALLENGES_PER_SECOND: u32 = 1000;
/// Cookies given out at once.
pub const CHALLENGES_BURST: u32 = 200;

/// What becomes of a message.
#[derive(Debug)]
pub enum Verdict {
    /// An initiation, for whoever has sessions with [`Half::peer`].
    Initiation(Half),
    /// A response to the initiation that we gave this index.
    Response(u32),
    /// A cookie reply to the message that we gave this index.
    CookieReply(u32),
    /// Not taken: the cookie reply that was written is to be sent instead.
    Challenge,
    /// Not taken.
    Drop(DropReason),
}

/// A bucket of tokens that fills by time; the level is kept as the moment at which it is full.
#[derive(Clone, Copy)]
pub(crate) struct Bucket {
    cost: Duration,
    burst: Duration,
    full_at: Instant,
}

impl Bucket {
    pub(crate) fn new(now: Instant, per_second: u32, burst: u32) -> Bucket {
        let cost = Duration::from_secs(1) / per_second;
        Bucket {
            cost,
            burst: cost * burst,
            full_at: now,
        }
    }

    /// Takes one token, if there is one.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let full_at = self.full_at.max(now) + self.cost;
        let taken = full_at.saturating_duration_since(now) <= self.burst;
        if taken {
            self.full_at = full_at;
        }
        taken
    }
}

/// See the module's text.
pub struct Gate {
    /// Without a key nothing passes.
    local: Option<Arc<LocalKeys>>,
    load: Bucket,
    /// Under load before this.
    loaded_until: Option<Instant>,
    baker: Baker,
    sources: Sources,
    challenges: Bucket,
    cookie_replies: Bucket,
}

impl Gate {
    /// A gate without load.
    #[must_use]
    pub fn new(now: Instant, local: Option<Arc<LocalKeys>>) -> Gate {
        Gate {
            local,
            load: Bucket::new(now, LOAD_PER_SECOND, LOAD_BURST),
            loaded_until: None,
            baker: Baker::default(),
            sources: Sources::new(now, PER_SOURCE_PER_SECOND, PER_SOURCE_BURST),
            challenges: Bucket::new(now, CHALLENGES_PER_SECOND, CHALLENGES_BURST),
            cookie_replies: Bucket::new(now, COOKIE_REPLIES_PER_SECOND, COOKIE_REPLIES_PER_SECOND),
        }
    }

    /// Replaces our key. Cookies given out stay good; they prove addresses, not keys.
    pub fn set_local(&mut self, local: Option<Arc<LocalKeys>>) {
        self.local = local;
    }

    /// True if senders must prove their addresses.
    #[must_use]
    pub fn under_load(&self, now: Instant) -> bool {
        self.loaded_until.is_some_and(|until| now < until)
    }

    /// Judges one message. For [`Verdict::Challenge`] the answer is in `reply`, else that is left
    /// alone.
    pub fn handle(
        &mut self,
        now: Instant,
        from: SocketAddr,
        message: &[u8],
        rng: &mut impl CryptoRng,
        reply: &mut [u8; COOKIE_REPLY_LEN],
    ) -> Verdict {
        let Some(local) = self.local.clone() else {
            return Verdict::Drop(DropReason::HandshakeNoKey);
        };
        match self.check(now, from, &local, message, rng, reply) {
            Ok(verdict) => verdict,
            Err(error) => Verdict::Drop(error.reason()),
        }
    }

    fn check(
        &mut self,
        now: Instant,
        from: SocketAddr,
        local: &LocalKeys,
        message: &[u8],
        rng: &mut impl CryptoRng,
        reply: &mut [u8; COOKIE_REPLY_LEN],
    ) -> Result<Verdict, Error> {
        match kind_of(message).ok_or(Error::Length)? {
            KIND_INITIATION => {
                let initiation: &Initiation = view(message, KIND_INITIATION)?;
                let sender = initiation.sender.get();
                let macs = &initiation.macs;
                match self.admit(now, from, local, message, macs, sender, rng, reply)? {
                    Some(refusal) => Ok(refusal),
                    None => peek_checked(local, initiation).map(Verdict::Initiation),
                }
            }
            KIND_RESPONSE => {
                let response: &Response = view(message, KIND_RESPONSE)?;
                let sender = response.sender.get();
                let macs = &response.macs;
                match self.admit(now, from, local, message, macs, sender, rng, reply)? {
                    Some(refusal) => Ok(refusal),
                    None => Ok(Verdict::Response(response.receiver.get())),
                }
            }
            KIND_COOKIE_REPLY => {
                let cookie: &CookieReply = view(message, KIND_COOKIE_REPLY)?;
                if self.cookie_replies.take(now) {
                    Ok(Verdict::CookieReply(cookie.receiver.get()))
                } else {
                    Ok(Verdict::Drop(DropReason::HandshakeLimited))
                }
            }
            _ => Err(Error::Kind),
        }
    }

    /// Steps 3 to 5; `None` lets the message pass.
    fn admit(
        &mut self,
        now: Instant,
        from: SocketAddr,
        local: &LocalKeys,
        message: &[u8],
        macs: &Macs,
        sender: u32,
        rng: &mut impl CryptoRng,
        reply: &mut [u8; COOKIE_REPLY_LEN],
    ) -> Result<Option<Verdict>, Error> {
        check_mac1(&local.labels.mac1, message)?;
        if !self.load.take(now) {
            self.loaded_until = Some(now + LOAD_LASTS);
        }
        if !self.under_load(now) {
            return Ok(None);
        }
        // Who has no cookie sends zeros: there is nothing to compute then.
        let proven = macs.mac2 != [0; 16] && self.baker.check(now, from, message, rng);
        if !proven {
            if !self.challenges.take(now) {
                return Ok(Some(Verdict::Drop(DropReason::HandshakeLimited)));
            }
            self.baker
                .reply(now, from, local, sender, &macs.mac1, rng, reply);
            return Ok(Some(Verdict::Challenge));
        }
        if !self.sources.allow(now, from.ip()) {
            return Ok(Some(Verdict::Drop(DropReason::HandshakeLimited)));
        }
        Ok(None)
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("loaded_until", &self.loaded_until)
            .finish_non_exhaustive()
    }
}
