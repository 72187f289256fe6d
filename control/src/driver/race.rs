//! A connection to whichever address of a host takes one first (RFC 8305, in short).
//!
//! Addresses that are known go at once, all of them. The host's name is asked for the families
//! without one: at once if there is no other address or all of those have failed, else after
//! [`NAME_DELAY`], so that a connection that stands by then costs no look-up and a dead resolver
//! delays nothing. Of what the name gives, the first address of each family goes at once and the
//! others [`STAGGER`] apart, or when one fails. A resolver that fails, or is still silent after
//! [`STALE_DELAY`], lets the addresses go that the name had last.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::clock::{at, now};
use super::names::Names;
use anyhow::bail;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

/// Head start of known addresses over the name.
const NAME_DELAY: Duration = Duration::from_millis(250);
/// How long a fresh answer is waited for while an old one is known.
const STALE_DELAY: Duration = Duration::from_millis(300);
/// Between two addresses of one family.
const STAGGER: Duration = Duration::from_millis(250);

/// What is to be connected.
#[derive(Clone, Debug)]
pub(super) struct Target<'a> {
    /// Addresses that are known, the best first.
    pub(super) known: Vec<IpAddr>,
    /// The host's name,
    pub(super) name: &'a str,
    /// asked for IPv4 addresses,
    pub(super) want_v4: bool,
    /// and for IPv6 addresses.
    pub(super) want_v6: bool,
    pub(super) port: u16,
}

/// Tries until a connection stands; whoever calls says for how long. Dropping the future ends all
/// other attempts.
///
/// # Errors
/// What was wrong with every address and with the name.
pub(super) async fn connect<S, F, E>(
    names: &Names,
    target: &Target<'_>,
    limit: Duration,
    attempt: impl Fn(SocketAddr) -> F,
) -> anyhow::Result<(SocketAddr, S)>
where
    F: Future<Output = Result<S, E>>,
    E: std::fmt::Display,
{
    let mut race = Race {
        target,
        tried: BTreeSet::new(),
        waiting: VecDeque::new(),
    };
    let mut running = FuturesUnordered::new();
    let start = |addr: SocketAddr| {
        let future = attempt(addr);
        async move { (addr, future.await) }
    };
    let mut errors: Vec<String> = Vec::new();
    for addr in race.fresh(target.known.clone()) {
        running.push(start(addr));
    }
    let mut ask_at = (target.want_v4 || target.want_v6).then(|| now() + NAME_DELAY);
    let mut answer = std::pin::pin!(names.look_up(target.name, limit));
    let (mut asking, mut stale_at, mut next_at) = (false, None, None);
    loop {
        if running.is_empty() {
            if let Some(addr) = race.waiting.pop_front() {
                running.push(start(addr));
            } else if ask_at.is_some() {
                ask_at = Some(now());
            } else if !asking {
                bail!(if errors.is_empty() {
                    format!("no usable address of {}", target.name)
                } else {
                    errors.join(", ")
                });
            }
        }
        next_at = next_at.filter(|_| !race.waiting.is_empty());
        let mut found = None;
        tokio::select! {
            Some((addr, result)) = running.next(), if !running.is_empty() => match result {
                Ok(stream) => return Ok((addr, stream)),
                Err(error) => {
                    errors.push(format!("{addr}: {error}"));
                    next_at = next_at.map(|_| now());
                }
            },
            answered = &mut answer, if asking => {
                (asking, stale_at) = (false, None);
                found = Some(answered.unwrap_or_else(|error| {
                    errors.push(error);
                    names.last(target.name)
                }));
            }
            () = at(ask_at) => (ask_at, asking, stale_at) = (None, true, Some(now() + STALE_DELAY)),
            () = at(stale_at) => {
                stale_at = None;
                found = Some(names.last(target.name));
            }
            () = at(next_at) => {
                running.extend(race.waiting.pop_front().map(&start));
                next_at = Some(now() + STAGGER);
            }
        }
        if let Some(found) = found {
            let mut families = BTreeSet::new();
            for addr in race.fresh(found) {
                if families.insert(addr.is_ipv6()) {
                    running.push(start(addr));
                } else {
                    race.waiting.push_back(addr);
                }
            }
            next_at = next_at.or_else(|| Some(now() + STAGGER));
        }
    }
}

struct Race<'a> {
    target: &'a Target<'a>,
    tried: BTreeSet<IpAddr>,
    waiting: VecDeque<SocketAddr>,
}

