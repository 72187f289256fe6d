//! Host names to addresses, by the system's resolver (`getaddrinfo`), which knows the hosts file and
//! whatever else this host asks, and past it ([`direct`]): first while what it asks may be behind the
//! tunnel, else where it knows no answer, for it may ask us.
//!
//! It blocks, and a DNS server that does not answer holds it for ten seconds and longer. So each
//! look-up has a thread of its own, [`THREADS_MAX`] at most, and the names beyond that wait; whoever
//! asks for a name that is being looked up joins in, and nobody waits longer than he likes. The
//! threads are not the runtime's: it would wait for them before the process could end.
//!
//! The last good answer of a name stays known ([`Names::last`]), for when a new look-up fails.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;

use super::dns::direct;

/// Look-ups at a time.
pub const THREADS_MAX: usize = 16;
/// Names that are remembered, or wait for a thread.
pub const NAMES_MAX: usize = 1024;

/// The resolver. Clones are the same.
#[derive(Clone)]
pub struct Names(Arc<Inner>);

/// How names are asked for past the system's resolver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// The servers that it asked before it asked us.
    pub servers: Vec<SocketAddr>,
    /// Where it looks for names without a dot.
    pub search: Vec<String>,
    /// They are asked before it.
    pub first: bool,
    /// Mark of the sockets; 0 is none.
    pub fwmark: u32,
}

/// Blocks until it knows the addresses of a name.
type Ask = Box<dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync>;

/// The end of a look-up: addresses, or what was wrong.
type Answer = Result<Vec<IpAddr>, String>;

struct Inner {
    ask: Ask,
    past: Arc<Mutex<Option<Past>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    names: BTreeMap<String, Entry>,
    waiting: VecDeque<String>,
    threads: usize,
}

#[derive(Default)]
struct Entry {
    last: Vec<IpAddr>,
    /// Where the answer of the look-up under way appears.
    running: Option<watch::Sender<Option<Answer>>>,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Names")
    }
}

impl Default for Names {
    fn default() -> Self {
        let past: Arc<Mutex<Option<Past>>> = Arc::default();
        let asked = Arc::clone(&past);
        let ask = move |name: &str| {
            let system = || -> io::Result<Vec<IpAddr>> {
                Ok((name, 0).to_socket_addrs()?.map(|addr| addr.ip()).collect())
            };
            let past = super::lock(&asked).clone();
            let Some(past) = past.filter(|past| !past.servers.is_empty()) else {
                return system();
            };
            let direct = || direct::look_up(name, &past.search, &past.servers, past.fwmark);
            if past.first {
                direct().or_else(|_| system())
            } else {
                system().or_else(|_| direct())
            }
        };
        Self(Arc::new(Inner {
            ask: Box::new(ask),
            past,
            state: Mutex::default(),
        }))
    }
}

impl Names {
    /// Asks this instead of the host's resolver, on a thread where it may take its time.
    #[cfg(test)]
    pub(super) fn asking(
        ask: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Inner {
            ask: Box::new(ask),
            past: Arc::default(),
            state: Mutex::default(),
        }))
    }

    /// Asks past the system's resolver from now on, or no more.
    pub fn set_past(&self, past: Option<Past>) {
        *super::lock(&self.0.past) = past;
    }

    /// Looks a name up, and waits so long for the answer; what comes later is the answer to whoever
    /// asks then. An address is its own answer.
    ///
    /// # Errors
    /// Why there is no address, for people.
    pub async fn look_up(&self, name: &str, limit: Duration) -> Result<Vec<IpAddr>, String> {
        if let Ok(address) = name.parse() {
            return Ok(vec![address]);
        }
        let mut answer = self.start(name)?;
        match tokio::time::timeout(limit, answer.wait_for(Option::is_some)).await {
            Ok(Ok(answer)) => answer.clone().unwrap_or_else(|| Err(no_answer(name))),
            Ok(Err(_)) | Err(_) => Err(no_answer(name)),
        }
    }

    /// The last good answer, empty if there never was one.
    pub fn last(&self, name: &str) -> Vec<IpAddr> {
        let state = self.0.lock();
        state
            .names
            .get(name)
            .map(|entry| entry.last.clone())
            .unwrap_or_default()
    }

    /// Starts a look-up, or joins the one under way.
    fn start(&self, name: &str) -> Result<watch::Receiver<Option<Answer>>, String> {
        let mut state = self.0.lock();
        if let Some(running) = state.names.get(name).and_then(|e| e.running.as_ref()) {
            return Ok(running.subscribe());
        }
        if state.names.len() >= NAMES_MAX && !state.names.contains_key(name) {
            let idle = state.names.iter().find(|(_, e)| e.running.is_none());
            let idle = idle.map(|(name, _)| name.clone());
            let idle = idle.ok_or_else(|| format!("too many names wait for {name}"))?;
            state.names.remove(&idle);
        }
        let (sender, receiver) = watch::channel(None);
        state.names.entry(name.to_owned()).or_default().running = Some(sender);
        state.waiting.push_back(name.to_owned());
        if state.threads < THREADS_MAX {
            state.threads += 1;
            let inner = Arc::clone(&self.0);
            let thread = std::thread::Builder::new().name("rt-names".into());
            if let Err(error) = thread.spawn(move || inner.work()) {
                state.threads -= 1;
                if state.threads == 0 {
                    state.waiting.retain(|waits| waits != name);
                    state.finish(name, Err(format!("cannot look {name} up: {error}")));
                }
            }
        }
        Ok(receiver)
    }
}

