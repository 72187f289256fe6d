//! Peers of other shards that this shard seals for.
//!
//! A flow is read on the TUN queue of one shard, and its peer is owned by perhaps another. The owner
//! *lends* what sealing takes ([`Terms`]): the sealing half of the keys, and the way, as long as there
//! is a single one that is sure. Whatever else there is to do for a peer, the owner does: without a
//! grant a packet is handed over to it, whole.
//!
//! A grant is the owner's, who ends it when keys or way change. Guests hold on to it while runs for the
//! peer are open, and otherwise only by a weak reference: so keys are erased as soon as the owner erases
//! them and the last of these runs is closed, which is at the end of a turn at the latest.
//!
//! *No reordering inside a flow:* while packets that were handed over are still on their way through
//! the owner, those after them are handed over too. Both are the business of [`Borrowed`] and
//! [`Loan`], which `dataplane/loom` models.
//!
//! *What the owner is told.* Rules of the path and timers of the session follow from sending. A guest
//! reports what it has sealed ([`Report`]) at once after a pause, and every [`REPORT_INTERVAL`] while it
//! goes on; the owner reckons with the time of sending, not with that of the report.
//!
//! [`Loan`]: crate::channel::Loan

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::table::{PeerEntry, PeerTable};
use super::{Addressee, PeerShared, Trouble, Way};
use crate::channel::Borrowed;
use crate::packet::segment::Plan;
use crate::session::{Engine, Sealing, Staged};
use crate::stats::DropReason;
use crate::types::PeerId;

/// Sealing goes on for this long at most before the owner hears of it: little beside the times of any
/// rule that depends on it (the shortest is the silence limit of a path, about a second).
const REPORT_INTERVAL: Duration = Duration::from_millis(50);

/// What the owner of a peer lends to the other shards.
#[derive(Debug)]
pub(crate) struct Terms {
    sealing: Arc<Sealing>,
    way: Way,
    /// The last moment at which the way is sure; `None` is for ever.
    until: Option<Instant>,
}

impl Terms {
    pub(crate) fn new(sealing: Arc<Sealing>, way: Way, until: Option<Instant>) -> Terms {
        Terms {
            sealing,
            way,
            until,
        }
    }

    /// Whether they are just these.
    #[inline]
    pub(crate) fn are(&self, sealing: &Arc<Sealing>, way: Way, until: Option<Instant>) -> bool {
        Arc::ptr_eq(&self.sealing, sealing) && self.way == way && self.until == until
    }

    #[inline]
    fn count(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now <= until) && self.sealing.usable(now)
    }
}

/// What a guest tells the owner.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    pub(crate) peer: PeerId,
    /// When data was last sent.
    pub(crate) at: Instant,
    /// What the kernel found fault with since the last report.
    pub(crate) trouble: Trouble,
}

/// A peer of another shard.
pub(crate) struct Guest {
    id: PeerId,
    pub(crate) owner: u8,
    pub(crate) shared: Arc<PeerShared>,
    /// Held while a run for the peer is open.
    terms: Borrowed<Terms>,
    /// Something was put into a run.
    filling: bool,
    /// What the owner does not know yet: when data was last sent, and what was wrong.
    sent_at: Option<Instant>,
    trouble: Trouble,
    /// It stands among those with something to report.
    listed: bool,
}

impl Guest {
    fn new(entry: &PeerEntry) -> Guest {
        Guest {
            id: entry.config.id,
            owner: entry.owner,
            shared: Arc::clone(&entry.shared),
            terms: Borrowed::default(),
            filling: false,
            sent_at: None,
            trouble: Trouble::default(),
            listed: false,
        }
    }

    /// Takes up what is lent, if there is something and nothing is to be waited for.
    #[inline]
    fn admit(&mut self, now: Instant) -> bool {
        let shared = &self.shared;
        // A way that routes have moved away from is the owner's to leave, with what is handed over to it.
        self.terms.take_up(&shared.loan, |terms| {
            terms.count(now) && !shared.is_to_unstick()
        })
    }

    /// Where to send.
    pub(crate) fn way(&self) -> Way {
        self.terms.get().map(|terms| terms.way).unwrap_or_default()
    }

    /// Takes note that a run was sent, and of what was wrong with that.
    pub(crate) fn sent(&mut self, now: Instant, trouble: Trouble) {
        self.sent_at = Some(now);
        self.trouble.add(trouble);
    }
}

impl Addressee for Guest {
    fn id(&self) -> PeerId {
        self.id
    }

