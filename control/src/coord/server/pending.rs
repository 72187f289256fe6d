//! Machines that no auth key lets in: each waits under a code until a person approves it.
//!
//! A machine has one code, whatever it asks for meanwhile: its latest node key and host name are what
//! is let in. A code is good for [`PENDING_TIME`] and is in memory only; a machine whose code is gone
//! gets another when it asks again. Nobody is let in by knowing a code: it has to be given to the
//! server's own socket.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::str::FromStr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde_json::Value;
use time::OffsetDateTime;

use super::Server;
use super::register::Registration;
use crate::coord::admin::Refusal;
use crate::key::{MachinePublic, NodePublic};
use crate::netmap::wire::RegisterResponse;
use crate::places::networks;

/// How long a machine waits.
pub const PENDING_TIME: Duration = Duration::from_secs(30 * 60);

/// Machines that wait at most, in all and from one host (a proxy on this one brings all of them).
const PENDING_MAX: usize = 512;
const PENDING_PER_HOST_MAX: usize = 8;

/// When a machine for which there is no room may ask again.
const PENDING_RETRY: Duration = Duration::from_secs(60);

/// Crockford's: no letter in it is taken for another, or for a digit.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const BITS: u32 = 40;
const DIGITS: u32 = BITS / 5;

/// Names a machine that waits, for people: 40 bits, shown as `AAAA-BBBB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Code(u64);

impl Code {
    /// The code with the low 40 of these bits.
    pub const fn new(bits: u64) -> Self {
        Self(bits & ((1 << BITS) - 1))
    }

    /// The code at the end of a URL that we gave.
    pub(super) fn of_url(url: &str) -> Option<Self> {
        url.rsplit('/').next()?.parse().ok()
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digit = |at: u32| {
            let [low, ..] = (self.0 >> (5 * at)).to_le_bytes();
            char::from(ALPHABET[usize::from(low & 31)])
        };
        let part = |of: Range<u32>| of.rev().map(digit).collect::<String>();
        write!(f, "{}-{}", part(4..DIGITS), part(0..4))
    }
}

/// In letters of any size, with the dash or without.
impl FromStr for Code {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bits = 0_u64;
        let mut digits = 0;
        for letter in text.bytes().filter(|letter| *letter != b'-') {
            let letter = letter.to_ascii_uppercase();
            let value = (0..).zip(ALPHABET).find(|(_, of)| **of == letter);
            let (value, _): (u64, _) = value.ok_or(())?;
            digits += 1;
            if digits > DIGITS {
                return Err(());
            }
            bits = bits << 5 | value;
        }
        if digits == DIGITS {
            Ok(Self(bits))
        } else {
            Err(())
        }
    }
}

/// A machine that asks to be let in, and under which code it waits or would.
#[derive(Clone, Debug, PartialEq)]
pub struct Applicant {
    /// What a person is shown.
    pub code: Code,
    /// Its identity, proven.
    pub machine: MachinePublic,
    /// The key it wants to use.
    pub node_key: NodePublic,
    /// Capability version of its request.
    pub capver: i64,
    /// What it says of itself.
    pub hostinfo: Value,
    /// The code it was given before and asks for now.
    pub followup: Option<Code>,
}

/// What lets a machine in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pass {
    /// None: a person does.
    pub(super) auth_key: Option<i64>,
    pub(super) ephemeral: bool,
    /// None: whose it is already, or the first user's.
    pub(super) user: Option<i64>,
    pub(super) tags: Vec<String>,
}

/// Those who wait.
#[derive(Debug, Default)]
pub(super) struct Pending {
    waiting: BTreeMap<MachinePublic, Waiting>,
    /// Codes that are good no more, since this was asked last.
    settled: Vec<Code>,
}

#[derive(Debug)]
struct Waiting {
    applicant: Applicant,
    host: IpNet,
    until: Instant,
}

/// What becomes of a machine that asks to wait.
#[derive(Clone, Debug, PartialEq)]
pub enum Waits {
    /// It has a code, and has to be told: here is the answer.
    Told(RegisterResponse),
    /// It was told, and is answered once the code is settled, or its time is over.
    Until(Code, Instant),
    /// Too many wait; again after this.
    Full(Duration),
}

impl Pending {
    fn settle(&mut self, machine: MachinePublic) {
        if let Some(gone) = self.waiting.remove(&machine) {
            self.settled.push(gone.applicant.code);
        }
    }

