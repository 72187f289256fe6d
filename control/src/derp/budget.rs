//! Memory for what waits, shared by everybody whom a relay serves: so much in all, so much for one
//! network of a host (/32 or /64), and none for whoever has more than is fair.
//!
//! Every connection has an [`Account`], which is charged with all it makes the relay hold. It may hold
//! as much as is still free for its network, and a network as much as is still free in all, but half
//! of everything at most: so the more is taken, the less may anybody have, whoever has most is the
//! first to lose, and something is always left for a newcomer (the dynamic thresholds of Choudhury and
//! Hahne, 1998, in two levels). A quarter is set aside, of which everybody may have [`FLOOR`] whatever
//! the others hold. Accounts nobody adds to any more do not notice by themselves that they have too
//! much; [`levels`] says what each has to come down to when [`Budget::is_short`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;

use crate::places::networks;

/// Bytes that any account may hold while there are any: a few packets.
pub const FLOOR: usize = 8 << 10;

/// All there is.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    /// What the accounts of a network hold together, and how many they are.
    networks: Mutex<BTreeMap<IpNet, (Arc<AtomicUsize>, usize)>>,
}

/// What one connection makes the relay hold. It is given back when this is dropped.
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    network: IpNet,
    of_network: Arc<AtomicUsize>,
    used: AtomicUsize,
}

/// Something whose size is charged to an account, and the size when that was done last.
#[derive(Debug, Default)]
pub struct Part(usize);

impl Budget {
    /// So many bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            used: AtomicUsize::new(0),
            networks: Mutex::default(),
        }
    }

    /// What is shared by how much one has; the rest is for those who have little.
    fn shared(&self) -> usize {
        self.limit / 4 * 3
    }

    /// Whether so little is free that those with most have to give.
    pub fn is_short(&self) -> bool {
        self.used() > self.shared() / 8 * 7
    }

    /// What all together are to come down to then, in bytes.
    pub fn relaxed(&self) -> usize {
        self.limit / 2
    }

    /// Bytes that are.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// An account for a connection from this address.
    pub fn account(self: &Arc<Self>, source: IpAddr) -> Account {
        let [network, _] = networks(source);
        let mut networks = self.networks.lock().unwrap_or_else(PoisonError::into_inner);
        let (of_network, accounts) = networks.entry(network).or_default();
        *accounts += 1;
        Account {
            budget: Arc::clone(self),
            network,
            of_network: Arc::clone(of_network),
            used: AtomicUsize::new(0),
        }
    }
}

impl Account {
    /// Another one for the same network.
    #[must_use]
    pub fn sibling(&self) -> Self {
        self.budget.account(self.network.addr())
    }

    /// Bytes charged to it.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// For which network it counts.
    pub fn network(&self) -> IpNet {
        self.network
    }

    /// Bytes it may hold as things are.
    pub fn room(&self) -> usize {
        let (shared, used) = (self.budget.shared(), self.budget.used());
        let of_network = self.of_network.load(Ordering::Relaxed);
        let free = shared.saturating_sub(used).min(shared / 2);
        let fair = free.saturating_sub(of_network);
        if used < self.budget.limit {
            fair.max(FLOOR)
        } else {
            fair
        }
    }

    /// Bytes it holds too much.
    pub fn excess(&self) -> usize {
        self.used().saturating_sub(self.room())
    }