    fn stage(
        &mut self,
        engine: &mut Engine,
        plan: &Plan,
        packet: &mut [u8],
        range: Range<usize>,
        out: &mut [u8],
    ) -> Staged {
        self.filling = true;
        engine.stage(plan, packet, range, out)
    }

    fn seal(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        messages: &mut [u8],
        stride: usize,
    ) -> Result<(), DropReason> {
        let terms = self.terms.get().ok_or(DropReason::NoSession)?;
        engine.seal_lent(&terms.sealing, now, messages, stride)
    }
}

/// The peers of other shards that this shard has packets for, and what their owners are still to be
/// told.
#[derive(Default)]
pub(crate) struct Guests {
    by_id: Vec<Option<Box<Guest>>>,
    /// Those with something to report, each once.
    unreported: Vec<PeerId>,
    /// When owners were last told, and are to be told next.
    reported_at: Option<Instant>,
    report_due: Option<Instant>,
}

impl Guests {
    /// Whether this shard may seal for a peer of another one now; `None` for nobody's peer. If so, it
    /// may until the last run for it is [closed](Guests::closed), or where nothing was put into one, until
    /// [`Guests::settle`], which follows at once.
    #[inline]
    pub(crate) fn admit(&mut self, now: Instant, table: &PeerTable, id: PeerId) -> Option<bool> {
        if let Some(guest) = self.get(id) {
            return Some(guest.admit(now));
        }
        let mut guest = Guest::new(table.get(id)?);
        let admitted = guest.admit(now);
        if admitted {
            self.keep(guest);
        }
        Some(admitted)
    }

    /// Only of peers that lend: packets to all the others would make one for each peer on every shard.
    fn keep(&mut self, guest: Guest) {
        let at = guest.id.0 as usize;
        if self.by_id.len() <= at {
            self.by_id.resize_with(at + 1, || None);
        }
        self.by_id[at] = Some(Box::new(guest));
    }

    /// One that was admitted by [`Guests::admit`], now or before.
    #[inline]
    pub(crate) fn get(&mut self, id: PeerId) -> Option<&mut Guest> {
        self.by_id.get_mut(id.0 as usize)?.as_deref_mut()
    }

    /// Lets go of a grant if nothing has come into a run for its peer.
    #[inline]
    pub(crate) fn settle(&mut self, id: PeerId) {
        if self.get(id).is_some_and(|guest| !guest.filling) {
            self.closed(id);
        }
    }

    /// No run for the peer is open any more: its grant, if it is a guest's, is let go.
    #[inline]
    pub(crate) fn closed(&mut self, id: PeerId) {
        let Some(guest) = self.get(id) else { return };
        guest.filling = false;
        guest.terms.release();
        let Some(sent_at) = guest.sent_at else { return };
        let urgent = guest.trouble.any();
        if !std::mem::replace(&mut guest.listed, true) {
            self.unreported.push(id);
        }
        let due = match self.reported_at {
            Some(last) if !urgent => sent_at.max(last + REPORT_INTERVAL),
            Some(_) | None => sent_at,
        };
        self.report_due = Some(self.report_due.map_or(due, |other| other.min(due)));
    }

    /// When [`Guests::report`] is to be called.
    pub(crate) fn report_due(&self) -> Option<Instant> {
        self.report_due
    }

    /// Tells every owner what it does not know yet, if it is time. `tell` returns false where an owner
    /// cannot be told now: then it is told later.
    pub(crate) fn report(&mut self, now: Instant, mut tell: impl FnMut(u8, Report) -> bool) {
        if self.report_due.is_none_or(|due| now < due) {
            return;
        }
        self.reported_at = Some(now);
        let by_id = &mut self.by_id;
        self.unreported.retain(|id| {
            let guest = by_id.get_mut(id.0 as usize).and_then(Option::as_mut);
            let Some(guest) = guest else { return false };
            let Some(at) = guest.sent_at else {
                return false;
            };
            let report = Report {
                peer: *id,
                at,
                trouble: guest.trouble,
            };
            let told = tell(guest.owner, report);
            if told {
                guest.sent_at = None;
                guest.trouble = Trouble::default();
                guest.listed = false;
            }
            !told
        });
        self.report_due = (!self.unreported.is_empty()).then(|| now + REPORT_INTERVAL);
    }

    /// Forgets the peer that was under an id: it is gone, or another is there now.
    pub(crate) fn forget(&mut self, id: PeerId) {
        let place = self.by_id.get_mut(id.0 as usize);
        if let Some(guest) = place.and_then(Option::take)
            && guest.listed
        {
            self.unreported.retain(|listed| *listed != id);
        }
    }
}
