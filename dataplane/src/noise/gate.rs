//! The gate that every handshake message from the network passes, cheapest checks first (WireGuard
//! paper §5.3):
//!
//! 1. Length and type.
//! 2. An answer (response or cookie reply) passes if its receiver index is one that we await an answer
//!    under ([`Standing::Awaited`]), and a response's MAC1 is right; no more than a few for one index.
//!    It needs no proof of an address: who was not told the index guesses one of 16 million.
//! 3. MAC1 of an initiation: the sender knows our public key, or for a while the one before it. It costs about half a microsecond.
//! 4. Load. Initiations with a right MAC1 make it, because they lead to Diffie-Hellman computations,
//!    here and in the shard of their peer. [`LOAD_PER_SECOND`] on average and [`LOAD_BURST`] at once
//!    are taken; when there are more, we are under load until a second has passed without any above
//!    that. The kernel and wireguard-go measure the length of their queue instead, which says the same
//!    about the worker behind it: that it does not keep up. Here the queue is the socket's buffer,
//!    whose length nobody tells.
//! 5. Under load only: a few from an address that a peer has been heard from lately pass
//!    ([`Standing::Known`]); the address may be made up, so it is few. Then MAC2 proves the sender's
//!    address, and the limit per source is what remains. A few pass as well that come from an address
//!    seen five seconds ago and not since ([`Seen::Returned`]): they repeat themselves as WireGuard does.
//!    A flood from more addresses than there are cookies to give cannot be told from who is new
//!    otherwise.
//! 6. What is left needs a cookie, and more may need one than can be given. Those whose source was not
//!    seen in the last seconds ([`Recent`]) and the others are two classes ([`Verdict::Unproven`]), of
//!    each of which the caller draws at random; [`Gate::challenge`] writes the reply to one that is drawn,
//!    at the class's rate. A flood from a thousand or a hundred thousand addresses is in the second
//!    class soon, and leaves the first to who is new.
//! 7. For an initiation one Diffie-Hellman computation, which says who made it.

use std::hash::BuildHasher as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::CryptoRng;

use super::cookie::CookieChecker;
use super::handshake::peek_checked;
use super::message::{
    CookieReply, Initiation, KIND_COOKIE_REPLY, KIND_INITIATION, KIND_RESPONSE, Response, kind_of,
    view,
};
use super::recent::{Recent, Seen};
use super::sources::{PER_SOURCE_BURST, PER_SOURCE_PER_SECOND, Sources, source};
use super::{COOKIE_REPLY_LEN, Error, LocalKeys, Ours, PeekedInitiation, Previous};
use crate::stats::DropReason;

/// Initiations with a right MAC1 taken in a second on average before senders must prove their
/// addresses: about 1 % of a core here and 3 % in the shards. It is well below what the handshake
/// thread's budget can pay for, so that a flood is seen as load before it eats the budget.
pub(crate) const LOAD_PER_SECOND: u32 = 200;
/// Such messages taken at once: peers of a node that restarted all come together.
pub(crate) const LOAD_BURST: u32 = 500;
/// How long load lasts after the last message that was too many.
pub(super) const LOAD_LASTS: Duration = Duration::from_secs(1);
/// Cookies given in a second to sources that were not seen lately. A reply costs more than all that
/// leads to it: with what the network stack does for it, 6 us against 1. Beside a flood from ever new
/// addresses reading is worth more: who is read twice has returned.
pub(super) const CHALLENGES_PER_SECOND: u32 = 5_000;
/// Such cookies given at once: when a flood begins, its sources are as new as anybody. These are what
/// the handshake thread has saved up time for.
pub(super) const CHALLENGES_BURST: u32 = 60_000;
/// Cookies given in a second, and at once, to sources that were: several peers may share one.
pub(super) const CHALLENGES_AGAIN_PER_SECOND: u32 = 500;
/// Such cookies given at once.
pub(super) const CHALLENGES_AGAIN_BURST: u32 = 50;
/// Initiations taken in a second from sources that have returned: 3 % of a core here, as much in the
/// shards if they are peers'.
pub(super) const RETURNED_PER_SECOND: u32 = 500;
/// Such messages taken at once.
pub(super) const RETURNED_BURST: u32 = 50;
/// Initiations taken in a second, and at once, from an address that a peer is known by, and answers
/// under one index. A peer sends one in five seconds.
pub(super) const KNOWN_PER_SECOND: u32 = 2;
/// Such messages taken at once.
pub(super) const KNOWN_BURST: u32 = 4;

