//! The test a candidate must pass before data depends on it (`protocol/paths.md` §15).
//!
//! Ten Pings 20 ms apart and, beside them, one or two as large as a full packet with the
//! don't-fragment bit; if these stay unanswered for a while, one or two without it. Nine Pongs pass at once; six to eight earn a second burst half a second later,
//! which passes with eight; fewer fail. What passed must not be far slower than the relay, and a
//! large Ping must have been answered within a second, of either kind (`mtu` says what follows). Against a peer without relay anything that
//! answers passes, for it is all there is.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::mtu::Carries;
use super::{FailedTest, Purpose};

const BURST: u32 = 10;
const BURST_SPACING: Duration = Duration::from_millis(20);
/// A late driver may close up this far.
const BURST_SPACING_MIN: Duration = Duration::from_millis(10);
const PASS_AT_ONCE: u32 = 9;
const PASS_SECOND: u32 = 8;
const SECOND_CHANCE: u32 = 6;
const SECOND_BURST_AFTER: Duration = Duration::from_millis(500);
const WAIT_MIN: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(1);
const LATENCY_MAX: Duration = Duration::from_millis(500);
const LATENCY_MAX_RELAYS: u32 = 3;
const MTU_TRIES: u32 = 2;
const MTU_RETRY: Duration = Duration::from_millis(250);
const MTU_WAIT: Duration = Duration::from_secs(1);

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Pass(Figures),
    Fail(FailedTest, Figures),
}

/// What the test measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Figures {
    /// Ranking goes by the fastest.
    pub(super) min: Option<Duration>,
    /// The latency check goes by the median.
    pub(super) median: Option<Duration>,
    pub(super) loss_pct: u8,
    /// Which large Pings were answered.
    pub(super) carries: Carries,
}

/// What the verdict depends on besides the Pongs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// There is no relay to stay on.
    pub(super) lenient: bool,
    /// Round trip by relay, or a lower bound of it.
    pub(super) relay_rtt: Option<Duration>,
}

/// One running test.
#[derive(Clone, Debug)]
pub(super) struct Validation {
    pub(super) addr: SocketAddr,
    /// It replaces the best address even if it is not better by rank.
    pub(super) replaces: bool,
    pub(super) last_pong: Instant,
    /// Data goes there while it runs.
    pub(super) data: bool,
    /// It began with a Pong of some time ago, and nothing has been answered since.
    pub(super) on_trust: bool,
    /// Number of the burst, unique per peer.
    burst: u32,
    second: bool,
    sent: u32,
    answered: u32,
    loss_passed: bool,
    next: Option<Instant>,
    last_sent: Instant,
    first_rtt: Duration,
    rtts: Vec<Duration>,
    mtu: u16,
    carries: Carries,
    /// Don't-fragment Pings: how many, the last, the next; then those without the bit.
    whole_sent: u32,
    whole_last: Instant,
    whole_next: Option<Instant>,
    split_sent: u32,
    split_next: Option<Instant>,
    mtu_deadline: Instant,
}

impl Validation {
    /// A test of `addr`, whose first Pong took `first_rtt`, for wire packets of `mtu` bytes. An
    /// `early` one does not begin with that Pong but some time after it.
    pub(super) fn new(
        now: Instant,
        addr: SocketAddr,
        first_rtt: Duration,
        mtu: u16,
        burst: u32,
        replaces: bool,
        early: bool,
    ) -> Self {
        Self {
            addr,
            replaces,
            last_pong: now,
            data: true,
            on_trust: early,
            burst,
            second: false,
            sent: 0,
            answered: 0,
            loss_passed: false,
            next: Some(now),
            last_sent: now,
            first_rtt,
            rtts: Vec::new(),
            mtu,
            carries: Carries::Unknown,
            whole_sent: 0,
            whole_last: now,
            whole_next: Some(now),
            split_sent: 0,
            split_next: Some(now + MTU_RETRY),
            mtu_deadline: now + MTU_WAIT,
        }
    }

    /// The next probe that is due.
    pub(super) fn poll_probe(&mut self, now: Instant) -> Option<Purpose> {
        if let Some(at) = self.whole_next.filter(|at| *at <= now) {
            self.whole_sent += 1;
            self.whole_last = now;
            self.whole_next = (self.whole_sent < MTU_TRIES).then_some(at + MTU_RETRY);
            return Some(Purpose::Mtu(self.mtu));
        }
        if let Some(at) = self.split_next.filter(|at| *at <= now) {
            self.split_sent += 1;
            self.split_next = (self.split_sent < MTU_TRIES).then_some(at + MTU_RETRY);
            return Some(Purpose::Fragments(self.mtu));
        }
        let at = self.next.filter(|at| *at <= now)?;
        self.sent += 1;
        self.last_sent = now;
        let next = (at + BURST_SPACING).max(now + BURST_SPACING_MIN);
        self.next = (self.sent < BURST).then_some(next);
        Some(Purpose::Validate(self.burst))
    }

