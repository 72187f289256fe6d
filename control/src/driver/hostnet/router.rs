//! What makes a router of the host: nftables and forwarding, as [`crate::hostnet::firewall`] and
//! [`crate::hostnet::forwarding`] want them. It says what it cannot do, with the command that would.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::nft::{Nft, Refused};
use super::sysctl;
use crate::driver::ledger::{Entry, Ledger};
use crate::hostnet::firewall::{self, Base, Change, FORWARD, GUARDS, PASSED, THROUGH, gates};
use crate::hostnet::{Host, Overlay, Problem, Settings, forwarding};
use crate::netmap::prefix::{EVERYWHERE, V4_RANGE, V6_RANGE};

/// Times that somebody may switch one interface back in [`FIGHT_PERIOD`]; then it is left for that long.
const FIGHTS_MAX: usize = 3;
const FIGHT_PERIOD: Duration = Duration::from_secs(60);
/// So many packets that came out of the tunnel, of which none got past the host's chains, are no accident.
const STUCK_MIN: u64 = 8;
/// So many that our guards dropped between two looks are somebody who is not heard, and told of for so long.
const UNHEARD_MIN: u64 = 3;
const UNHEARD_PERIOD: Duration = Duration::from_secs(60);

/// The thread's part in it.
pub(super) struct Router {
    nft: io::Result<Nft>,
    /// A rule of ours may stand in a chain of the host.
    opened: bool,
    ledger: Ledger,
    /// Interfaces that forward for our sake, by index and family.
    woken: BTreeMap<(u32, bool), Woken>,
    /// When somebody switched one back, and which.
    fights: Vec<(Instant, (u32, bool))>,
    /// What was counted last, on the way to the host's chains and behind them.
    counted: Option<(u64, u64)>,
    /// The host's firewall seems to drop everything that we forward.
    stuck: Option<u64>,
    unheard: Unheard,
    /// The kernel forwards no IPv6 for us.
    no_ipv6: bool,
    problems: Vec<Problem>,
}

/// Packets that our guards drop.
#[derive(Default)]
struct Unheard {
    /// All since the rules were made.
    dropped: u64,
    /// When there were many, last.
    since: Option<Instant>,
}

impl Unheard {
    fn count(&mut self, now: Instant, dropped: u64) {
        let last = std::mem::replace(&mut self.dropped, dropped);
        if dropped.saturating_sub(last) >= UNHEARD_MIN {
            self.since = Some(now);
        } else if self
            .since
            .is_some_and(|at| now.saturating_duration_since(at) >= UNHEARD_PERIOD)
        {
            self.since = None;
        }
    }
}

/// An interface that we switched.
#[derive(Debug)]
struct Woken {
    name: String,
    /// Whether somebody had switched all interfaces by then.
    all: bool,
}

impl Woken {
    fn entry(&self, v6: bool) -> Entry {
        Entry::Sysctl {
            path: sysctl::path(&self.name, v6),
            before: "0".into(),
            ours: "1".into(),
            unless: (!self.all).then(|| sysctl::path("all", v6)),
        }
    }
}

impl Router {
    pub(super) fn new(table: u8, ledger: Ledger) -> Self {
        Self {
            nft: Nft::open(table),
            opened: false,
            ledger,
            woken: BTreeMap::new(),
            fights: Vec::new(),
            counted: None,
            stuck: None,
            unheard: Unheard::default(),
            no_ipv6: false,
            problems: Vec::new(),
        }
    }

    /// What is not as it is to be, since the last [`Self::settle`].
    pub(super) fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// What of the offered is known not to be forwarded, which nobody is to be sent here for.
    pub(super) fn unserved(&self, overlay: &Overlay) -> BTreeSet<IpNet> {
        let everywhere = overlay.offers_exit.then_some(&EVERYWHERE[..]);
        let offered = overlay
            .offered
            .iter()
            .chain(everywhere.into_iter().flatten());
        let unserved = offered.filter(|net| self.no_ipv6 && net.addr().is_ipv6());
        unserved.copied().collect()
    }