    /// Makes room for one more from this host.
    fn has_room(&mut self, host: IpNet) -> bool {
        let mut hosts: BTreeMap<IpNet, usize> = BTreeMap::new();
        for waiting in self.waiting.values() {
            *hosts.entry(waiting.host).or_default() += 1;
        }
        let own = hosts.get(&host).copied().unwrap_or(0);
        if own >= PENDING_PER_HOST_MAX && !host.addr().is_loopback() {
            return false;
        }
        if self.waiting.len() < PENDING_MAX {
            return true;
        }
        // The oldest of the host with most goes, if the newcomer's has fewer then; or if that is the proxy, behind
        // which nobody can be told apart: who fills all places is not to shut out the rest for half an hour.
        let most = hosts.into_iter().max_by_key(|(_, count)| *count);
        let gives = |(of, count): &(IpNet, usize)| {
            *count > own + 1 || (*of == host && host.addr().is_loopback())
        };
        let Some((most, _)) = most.filter(gives) else {
            return false;
        };
        let of_most = self.waiting.values().filter(|one| one.host == most);
        let oldest = of_most.min_by_key(|one| one.until);
        let oldest = oldest.map(|one| one.applicant.machine);
        oldest.into_iter().for_each(|machine| self.settle(machine));
        true
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        let over = self.waiting.values().filter(|one| one.until <= now);
        let over: Vec<MachinePublic> = over.map(|one| one.applicant.machine).collect();
        over.into_iter().for_each(|machine| self.settle(machine));
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.values().map(|one| one.until).min()
    }
}

impl Server {
    /// The code a machine waits under.
    pub(super) fn code_of(&self, machine: MachinePublic) -> Option<Code> {
        let waiting = self.pending.waiting.get(&machine)?;
        Some(waiting.applicant.code)
    }

    /// Has a machine wait that asked from this address; see [`Registration::Pending`].
    pub fn handle_applicant(
        &mut self,
        now: Instant,
        source: IpAddr,
        applicant: Applicant,
    ) -> Waits {
        let (code, was_told) = (applicant.code, applicant.followup == Some(applicant.code));
        let until = match self.pending.waiting.get_mut(&applicant.machine) {
            Some(waiting) => {
                waiting.applicant = applicant;
                waiting.until
            }
            None => {
                let [host, _] = networks(source);
                let taken = |one: &Waiting| one.applicant.code == code;
                if self.pending.waiting.values().any(taken) || !self.pending.has_room(host) {
                    return Waits::Full(PENDING_RETRY);
                }
                let machine = applicant.machine;
                let waiting = Waiting {
                    applicant,
                    host,
                    until: now + PENDING_TIME,
                };
                let until = waiting.until;
                self.pending.waiting.insert(machine, waiting);
                until
            }
        };
        if was_told {
            return Waits::Until(code, until);
        }
        Waits::Told(RegisterResponse {
            auth_url: code.to_string(),
            ..RegisterResponse::default()
        })
    }

    /// Decides on the machine that waits under a code, which a person approves.
    ///
    /// # Errors
    /// [`Refusal`], when none does or there is no place for it.
    pub fn plan_approval(
        &self,
        wall: OffsetDateTime,
        code: &str,
        user: Option<&str>,
    ) -> Result<Registration, Refusal> {
        let unknown = || Refusal::NoSuchCode(code.to_owned());
        let code = Code::of_url(code.trim()).ok_or_else(unknown)?;
        let mut waiting = self.pending.waiting.values();
        let found = waiting.find(|one| one.applicant.code == code);
        let applicant = found.ok_or_else(unknown)?.applicant.clone();
        let user = match user {
            None => None,
            Some(name) => {
                let mut users = self.config.users.iter();
                let found = users.find(|(_, other)| *other == name);
                let unknown = || Refusal::NoSuchUser(name.to_owned());
                Some(*found.ok_or_else(unknown)?.0)
            }
        };
        let pass = Pass {
            auth_key: None,
            ephemeral: false,
            user,
            tags: Vec::new(),
        };
        self.admit(wall, applicant, pass).map_err(Refusal::NoPlace)
    }

    /// A machine is in, however it came: it waits no more.
    pub(super) fn waits_no_more(&mut self, machine: MachinePublic) {
        self.pending.settle(machine);
    }