/// What is known of a sender or its message beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing.
    Stranger,
    /// A peer was heard from this address lately.
    Known,
    /// The index that an answer names is one that we await an answer under.
    Awaited,
}

/// What becomes of a message.
#[derive(Debug)]
pub enum Verdict {
    /// An initiation, for whoever has sessions with [`PeekedInitiation::peer`].
    Initiation(PeekedInitiation),
    /// A response to the initiation that we gave this index.
    Response(u32),
    /// A cookie reply to the message that we gave this index.
    CookieReply(u32),
    /// Not taken, but it may have a cookie.
    Unproven(Novelty),
    /// Not taken.
    Drop(DropReason),
}

/// Who shares in a rate of cookies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Novelty {
    /// Sources not seen in the last seconds.
    New,
    /// The others.
    Again,
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
    previous: Option<Arc<Previous>>,
    load: Bucket,
    /// Under load before this.
    loaded_until: Option<Instant>,
    checker: CookieChecker,
    sources: Sources,
    recent: Recent,
    new: Bucket,
    again: Bucket,
    returned: Bucket,
    /// Shares of known addresses and of awaited indexes, and what tells them apart there.
    known: Sources,
    awaited: Sources,
    hasher: std::hash::RandomState,
}

impl Gate {
    /// A gate without load.
    #[must_use]
    pub fn new(now: Instant, local: Option<Arc<LocalKeys>>, rng: &mut impl CryptoRng) -> Gate {
        Gate {
            local,
            previous: None,
            load: Bucket::new(now, LOAD_PER_SECOND, LOAD_BURST),
            loaded_until: None,
            checker: CookieChecker::default(),
            sources: Sources::new(now, PER_SOURCE_PER_SECOND, PER_SOURCE_BURST),
            recent: Recent::new(now, rng),
            new: Bucket::new(now, CHALLENGES_PER_SECOND, CHALLENGES_BURST),
            again: Bucket::new(now, CHALLENGES_AGAIN_PER_SECOND, CHALLENGES_AGAIN_BURST),
            returned: Bucket::new(now, RETURNED_PER_SECOND, RETURNED_BURST),
            known: Sources::new(now, KNOWN_PER_SECOND, KNOWN_BURST),
            awaited: Sources::new(now, KNOWN_PER_SECOND, KNOWN_BURST),
            hasher: std::hash::RandomState::new(),
        }
    }

    /// Replaces our key. Cookies given out stay good; they prove addresses, not keys.
    pub fn set_local(&mut self, local: Option<Arc<LocalKeys>>) {
        self.local = local;
    }

    /// What is made for this key is taken too, while it counts.
    pub fn set_previous(&mut self, previous: Option<Arc<Previous>>) {
        self.previous = previous;
    }

    /// True if senders must prove their addresses.
    #[must_use]
    pub fn under_load(&self, now: Instant) -> bool {
        self.loaded_until.is_some_and(|until| now < until)
    }

    /// Judges one message.
    pub fn handle(
        &mut self,
        now: Instant,
        from: SocketAddr,
        standing: Standing,
        message: &[u8],
        rng: &mut impl CryptoRng,
    ) -> Verdict {
        let Some(local) = self.local.clone() else {
            return Verdict::Drop(DropReason::HandshakeNoKey);
        };
        let previous = self.previous.clone();
        let ours = Ours::at(now, &local, previous.as_deref());
        self.check(now, from, standing, ours, message, rng)
            .unwrap_or_else(Verdict::Drop)
    }