impl Race<'_> {
    /// Those of the addresses that are wanted and have not been seen, to be tried in this order.
    fn fresh(&mut self, addrs: Vec<IpAddr>) -> Vec<SocketAddr> {
        let target = self.target;
        let wanted = |ip: &IpAddr| {
            target.known.contains(ip)
                || if ip.is_ipv6() {
                    target.want_v6
                } else {
                    target.want_v4
                }
        };
        let mut fresh = addrs;
        fresh.retain(|ip| wanted(ip) && self.tried.insert(*ip));
        let port = target.port;
        fresh
            .into_iter()
            .map(|ip| SocketAddr::new(ip, port))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn target(known: &[&str], want_v4: bool, want_v6: bool) -> Target<'static> {
        Target {
            known: known.iter().map(|text| ip(text)).collect(),
            name: "relay.example",
            want_v4,
            want_v6,
            port: 443,
        }
    }

    /// What is done with an attempt to an address.
    #[derive(Clone, Copy)]
    enum Fate {
        Connects(u64),
        Refuses,
        Hangs,
    }

    /// Runs a race: who won, after how many milliseconds, and who was tried.
    async fn race(
        names: &Names,
        target: &Target<'_>,
        fate: impl Fn(IpAddr) -> Fate,
    ) -> (anyhow::Result<IpAddr>, u128, Vec<String>) {
        let began = now();
        let tried = RefCell::new(Vec::new());
        let result = connect(names, target, LIMIT, |addr| {
            tried.borrow_mut().push(addr.ip().to_string());
            let fate = fate(addr.ip());
            async move {
                match fate {
                    Fate::Connects(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                    Fate::Refuses => return Err(io::Error::other("refused")),
                    Fate::Hangs => std::future::pending().await,
                }
                Ok(())
            }
        })
        .await;
        let took = began.elapsed().as_millis();
        (result.map(|(addr, ())| addr.ip()), took, tried.into_inner())
    }

    fn only_v6_connects(ip: IpAddr, otherwise: Fate) -> Fate {
        if ip.is_ipv6() {
            Fate::Connects(1)
        } else {
            otherwise
        }
    }

    fn dns(answer: &'static [&'static str]) -> Names {
        Names::asking(move |_| Ok(answer.iter().map(|text| ip(text)).collect()))
    }

    #[tokio::test]
    async fn a_known_address_that_connects_costs_no_look_up() {
        let names = Names::asking(|_| panic!("the name was asked"));
        let (won, _, tried) = race(&names, &target(&["192.0.2.1"], false, true), |_| {
            Fate::Connects(1)
        })
        .await;
        assert_eq!(won.unwrap(), ip("192.0.2.1"));
        assert_eq!(tried, ["192.0.2.1"]);
    }

    #[tokio::test]
    async fn the_name_is_asked_for_the_family_without_an_address() {
        let names = dns(&["192.0.2.9", "2001:db8::1"]);
        let fate = |ip| only_v6_connects(ip, Fate::Refuses);
        let (won, _, tried) = race(&names, &target(&["192.0.2.1"], false, true), fate).await;
        assert_eq!(won.unwrap(), ip("2001:db8::1"));
        assert_eq!(tried, ["192.0.2.1", "2001:db8::1"]);
    }

    #[tokio::test]
    async fn an_address_that_hangs_does_not_keep_the_name_from_being_asked() {
        let names = dns(&["192.0.2.9", "2001:db8::1"]);
        let fate = |ip| only_v6_connects(ip, Fate::Hangs);
        let (won, took, _) = race(&names, &target(&["192.0.2.1"], false, true), fate).await;
        assert_eq!(won.unwrap(), ip("2001:db8::1"));
        assert!(took >= NAME_DELAY.as_millis());
    }

    #[tokio::test]
    async fn a_family_that_is_off_is_not_tried() {
        let names = dns(&["192.0.2.9", "2001:db8::1"]);
        let (won, _, tried) = race(&names, &target(&[], true, false), |_| Fate::Refuses).await;
        assert!(won.unwrap_err().to_string().contains("192.0.2.9"));
        assert_eq!(tried, ["192.0.2.9"]);
        let (won, _, tried) = race(&names, &target(&["192.0.2.1"], false, false), |_| {
            Fate::Refuses
        })
        .await;
        assert!(won.is_err());
        assert_eq!(tried, ["192.0.2.1"]);
    }

    #[tokio::test]
    async fn the_last_answer_serves_while_the_resolver_is_silent_or_fails() {
        const SILENCE: Duration = Duration::from_secs(5);
        let asked = std::sync::atomic::AtomicUsize::new(0);
        let (_never, gate) = std::sync::mpsc::channel::<()>();
        let gate = std::sync::Mutex::new(gate);
        let names = Names::asking(move |_| {
            match asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
                0 => return Ok(vec![ip("192.0.2.9")]),
                1 => {}
                _ => drop(gate.lock().unwrap().recv_timeout(SILENCE)),
            }
            Err(io::Error::other("dead"))
        });
        for _ in 0..3 {
            let (won, took, _) =
                race(&names, &target(&[], true, true), |_| Fate::Connects(1)).await;
            assert_eq!(won.unwrap(), ip("192.0.2.9"));
            assert!(took < SILENCE.as_millis(), "{took} ms");
        }
    }

    #[tokio::test]
    async fn a_black_hole_holds_up_the_next_address_for_a_moment_only() {
        let names = dns(&["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"]);
        let fate = |addr: IpAddr| {
            if addr == ip("192.0.2.2") {
                Fate::Refuses
            } else if addr == ip("192.0.2.3") {
                Fate::Connects(1)
            } else {
                Fate::Hangs
            }
        };
        let (won, took, tried) = race(&names, &target(&[], true, true), fate).await;
        assert_eq!(won.unwrap(), ip("192.0.2.3"));
        assert_eq!(tried.len(), 4);
        assert!(took < 5000, "{took} ms");
    }

    #[tokio::test]
    async fn without_any_address_the_error_says_what_was_wrong() {
        let names = Names::asking(|_| Err(io::Error::other("no such host")));
        let (won, ..) = race(&names, &target(&[], true, true), |_| Fate::Hangs).await;
        let error = won.unwrap_err().to_string();
        assert_eq!(error, "cannot resolve relay.example: no such host");
    }
}