    /// Charges `part` with the size it has now.
    pub fn charge(&self, part: &mut Part, bytes: usize) {
        let before = std::mem::replace(&mut part.0, bytes);
        for sum in [&self.used, &self.of_network, &self.budget.used] {
            if bytes > before {
                sum.fetch_add(bytes - before, Ordering::Relaxed);
            } else if bytes < before {
                sum.fetch_sub(before - bytes, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let used = *self.used.get_mut();
        self.of_network.fetch_sub(used, Ordering::Relaxed);
        self.budget.used.fetch_sub(used, Ordering::Relaxed);
        let networks = self.budget.networks.lock();
        let mut networks = networks.unwrap_or_else(PoisonError::into_inner);
        if let Some((_, accounts)) = networks.get_mut(&self.network) {
            *accounts -= 1;
            if *accounts == 0 {
                networks.remove(&self.network);
            }
        }
    }
}

/// What each of the accounts (network, bytes) may keep, so that together they have no more than
/// `most`: those of the networks with most lose, and among them those with most.
pub fn levels(accounts: &[(IpNet, usize)], most: usize) -> Vec<usize> {
    let mut of_network: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
    for (network, used) in accounts {
        of_network.entry(*network).or_default().push(*used);
    }
    let sums = of_network.values().map(|each| each.iter().sum());
    let for_network = level(sums.collect(), most);
    let of_network: BTreeMap<IpNet, usize> = of_network
        .into_iter()
        .map(|(network, each)| (network, level(each, for_network)))
        .collect();
    let keep = accounts
        .iter()
        .map(|(network, used)| (*used).min(of_network[network]));
    keep.collect()
}

/// The height at which all have to be cut off, so that no more than `most` is left.
fn level(mut amounts: Vec<usize>, most: usize) -> usize {
    amounts.sort_unstable();
    let mut left = most;
    for (at, amount) in amounts.iter().enumerate() {
        let share = left / (amounts.len() - at);
        if *amount > share {
            return share;
        }
        left -= amount;
    }
    usize::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u32) -> IpAddr {
        IpAddr::from((0x0a00_0000 + n).to_be_bytes())
    }

    /// Adds to an account until it may have no more.
    fn fill(account: &Account, part: &mut Part, most: usize) {
        while part.0 < most {
            account.charge(part, part.0 + 1000);
            if account.excess() > 0 {
                return account.charge(part, part.0 - 1000);
            }
        }
    }

    #[test]
    fn one_client_may_have_a_quarter_and_one_network_half() {
        let budget = Arc::new(Budget::new(4_000_000));
        let mut all: Vec<_> = (0..100)
            .map(|_| (budget.account(ip(1)), Part::default()))
            .collect();
        let (first, rest) = all.split_first_mut().unwrap();
        fill(&first.0, &mut first.1, usize::MAX);
        assert_eq!(first.1.0, 750_000);
        for (account, part) in rest {
            fill(account, part, usize::MAX);
        }
        let floors = 100 * FLOOR;
        let used = budget.used();
        assert!((1_450_000..=1_500_000 + floors).contains(&used), "{used}");
        // Somebody from elsewhere may have a third of the rest all the same.
        let (other, mut part) = (budget.account(ip(2)), Part::default());
        fill(&other, &mut part, usize::MAX);
        assert!(part.0 >= 200_000, "{}", part.0);
        drop(all);
        assert_eq!(budget.used(), part.0);
        drop(other);
        assert_eq!(budget.used(), 0);
        assert!(budget.networks.lock().unwrap().is_empty());
    }

    #[test]
    fn however_many_come_it_is_never_more_than_all_and_something_is_left() {
        let budget = Arc::new(Budget::new(40_000_000));
        let mut all: Vec<_> = (0..1000)
            .map(|n| (budget.account(ip(n / 3)), Part::default()))
            .collect();
        for round in 0..20 {
            for (account, part) in &mut all {
                // Whoever has too much loses at his next packet.
                let over = account.excess();
                account.charge(part, part.0 - over);
                fill(account, part, 1_000_000);
                assert!(budget.used() <= 40_000_000, "{round}");
            }
        }
        let newcomer = budget.account(ip(5000));
        assert!(newcomer.room() >= FLOOR, "{}", newcomer.room());
        // Where there is nothing left, nobody gets anything.
        let mut part = Part::default();
        newcomer.charge(&mut part, 40_000_000);
        assert_eq!(budget.account(ip(5001)).room(), 0);
        assert!(newcomer.excess() > 0 && budget.is_short());
    }

    #[test]
    fn who_has_most_comes_down_first_networks_before_clients() {
        let (a, b) = (ip(1).into(), ip(2).into());
        // A hundred small ones behind one address, and one that has more than each elsewhere.
        let mut accounts = vec![(a, 10); 100];
        accounts.push((a, 500));
        accounts.push((b, 400));
        let keep = levels(&accounts, 1000);
        assert_eq!(keep[..100], [5; 100]);
        assert_eq!(keep[100], 5);
        assert_eq!(keep[101], 400);
        let sum: usize = keep.iter().sum();
        assert!((900..=1000).contains(&sum), "{sum}");
        // Nobody loses anything when there is enough.
        assert_eq!(levels(&accounts, 1900)[101], 400);
        assert_eq!(levels(&accounts, 1900)[100], 500);
        assert_eq!(levels(&[], 0), [0; 0]);
    }
}
