//! Names, answered: the DNS service of the network on this host, and the peer API, which looks them up
//! for those who leave by us.
//!
//! A thread of its own, so that no flood of questions costs the node more than that thread. What is
//! answered and what is passed on decides [`crate::dns`]; the codec is hickory's. Its server is not used: it
//! makes a message of its own of what a resolver answers, where this one hands on the resolver's, and
//! bounds neither connections nor questions at work.
//!
//! Rooms: `server` takes questions, `forward` passes them on, `peerapi` is what peers reach; `direct` looks
//! up, past the tunnel, what the tunnel needs; `silent` knows which resolvers do not answer.

pub(in crate::driver) mod direct;
mod forward;
mod peerapi;
mod server;
mod silent;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle as Task;

use crate::dns::{HostDns, Upstream, Wish};
use crate::netmap::prefix::DNS_SERVICE_V6;
use forward::Over;
#[cfg(test)]
pub(crate) use forward::UDP_ANSWER_LEN_MAX;
use peerapi::PeerApi;
pub(in crate::driver) use peerapi::visit as visit_peerapi;
#[cfg(test)]
pub(crate) use server::FORWARDED_MAX;
use server::{Listening, Resolver, Sockets};

/// What cannot be had of the service's addresses is tried again after this.
const RETRY: Duration = Duration::from_secs(5);

/// What questions are decided by.
#[derive(Clone, Debug, Default)]
struct Settings {
    wish: Arc<Wish>,
    /// Whom the host asked before it asked us.
    host: Arc<[Upstream]>,
    /// The bridges that guests of this host are on: who copies the host's resolv.conf asks there.
    guests: Vec<String>,
}

/// The service, as long as this lives.
pub struct Dns {
    settings: watch::Sender<Arc<Settings>>,
    resolver: Arc<Resolver>,
    listening: watch::Receiver<Listening>,
    silent: watch::Receiver<BTreeSet<Upstream>>,
    ports: [Option<u16>; 2],
    runtime: tokio::runtime::Handle,
    /// Dropped to end the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Dns {
    /// Starts the thread, and opens the peer API on the tunnel's interface. Until there is a wish, nothing is
    /// answered.
    ///
    /// # Errors
    /// When a thread cannot be had.
    pub fn start(tun: &str) -> anyhow::Result<Self> {
        let api = PeerApi::open(tun);
        let ports = api.ports();
        let (settings, wished) = watch::channel(Arc::new(Settings::default()));
        let resolver = Arc::new(Resolver::new(wished.clone()));
        let silent = resolver.silent.subscribe();
        let (listens, listening) = watch::channel(Listening::default());
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime of the DNS service")?;
        let handle = runtime.handle().clone();
        let thread = std::thread::Builder::new().name("dns".into()).spawn({
            let resolver = Arc::clone(&resolver);
            let tun = tun.to_owned();
            move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        () = api.serve(wished.clone(), Arc::clone(&resolver)) => {}
                        () = run(Sockets::new(&tun, Arc::clone(&resolver)), wished.clone(), &listens) => {}
                    }
                });
            }
        });
        Ok(Self {
            settings,
            resolver,
            listening,
            silent,
            ports,
            runtime: handle,
            stop: Some(stop),
            thread: Some(thread.context("cannot start the thread of the DNS service")?),
        })
    }

    /// TCP ports of the peer API, IPv4 and IPv6.
    pub fn peerapi(&self) -> [Option<u16>; 2] {
        self.ports
    }

    /// Answers by this from now on.
    pub fn set_wish(&self, wish: Arc<Wish>) {
        self.settings
            .send_modify(|settings| Arc::make_mut(settings).wish = wish);
    }

    /// Whom the host asked before it asked us.
    pub fn set_host_resolvers(&self, servers: Vec<SocketAddr>) {
        let host: Arc<[Upstream]> = servers.into_iter().map(Upstream::Plain).collect();
        self.settings.send_if_modified(|settings| {
            let changed = settings.host != host;
            if changed {
                Arc::make_mut(settings).host = host;
            }
            changed
        });
    }

    /// Interfaces of this host, beside the tunnel, from which it is asked as from the host itself.
    pub fn set_guests(&self, guests: Vec<String>) {
        self.settings.send_if_modified(|settings| {
            let changed = settings.guests != guests;
            if changed {
                Arc::make_mut(settings).guests = guests;
            }
            changed
        });
    }

    /// What the network wants of the host's resolver, if anything: nothing while nobody of ours answers it.
    pub fn host_wish(&self) -> Option<HostDns> {
        let mut host = self.settings.borrow().wish.host.clone()?;
        let listening = self.listening.borrow();
        let there = |server: &IpAddr| listening.addresses.contains(server);
        let other = IpAddr::from(DNS_SERVICE_V6);
        if !host.servers.contains(&other) {
            // Only if the first is not to be had.
            host.servers.push(other);
        }
        host.servers.retain(there);
        host.servers.truncate(1);
        (!host.servers.is_empty()).then_some(host)
    }

    /// Waits until other places are listened on, or other problems are met.
    pub async fn changed(&mut self) {
        let ended = tokio::select! {
            changed = self.listening.changed() => changed.is_err(),
            changed = self.silent.changed() => changed.is_err(),
        };
        if ended {
            // The thread panicked; the process ends.
            std::future::pending::<()>().await;
        }
    }

    /// Whether what the host's resolver asks for names outside of the network may be behind the tunnel.
    pub fn is_behind_tunnel(&self) -> bool {
        self.settings.borrow().wish.behind_tunnel
    }

    /// What is not as it should be, in sentences.
    pub fn problems(&self) -> Vec<String> {
        let settings = Arc::clone(&self.settings.borrow());
        let mut problems: Vec<String> = self.listening.borrow().problem.iter().cloned().collect();
        problems.extend(settings.wish.problems());
        let silent = self.silent.borrow();
        let asked = silent.iter().filter(|upstream| {
            settings.host.contains(upstream) || settings.wish.zones.asks(upstream)
        });
        problems.extend(
            asked.map(|upstream| format!("the resolver {upstream} does not answer, or too late")),
        );
        problems
    }

    /// How it stands, for people.
    pub fn status(&self) -> Value {
        let settings = Arc::clone(&self.settings.borrow());
        let mut status = settings.wish.status();
        let host = settings.host.iter().map(Upstream::to_string);
        status["host_resolvers"] = host.collect();
        status["problems"] = self.problems().into();
        let counters = self.resolver.counters.snapshot();
        status["counters"] = counters
            .into_iter()
            .map(|(name, n)| (name.to_owned(), n.into()))
            .collect::<serde_json::Map<_, _>>()
            .into();
        status
    }

    /// Looks a name up as the host would; the answer, for people, is at the end of the task.
    pub fn query(&self, name: &str, kind: &str) -> Task<Value> {
        let asked = read_kind(name, kind).and_then(|(name, kind)| question(&name, kind));
        let resolver = Arc::clone(&self.resolver);
        self.runtime.spawn(async move {
            let question = match asked {
                Ok(question) => question,
                Err(error) => return json!({"error": error}),
            };
            let answer = resolver.answer(&question, Over::Stream).await;
            match answer.map(|answer| Message::from_vec(&answer)) {
                Some(Ok(answer)) => describe(&answer),
                Some(Err(error)) => json!({"error": error.to_string()}),
                None => json!({"error": "no answer"}),
            }
        })
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // If it panicked, that has been printed.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dns")
    }
}