    /// A Pong from its address; those to its probes count.
    pub(super) fn pong(&mut self, now: Instant, rtt: Duration, purpose: Purpose) {
        match purpose {
            Purpose::Validate(burst) if burst == self.burst => {
                self.answered += 1;
                self.rtts.push(rtt);
            }
            Purpose::Validate(_) => {}
            Purpose::Mtu(_) => {
                self.carries = Carries::Whole;
                (self.whole_next, self.split_next) = (None, None);
            }
            Purpose::Fragments(_) => {
                if self.carries == Carries::Unknown {
                    self.carries = Carries::Fragments;
                }
                self.split_next = None;
            }
            Purpose::Discovery
            | Purpose::PingBack
            | Purpose::Heartbeat
            | Purpose::RelayLatency
            | Purpose::User(_) => return,
        }
        self.last_pong = now;
        self.on_trust = false;
    }

    /// The kernel refused the don't-fragment Ping: it is larger than the device's MTU.
    pub(super) fn refused(&mut self, now: Instant) {
        (self.whole_sent, self.whole_next) = (MTU_TRIES, None);
        self.whole_last = now.checked_sub(self.wait()).unwrap_or(now);
        if self.split_sent == 0 {
            self.split_next = Some(now);
        }
    }

    /// The verdict, once it is certain. Begins the second burst, numbered `burst`, where one is due.
    pub(super) fn judge(&mut self, now: Instant, terms: Terms, burst: u32) -> Option<Verdict> {
        if !self.loss_passed {
            let enough = if self.second {
                PASS_SECOND
            } else {
                PASS_AT_ONCE
            };
            let over = self.burst_deadline().is_some_and(|at| at <= now);
            if self.answered >= enough || over && terms.lenient && self.answered > 0 {
                self.loss_passed = true;
                self.next = None;
            } else if !over {
                return None;
            } else if self.second || self.answered < SECOND_CHANCE {
                return Some(Verdict::Fail(FailedTest::Loss, self.figures()));
            } else {
                (self.second, self.burst) = (true, burst);
                (self.sent, self.answered) = (0, 0);
                self.next = Some(now + SECOND_BURST_AFTER);
                return None;
            }
        }
        let figures = self.figures();
        let relayed = terms.relay_rtt.unwrap_or_default() * LATENCY_MAX_RELAYS;
        if !terms.lenient && figures.median > Some(LATENCY_MAX.max(relayed)) {
            return Some(Verdict::Fail(FailedTest::Latency, figures));
        }
        let over = now >= self.mtu_deadline;
        match self.carries {
            Carries::Whole => Some(Verdict::Pass(figures)),
            Carries::Fragments => {
                let certain = over || self.whole_over().is_some_and(|at| at <= now);
                certain.then_some(Verdict::Pass(figures))
            }
            Carries::Unknown if !over => None,
            Carries::Unknown if terms.lenient => Some(Verdict::Pass(figures)),
            Carries::Unknown => Some(Verdict::Fail(FailedTest::Mtu, figures)),
        }
    }

    /// When something is due.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let verdict = match (self.loss_passed, self.carries) {
            (false, _) => self.burst_deadline(),
            (true, Carries::Fragments) => self.whole_over().or(Some(self.mtu_deadline)),
            (true, Carries::Whole | Carries::Unknown) => Some(self.mtu_deadline),
        };
        let times = [self.next, self.whole_next, self.split_next, verdict];
        times.into_iter().flatten().min()
    }

    /// The moment after which no Pong of the burst is waited for; `None` while it is being sent.
    fn burst_deadline(&self) -> Option<Instant> {
        (self.sent == BURST).then_some(self.last_sent + self.wait())
    }

    /// The moment after which no Pong to a don't-fragment Ping is waited for; `None` while more of
    /// them are to leave.
    fn whole_over(&self) -> Option<Instant> {
        let over = (self.whole_last + self.wait()).min(self.mtu_deadline);
        self.whole_next.is_none().then_some(over)
    }

    /// How long a Pong is waited for.
    fn wait(&self) -> Duration {
        (self.first_rtt * 4).clamp(WAIT_MIN, WAIT_MAX)
    }

    fn figures(&self) -> Figures {
        let mut sorted = self.rtts.clone();
        sorted.sort_unstable();
        let lost_pct = (self.sent.saturating_sub(self.answered)) * 100 / self.sent.max(1);
        Figures {
            min: sorted.first().copied(),
            median: sorted.get(sorted.len() / 2).copied(),
            loss_pct: u8::try_from(lost_pct).expect("a share of a hundred"),
            carries: self.carries,
        }
    }
}