    fn check(
        &mut self,
        now: Instant,
        from: SocketAddr,
        standing: Standing,
        ours: Ours<'_>,
        message: &[u8],
        rng: &mut impl CryptoRng,
    ) -> Result<Verdict, DropReason> {
        match kind_of(message).ok_or(Error::Length)? {
            KIND_INITIATION => {
                let initiation: &Initiation = view(message, KIND_INITIATION)?;
                match self.admit(now, from, standing, ours, message, initiation, rng)? {
                    Some(novelty) => Ok(Verdict::Unproven(novelty)),
                    None => {
                        let peeked = peek_checked(ours.addressed(message)?, initiation)?;
                        Ok(Verdict::Initiation(peeked))
                    }
                }
            }
            KIND_RESPONSE => {
                let response: &Response = view(message, KIND_RESPONSE)?;
                let index = response.receiver.get();
                self.answers(now, standing, index)?;
                ours.addressed(message)?;
                Ok(Verdict::Response(index))
            }
            KIND_COOKIE_REPLY => {
                let cookie: &CookieReply = view(message, KIND_COOKIE_REPLY)?;
                let index = cookie.receiver.get();
                self.answers(now, standing, index)?;
                Ok(Verdict::CookieReply(index))
            }
            _ => Err(Error::Kind.into()),
        }
    }

    /// Step 2.
    fn answers(&mut self, now: Instant, standing: Standing, index: u32) -> Result<(), DropReason> {
        if standing != Standing::Awaited {
            Err(DropReason::UnknownIndex)
        } else if !self.awaited.take(now, u64::from(index)) {
            Err(DropReason::HandshakeLimited)
        } else {
            Ok(())
        }
    }

    /// Steps 3 to 6; a class if the message needs a cookie.
    fn admit(
        &mut self,
        now: Instant,
        from: SocketAddr,
        standing: Standing,
        ours: Ours<'_>,
        message: &[u8],
        initiation: &Initiation,
        rng: &mut impl CryptoRng,
    ) -> Result<Option<Novelty>, DropReason> {
        if !self.under_load(now) {
            ours.addressed(message)?;
            if self.load.take(now) {
                return Ok(None);
            }
            self.loaded_until = Some(now + LOAD_LASTS);
        }
        if standing == Standing::Known && self.known.take(now, self.hasher.hash_one(from)) {
            ours.addressed(message)?;
            return Ok(None);
        }
        // Who has no cookie sends zeros: there is nothing to compute then.
        if initiation.macs.mac2 != [0; 16] {
            ours.addressed(message)?;
            if self.checker.check(now, from, message, rng) {
                return if self.sources.allow(now, from.ip()) {
                    Ok(None)
                } else {
                    Err(DropReason::HandshakeLimited)
                };
            }
        }
        let seen = self.recent.see(now, source(from.ip()));
        if seen == Seen::Lately {
            // Looked at only if it is drawn.
            return Ok(Some(Novelty::Again));
        }
        ours.addressed(message)?;
        self.count_load(now);
        let passes = seen == Seen::Returned && self.returned.take(now);
        Ok((!passes).then_some(Novelty::New))
    }

    /// One more initiation with a right MAC1.
    fn count_load(&mut self, now: Instant) {
        if !self.load.take(now) {
            self.loaded_until = Some(now + LOAD_LASTS);
        }
    }

    /// Writes the cookie reply to an unproven initiation that was drawn.
    ///
    /// # Errors
    /// Why there is none: [`DropReason::HandshakeLimited`] if enough have been given for now.
    pub fn challenge(
        &mut self,
        now: Instant,
        from: SocketAddr,
        class: Novelty,
        message: &[u8],
        rng: &mut impl CryptoRng,
        reply: &mut [u8; COOKIE_REPLY_LEN],
    ) -> Result<(), DropReason> {
        let local = self.local.clone().ok_or(DropReason::HandshakeNoKey)?;
        let previous = self.previous.clone();
        let ours = Ours::at(now, &local, previous.as_deref());
        let initiation: &Initiation = view(message, KIND_INITIATION)?;
        let rate = match class {
            Novelty::New => &mut self.new,
            Novelty::Again => &mut self.again,
        };
        if !rate.take(now) {
            return Err(DropReason::HandshakeLimited);
        }
        if class == Novelty::Again {
            ours.addressed(message)?;
            self.count_load(now);
        }
        let local = match ours.previous() {
            Some(_) => ours.addressed(message)?,
            None => ours.local(),
        };
        let (sender, mac1) = (initiation.sender.get(), &initiation.macs.mac1);
        self.checker
            .reply(now, from, local, sender, mac1, rng, reply);
        Ok(())
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("loaded_until", &self.loaded_until)
            .finish_non_exhaustive()
    }
}