/// Listens while there is something to answer for.
async fn run(
    mut sockets: Sockets,
    mut wished: watch::Receiver<Arc<Settings>>,
    listens: &watch::Sender<Listening>,
) {
    loop {
        let (addresses, guests) = places(&wished.borrow_and_update());
        let listening = sockets.listen(&addresses, &guests);
        let again = listening.problem.is_some();
        listens.send_if_modified(|known| {
            let changed = *known != listening;
            if let Some(error) = listening.problem.as_ref().filter(|_| changed) {
                tracing::warn!(error, "names are not answered for everywhere");
            }
            *known = listening;
            changed
        });
        let another = async {
            while wished.changed().await.is_ok() {
                let (now, beside) = places(&wished.borrow_and_update());
                if now != addresses || beside != guests {
                    return true;
                }
            }
            false
        };
        tokio::select! {
            () = tokio::time::sleep(RETRY), if again => {}
            go_on = another => if !go_on { return },
        }
    }
}

/// Where questions are answered: addresses, and interfaces beside the tunnel.
fn places(settings: &Settings) -> (Vec<IpAddr>, Vec<String>) {
    (settings.wish.service(), settings.guests.clone())
}

/// The type of record that a person means; an address stands for the name that it has.
fn read_kind(name: &str, kind: &str) -> Result<(String, RecordType), String> {
    let kind = kind.to_ascii_uppercase();
    let kind: RecordType = kind
        .parse()
        .map_err(|_| format!("{kind:?} is no type of record"))?;
    match (kind, name.parse::<IpAddr>()) {
        (RecordType::PTR, Ok(ip)) => Ok((Name::from(ip).to_ascii(), kind)),
        _ => Ok((name.to_owned(), kind)),
    }
}

/// A question as a message.
fn question(name: &str, kind: RecordType) -> Result<Vec<u8>, String> {
    let mut name = Name::from_str_relaxed(name).map_err(|error| format!("{name:?}: {error}"))?;
    name.set_fqdn(true);
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, kind));
    message.to_vec().map_err(|error| error.to_string())
}

fn describe(answer: &Message) -> Value {
    let records = answer.answers.iter().map(|record| {
        json!({
            "name": record.name.to_string(),
            "type": record.record_type().to_string(),
            "ttl_s": record.ttl,
            "data": record.data.to_string(),
        })
    });
    json!({
        "code": answer.metadata.response_code.to_string(),
        "answers": records.collect::<Vec<_>>(),
    })
}