fn no_answer(name: &str) -> String {
    format!("cannot resolve {name}: no answer in time")
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        super::lock(&self.state)
    }

    /// The body of a thread: looks up what waits, and ends when nothing does.
    fn work(&self) {
        loop {
            let name = {
                let mut state = self.lock();
                let Some(name) = state.waiting.pop_front() else {
                    state.threads -= 1;
                    return;
                };
                name
            };
            let answer = match (self.ask)(&name) {
                Ok(found) if found.is_empty() => Err(format!("{name} has no address")),
                Ok(found) => Ok(found),
                Err(error) => Err(format!("cannot resolve {name}: {error}")),
            };
            self.lock().finish(&name, answer);
        }
    }
}

impl State {
    fn finish(&mut self, name: &str, answer: Answer) {
        let Some(entry) = self.names.get_mut(name) else {
            return;
        };
        if let Ok(found) = &answer {
            entry.last.clone_from(found);
        }
        if let Some(running) = entry.running.take() {
            running.send_replace(Some(answer));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(10);

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[tokio::test]
    async fn an_address_is_its_own_answer_and_localhost_has_one() {
        let names = Names::default();
        assert_eq!(names.look_up("192.0.2.7", LONG).await, Ok(vec![ip(7)]));
        let found = names.look_up("localhost", LONG).await.unwrap();
        assert!(!found.is_empty() && found.iter().all(IpAddr::is_loopback));
        assert_eq!(names.last("localhost"), found);
        assert!(names.look_up("name.invalid", LONG).await.is_err());
        // What the servers outside of the tunnel do not know, the system may.
        let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let servers = vec![nobody.local_addr().unwrap()];
        drop(nobody);
        for first in [true, false] {
            names.set_past(Some(Past {
                servers: servers.clone(),
                first,
                ..Past::default()
            }));
            let found = names.look_up("127.1", LONG).await.unwrap();
            assert!(found.iter().all(IpAddr::is_loopback));
        }
    }

    #[tokio::test]
    async fn a_slow_look_up_is_joined_and_its_late_answer_is_not_lost() {
        let (go, gate) = mpsc::channel::<()>();
        let gate = Mutex::new(gate);
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let names = Names::asking(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            let _ = gate.lock().unwrap().recv();
            Ok(vec![ip(1)])
        });
        let error = names.look_up("relay.example", SHORT).await.unwrap_err();
        assert!(error.contains("no answer in time"), "{error}");
        let second = {
            let names = names.clone();
            tokio::spawn(async move { names.look_up("relay.example", LONG).await })
        };
        tokio::task::yield_now().await;
        go.send(()).unwrap();
        assert_eq!(second.await.unwrap(), Ok(vec![ip(1)]));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(names.last("relay.example"), [ip(1)]);
    }

    #[tokio::test]
    async fn a_failure_leaves_the_last_good_answer() {
        let asked = AtomicUsize::new(0);
        let names = Names::asking(move |_| match asked.fetch_add(1, Ordering::Relaxed) {
            0 => Ok(vec![ip(1)]),
            _ => Err(io::Error::other("no such host")),
        });
        assert_eq!(names.look_up("a", LONG).await, Ok(vec![ip(1)]));
        let error = names.look_up("a", LONG).await.unwrap_err();
        assert_eq!(error, "cannot resolve a: no such host");
        assert_eq!(names.last("a"), [ip(1)]);
    }

    #[tokio::test]
    async fn names_are_looked_up_side_by_side_by_a_bounded_number_of_threads() {
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (r, m) = (Arc::clone(&running), Arc::clone(&most));
        let (go, gate) = mpsc::channel::<()>();
        let gate = Mutex::new(gate);
        let names = Names::asking(move |_| {
            let now = r.fetch_add(1, Ordering::SeqCst) + 1;
            m.fetch_max(now, Ordering::SeqCst);
            let _ = gate.lock().unwrap().recv();
            r.fetch_sub(1, Ordering::SeqCst);
            Ok(vec![ip(1)])
        });
        let all: Vec<_> = (0..3 * THREADS_MAX)
            .map(|n| {
                let names = names.clone();
                tokio::spawn(async move { names.look_up(&format!("n{n}"), LONG).await })
            })
            .collect();
        for _ in 0..500 {
            if running.load(Ordering::SeqCst) == THREADS_MAX {
                break;
            }
            tokio::time::sleep(SHORT).await;
        }
        assert_eq!(running.load(Ordering::SeqCst), THREADS_MAX);
        drop(go);
        for one in all {
            assert_eq!(one.await.unwrap(), Ok(vec![ip(1)]));
        }
        assert_eq!(most.load(Ordering::SeqCst), THREADS_MAX);
    }

    #[tokio::test]
    async fn the_names_that_are_remembered_have_a_bound() {
        let names = Names::asking(|_| Ok(vec![ip(1)]));
        for n in 0..NAMES_MAX + 10 {
            names.look_up(&format!("n{n}"), LONG).await.unwrap();
        }
        assert_eq!(names.0.lock().names.len(), NAMES_MAX);
    }
}