    /// Codes that are good no more since this was asked last: whoever waits for one is to ask again.
    pub fn take_settled(&mut self) -> Vec<Code> {
        std::mem::take(&mut self.pending.settled)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::coord::operations::{WALL, config};

    fn applicant(n: u16, followup: Option<Code>) -> Applicant {
        let [high, low] = n.to_be_bytes();
        let mut key = [low; 32];
        key[0] = high;
        Applicant {
            code: Code::new(n.into()),
            machine: MachinePublic(key),
            node_key: NodePublic(key),
            capver: 130,
            hostinfo: json!({"Hostname": format!("h{n}")}),
            followup,
        }
    }

    fn server() -> (Server, Instant) {
        let now = crate::testing::start();
        (Server::new(now, config(), Vec::new(), 0, 0), now)
    }

    fn host(n: u16) -> IpAddr {
        let [high, low] = n.to_be_bytes();
        [198, 51, high, low].into()
    }

    #[test]
    fn a_code_is_shown_in_two_parts_and_read_however_it_is_written() {
        let code = Code::new(0x12_3456_789A);
        assert_eq!(code.to_string(), "28T5-CY4T");
        assert_eq!(Code::new(u64::MAX).to_string(), "ZZZZ-ZZZZ");
        for text in ["28T5-CY4T", "28t5cy4t", "2-8t-5CY4T"] {
            assert_eq!(text.parse(), Ok(code), "{text}");
        }
        let url = "https://[fd00::1]:8443/register/28T5-CY4T";
        assert_eq!(Code::of_url(url), Some(code));
        for text in [
            "",
            "-",
            "28T5-CY4",
            "28T5-CY4TT",
            "28T5-CY4U",
            "28T5 CY4T",
            "\u{0661}",
        ] {
            assert_eq!(text.parse::<Code>(), Err(()), "{text}");
        }
    }

    #[test]
    fn a_machine_keeps_its_code_until_it_is_let_in_or_its_time_is_over() {
        let (mut server, now) = server();
        let first = applicant(1, None);
        let told = server.handle_applicant(now, host(1), first.clone());
        let Waits::Told(answer) = told else {
            panic!("{told:?}");
        };
        assert_eq!(answer.auth_url, first.code.to_string());
        assert!(!answer.machine_authorized && answer.error.is_empty());
        // Asked about, it is answered later; with a new key it waits on.
        let until = now + PENDING_TIME;
        let mut again = applicant(1, Some(first.code));
        again.node_key = NodePublic([9; 32]);
        let waits = server.handle_applicant(now + PENDING_TIME / 2, host(1), again);
        assert_eq!(waits, Waits::Until(first.code, until));
        assert_eq!(server.poll_timeout(), Some(until));
        assert!(server.plan_approval(WALL, "ZZZZ-ZZZZ", None).is_err());
        let plan = server
            .plan_approval(WALL, &first.code.to_string(), None)
            .unwrap();
        assert_eq!(plan.record().unwrap().node_key, NodePublic([9; 32]));
        assert_eq!(plan.record().unwrap().auth_key, None);
        server.apply(now, plan);
        assert_eq!(server.take_settled(), [first.code]);
        let twice = server.plan_approval(WALL, &first.code.to_string(), None);
        assert!(matches!(twice, Err(Refusal::NoSuchCode(_))), "{twice:?}");

        let second = applicant(2, None);
        server.handle_applicant(now, host(2), second.clone());
        server.handle_timeout(until, WALL);
        assert_eq!(server.take_settled(), [second.code]);
        assert!(
            server
                .plan_approval(WALL, &second.code.to_string(), None)
                .is_err()
        );
    }

    #[test]
    fn few_may_wait_from_one_host_and_who_brings_many_loses_them_to_others() {
        let (mut server, now) = server();
        let mut ask = |n: u16, from: u16| {
            let waits = server.handle_applicant(now, host(from), applicant(n, None));
            (matches!(waits, Waits::Told(_)), server.take_settled())
        };
        let mut n = 0;
        for from in 0..64 {
            for _ in 0..8 {
                n += 1;
                assert_eq!(ask(n, from), (true, Vec::new()), "{n}");
            }
            assert_eq!(ask(999, from), (false, Vec::new()));
        }
        // All places are taken: one of those who hold eight goes.
        let (told, gone) = ask(1000, 1000);
        assert!(told && gone.len() == 1, "{gone:?}");
        assert_eq!(ask(1, 3000), (true, Vec::new()), "it waits already");
    }

    #[test]
    fn behind_a_proxy_the_oldest_makes_room() {
        let (mut server, now) = server();
        let mut ask = |n: u16| {
            let at = now + Duration::from_secs(n.into());
            let proxy = IpAddr::from([127, 0, 0, 1]);
            let waits = server.handle_applicant(at, proxy, applicant(n, None));
            (matches!(waits, Waits::Told(_)), server.take_settled())
        };
        for n in 0..512 {
            assert_eq!(ask(n), (true, Vec::new()), "{n}");
        }
        assert_eq!(ask(600), (true, vec![applicant(0, None).code]));
    }
}