    /// When [`Self::settle`] is due although nothing changed.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let first = self.fights.iter().map(|(at, _)| *at).min()?;
        Some(first + FIGHT_PERIOD)
    }

    /// Makes it as it is to be.
    pub(super) fn settle(
        &mut self,
        now: Instant,
        settings: &Settings,
        tun: &str,
        overlay: &Overlay,
        host: &Host,
    ) {
        self.problems.clear();
        let needed = forwarding::interfaces(settings.tun, overlay, host);
        self.follow_names(host);
        if overlay.may_forward {
            self.put_to_sleep(&needed);
        } else {
            self.put_to_sleep(&BTreeSet::new());
        }
        let asleep = self.asleep(settings.tun, tun, overlay, host, &needed);
        let wake = asleep.iter().map(|(key, _)| *key);
        let wake = wake.filter(|(interface, _)| overlay.may_forward && *interface != settings.tun);
        let guarded = self.woken.keys().copied().chain(wake).collect();
        let chains = firewall::firewall(settings, overlay, host, &guarded);
        let refused = self.set_table(&chains, overlay);
        self.wake(
            now,
            settings.tun,
            overlay.may_forward,
            asleep,
            refused.as_deref(),
        );
        if refused.is_some() {
            self.open_gates(settings, tun, overlay);
        }
        self.tell_stuck(tun);
        if self.unheard.since.is_some() {
            let text = format!(
                "packets from addresses of {V4_RANGE} or {V6_RANGE} came in beside the tunnel and were dropped: if \
                 they are another network's, the host needs a route there (ip route add NETWORK via GATEWAY)"
            );
            self.problem("firewall", text);
        }
    }

    fn problem(&mut self, part: &'static str, text: String) {
        self.problems.push(Problem { part, text });
    }

    /// The chains that could not be made, or none at all where there is no table.
    fn set_table(
        &mut self,
        chains: &[firewall::Chain],
        overlay: &Overlay,
    ) -> Option<Vec<&'static str>> {
        let result = match &mut self.nft {
            Ok(nft) => {
                nft.look();
                nft.set(chains)
            }
            Err(error) => Err(copy(error)),
        };
        let refused: Vec<Refused> = match result {
            Ok(refused) => refused,
            Err(error) => {
                let lost = if overlay.forwards() {
                    "nothing is masqueraded, and the network's addresses are not guarded"
                } else {
                    "the network's addresses are not guarded against senders beside the tunnel"
                };
                let text = format!(
                    "no nftables rules can be made ({error}): {lost}{}",
                    hint(&error)
                );
                self.problem("firewall", text);
                return None;
            }
        };
        for (chain, error) in &refused {
            let lost = match *chain {
                "masquerade" => {
                    "forwarded packets keep the tunnel's addresses, so the subnets need a route back"
                }
                "mss" => "TCP is not told of the tunnel's MTU",
                FORWARD => "other networks of this host are not kept apart",
                THROUGH | PASSED => "what the host's firewall drops is not noticed",
                _ => "the network's addresses are not guarded against senders beside the tunnel",
            };
            let text = format!("nftables refuses the chain {chain} ({error}): {lost}");
            self.problem("firewall", text);
        }
        Some(refused.into_iter().map(|(chain, _)| chain).collect())
    }

    /// An interface that somebody renamed has its values under another name; one that went has none.
    fn follow_names(&mut self, host: &Host) {
        let ledger = &self.ledger;
        self.woken.retain(|(interface, v6), woken| {
            let Some(name) = host.links.get(interface) else {
                ledger.done(&woken.entry(*v6));
                return false;
            };
            if *name != woken.name {
                let old = woken.entry(*v6);
                woken.name.clone_from(name);
                if let Err(error) = ledger.before(woken.entry(*v6)) {
                    tracing::warn!(%error, interface = name, "a kill would leave it forwarding");
                }
                ledger.done(&old);
            }
            true
        });
    }

    /// Gives back what is not needed any more, and leaves what somebody else switched on for all.
    fn put_to_sleep(&mut self, needed: &BTreeSet<(u32, bool)>) {
        let woken = std::mem::take(&mut self.woken);
        for (key, woken) in woken {
            let theirs = !woken.all && sysctl::spread(key.1);
            if needed.contains(&key) && !theirs {
                self.woken.insert(key, woken);
                continue;
            }
            if !theirs
                && let Err(error) = sysctl::switch(&sysctl::path(&woken.name, key.1), false)
                && error.kind() != io::ErrorKind::NotFound
            {
                // Still guarded, and tried again.
                tracing::warn!(%error, interface = woken.name, "it goes on forwarding");
                self.woken.insert(key, woken);
                continue;
            }
            self.ledger.done(&woken.entry(key.1));
        }
    }

    /// The interfaces that do not forward though they should, the tunnel among them, with their names.
    fn asleep(
        &mut self,
        tun: u32,
        tun_name: &str,
        overlay: &Overlay,
        host: &Host,
        needed: &BTreeSet<(u32, bool)>,
    ) -> Vec<((u32, bool), String)> {
        let mut wanted: Vec<((u32, bool), String)> = needed
            .iter()
            .filter_map(|key| Some((*key, host.links.get(&key.0)?.clone())))
            .collect();
        self.no_ipv6 = false;
        for v6 in [false, true] {
            let offered = overlay.offered.iter().any(|net| net.addr().is_ipv6() == v6);
            if (offered || overlay.offers_exit) && (!v6 || host.ipv6) {
                wanted.push(((tun, v6), tun_name.to_owned()));
            }
        }
        wanted.retain(|((_, v6), name)| match sysctl::forwards(name, *v6) {
            Ok(forwards) => !forwards,
            // IPv6 is off there, or the interface has just gone.
            Err(_) if *v6 && !sysctl::has_ipv6(name) => false,
            Err(error) => {
                self.no_ipv6 |= *v6 && error.kind() == io::ErrorKind::NotFound;
                false
            }
        });
        if self.no_ipv6 {
            let text = "IPv6 is not forwarded, so what is offered of it is not announced: this kernel can only switch \
                        that on for all interfaces (they ignore router advertisements then, unless accept_ra is 2): \
                        sysctl -w net/ipv6/conf/all/forwarding=1";
            self.problem("forwarding", text.to_owned());
        }
        wanted.sort();
        wanted.dedup();
        wanted
    }

    /// Has interfaces forward. Not without the rules that say what they may forward: this host is no router between
    /// its other networks. `refused` are the chains that are not there.
    fn wake(
        &mut self,
        now: Instant,
        tun: u32,
        may: bool,
        asleep: Vec<((u32, bool), String)>,
        refused: Option<&[&'static str]>,
    ) {
        self.fights
            .retain(|(at, _)| now.saturating_duration_since(*at) < FIGHT_PERIOD);
        let guarded = refused.is_some_and(|refused| !refused.contains(&FORWARD));
        for ((interface, v6), name) in asleep {
            let family = if v6 { "IPv6" } else { "IPv4" };
            let command = sysctl::command(&name, v6);
            let key = (interface, v6);
            let why = if !may {
                "--forwarding=report".to_owned()
            } else if !guarded && interface != tun {
                "without nftables it would forward between other networks too".to_owned()
            } else if self.fights.iter().filter(|(_, of)| *of == key).count() >= FIGHTS_MAX {
                "another program switches it off again and again".to_owned()
            } else {
                match self.switch_on(now, key, &name, interface == tun) {
                    Ok(()) => continue,
                    Err(error) => error.to_string(),
                }
            };
            let text = format!("{family} is not forwarded by {name} ({why}): {command}");
            self.problem("forwarding", text);
        }
    }

    fn switch_on(
        &mut self,
        now: Instant,
        key: (u32, bool),
        name: &str,
        tun: bool,
    ) -> io::Result<()> {
        let path = sysctl::path(name, key.1);
        // What is the tunnel's own goes with it.
        if tun {
            return sysctl::switch(&path, true);
        }
        let woken = Woken {
            name: name.to_owned(),
            all: sysctl::spread(key.1),
        };
        let entry = woken.entry(key.1);
        self.ledger.before(entry.clone())?;
        match sysctl::switch(&path, true) {
            Ok(()) => {
                if self.woken.insert(key, woken).is_some() {
                    self.fights.push((now, key));
                }
                Ok(())
            }
            Err(error) => {
                if !self.woken.contains_key(&key) {
                    self.ledger.done(&entry);
                }
                Err(error)
            }
        }
    }

    /// Has the host's own chains let pass what is for the tunnel, or says which do not.
    fn open_gates(&mut self, settings: &Settings, tun: &str, overlay: &Overlay) {
        let Ok(nft) = &mut self.nft else {
            return;
        };
        let bases = match nft.bases(tun) {
            Ok(bases) => bases,
            Err(error) => {
                let text = format!("the host's own nftables rules cannot be read: {error}");
                self.problem("firewall", text);
                return;
            }
        };
        // Until there is a network, nobody sends anything.
        let joined = !overlay.addresses.is_empty();
        for base in bases {
            let may = joined && overlay.may_open_firewall;
            let mut failed = None;
            for change in gates(settings, may, overlay.forwards(), &base) {
                self.opened |= matches!(change, Change::Insert(_));
                let result = match change {
                    Change::Insert(gate) => nft.insert(&base, gate, tun, settings.table),
                    Change::Remove(handle) => nft.delete(&base, handle, settings.table),
                };
                match (result, change) {
                    (Ok(()), Change::Insert(gate)) => tracing::info!(
                        table = base.table,
                        chain = base.chain,
                        ?gate,
                        "a rule of ours stands before those of the host's firewall, until the end"
                    ),
                    (Ok(()), Change::Remove(_)) => {}
                    (Err(error), _) => failed = failed.or(Some(error)),
                }
            }
            let missing = base.missing(settings, overlay.forwards());
            let unheard = joined && !missing.is_empty() && (!may || failed.is_some());
            if unheard {
                let mut text = base.describe(tun, &missing);
                if let Some(error) = failed {
                    text.push_str(&format!(" (our own rule is refused: {error})"));
                }
                self.problems.push(Problem {
                    part: "firewall",
                    text,
                });
            }
        }
    }

    /// Looks whether anything of what came out of the tunnel gets past the host's chains, and what our guards have
    /// dropped, since the last look. Whether there is news of either.
    pub(super) fn count(&mut self, now: Instant, overlay: &Overlay) -> bool {
        let before = (self.stuck.is_some(), self.unheard.since.is_some());
        if let Ok(nft) = &mut self.nft
            && let Ok(dropped) = GUARDS.iter().map(|chain| nft.counted(chain)).sum()
        {
            self.unheard.count(now, dropped);
        }
        let counts = match &mut self.nft {
            Ok(nft) if overlay.forwards() => {
                nft.counted(THROUGH).ok().zip(nft.counted(PASSED).ok())
            }
            Ok(_) | Err(_) => None,
        };
        if let (Some((through, passed)), Some((last_through, last_passed))) = (counts, self.counted)
        {
            let came = through.saturating_sub(last_through);
            // A little is no proof of either.
            if passed > last_passed || through < last_through {
                self.stuck = None;
            } else if came >= STUCK_MIN {
                self.stuck = Some(came);
            }
        } else {
            self.stuck = None;
        }
        self.counted = counts;
        before != (self.stuck.is_some(), self.unheard.since.is_some())
    }

    fn tell_stuck(&mut self, tun: &str) {
        // A chain that is known to drop has been told of.
        let known = self
            .problems
            .iter()
            .any(|problem| problem.part == "firewall");
        let Some(packets) = self.stuck.filter(|_| !known) else {
            return;
        };
        let legacy = std::fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
        let command = if legacy.lines().any(|table| table == "filter") {
            format!(
                "it has rules of iptables-legacy: iptables-legacy -I FORWARD -i {tun} -j ACCEPT && \
                 iptables-legacy -I FORWARD -o {tun} -j ACCEPT"
            )
        } else {
            "look for a rule that drops them with `nft list ruleset`".to_owned()
        };
        let text = format!(
            "{packets} packets came out of the tunnel to be forwarded, and the host's firewall let none of them \
             pass: {command}"
        );
        self.problem("firewall", text);
    }

    /// Gives everything back, and gives what stays behind.
    pub(super) fn clean_up(&mut self, settings: &Settings) -> io::Result<()> {
        self.put_to_sleep(&BTreeSet::new());
        let Ok(nft) = &mut self.nft else {
            return Ok(());
        };
        // Where there is no nftables, or we may not use it, we have nothing there.
        let bases = if self.opened {
            nft.bases("")
        } else {
            Ok(Vec::new())
        };
        let bases = bases.and_then(|bases| {
            let gone = bases.iter().map(|base| remove_gates(nft, settings, base));
            // Each is tried.
            gone.fold(Ok(()), Result::and)
        });
        nft.remove().and(bases)
    }
}

fn remove_gates(nft: &mut Nft, settings: &Settings, base: &Base) -> io::Result<()> {
    for change in gates(settings, false, false, base) {
        if let Change::Remove(handle) = change {
            nft.delete(base, handle, settings.table)?;
        }
    }
    Ok(())
}

/// What may help with an error of nftables as a whole.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(nix::libc::EPERM | nix::libc::EACCES) => "; it needs CAP_NET_ADMIN",
        Some(nix::libc::EPROTONOSUPPORT | nix::libc::EOPNOTSUPP | nix::libc::EINVAL) => {
            "; the kernel needs nf_tables: modprobe nf_tables"
        }
        Some(_) | None => "",
    }
}

fn copy(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::state::StateDir;
    use crate::hostnet::settings;
    use crate::testing::start;

    #[expect(clippy::disallowed_methods, reason = "any moment will do")]
    #[test]
    fn without_nftables_it_says_so_and_nothing_is_made_to_forward() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&StateDir::open(dir.path()).unwrap(), Duration::ZERO).unwrap();
        let mut router = Router::new(52, ledger.clone());
        router.nft = Err(io::Error::from_raw_os_error(nix::libc::EPERM));
        let overlay = Overlay {
            offered: ["10.0.0.0/8".parse().unwrap()].into(),
            may_forward: true,
            may_open_firewall: true,
            ..Overlay::default()
        };
        router.settle(
            Instant::now(),
            &settings(),
            "no-such-tun",
            &overlay,
            &Host::default(),
        );
        let [problem] = router.problems() else {
            panic!("{:?}", router.problems());
        };
        assert_eq!(problem.part, "firewall");
        assert!(problem.text.contains("CAP_NET_ADMIN"), "{}", problem.text);
        let asleep = vec![((3, false), "no-such-lan".to_owned())];
        router.wake(Instant::now(), 9, true, asleep, None);
        let last = router.problems().last().unwrap();
        assert_eq!(
            last.text,
            "IPv4 is not forwarded by no-such-lan (without nftables it would forward between other \
             networks too): sysctl -w net/ipv4/conf/no-such-lan/forwarding=1"
        );
        assert!(router.woken.is_empty() && ledger.is_empty());
        assert!(
            !router.count(Instant::now(), &overlay),
            "there is nothing to count"
        );
    }

    #[test]
    fn an_interface_that_cannot_be_put_to_sleep_stays_one_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&StateDir::open(dir.path()).unwrap(), Duration::ZERO).unwrap();
        let mut router = Router::new(52, ledger.clone());
        // A name that no file can have is refused, as every name is where `/proc/sys` is read-only.
        for (index, name) in [(3, "refused\0"), (4, "no-such-lan")] {
            let woken = Woken {
                name: name.into(),
                all: true,
            };
            ledger.before(woken.entry(false)).unwrap();
            router.woken.insert((index, false), woken);
        }
        router.put_to_sleep(&BTreeSet::new());
        assert!(router.woken.keys().eq(&[(3, false)]), "{:?}", router.woken);
        assert!(!ledger.is_empty());
        ledger.done(&router.woken[&(3, false)].entry(false));
        assert!(ledger.is_empty(), "the one that went is struck out");
    }

    #[test]
    fn who_is_not_heard_is_told_of_until_it_was_quiet_for_a_while() {
        let mut unheard = Unheard::default();
        let now = start();
        for (seconds, dropped, told) in [
            (0, 2, false),
            (10, 4, false),
            (20, 9, true),
            (79, 9, true),
            (80, 9, false),
            // The rules were made anew.
            (90, 1, false),
            (100, 4, true),
        ] {
            unheard.count(now + Duration::from_secs(seconds), dropped);
            assert_eq!(unheard.since.is_some(), told, "{seconds} s");
        }
    }

    #[test]
    fn nobody_is_sent_here_for_ipv6_where_the_kernel_forwards_none() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&StateDir::open(dir.path()).unwrap(), Duration::ZERO).unwrap();
        let mut router = Router::new(52, ledger);
        let mut overlay = Overlay {
            offered: ["10.0.0.0/8", "fd07::/64"]
                .map(|net| net.parse().unwrap())
                .into(),
            ..Overlay::default()
        };
        assert_eq!(router.unserved(&overlay), BTreeSet::new());
        router.no_ipv6 = true;
        let lan = "fd07::/64".parse().unwrap();
        assert_eq!(router.unserved(&overlay), BTreeSet::from([lan]));
        overlay.offers_exit = true;
        assert_eq!(
            router.unserved(&overlay),
            BTreeSet::from([lan, EVERYWHERE[1]])
        );
    }

    #[test]
    fn who_switches_all_interfaces_back_at_once_is_counted_once_for_each() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&StateDir::open(dir.path()).unwrap(), Duration::ZERO).unwrap();
        let mut router = Router::new(52, ledger);
        let (now, tun) = (start(), 9);
        let wake = |router: &mut Router, at, keys: &[u32]| {
            router.problems.clear();
            let asleep = keys
                .iter()
                .map(|index| ((*index, false), "no-such-lan".to_owned()));
            router.wake(at, tun, true, asleep.collect(), Some(&[]));
            let left = router.problems.iter();
            left.filter(|problem| problem.text.contains("again and again"))
                .count()
        };
        for index in [3, 4, 5, 6] {
            router.fights.push((now, (index, false)));
        }
        assert_eq!(wake(&mut router, now, &[3, 4, 5, 6]), 0);
        router.fights.extend([(now, (3, false)); FIGHTS_MAX]);
        assert_eq!(wake(&mut router, now, &[3, 4, 5, 6]), 1);
        // It is tried again without anything new to be heard.
        let due = router.poll_timeout().unwrap();
        assert_eq!(due, now + FIGHT_PERIOD);
        assert_eq!(wake(&mut router, due, &[3, 4, 5, 6]), 0);
        assert_eq!(router.poll_timeout(), None);
    }
}
