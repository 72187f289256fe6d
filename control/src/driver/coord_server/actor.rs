//! The one task that owns the state, and the questions it answers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::counters::Counters;
use super::{Client, Settings, Shared};
use crate::coord::admin::{Change, Done, Order, Refusal};
use crate::coord::auth_key;
use crate::coord::auth_key::KeyCheck;
use crate::coord::server::{
    Applicant, Code, MapAnswer, MapRefusal, Registration, Server, SessionId, Waits, Write,
    is_logout,
};
use crate::driver::clock::{at, now, wall};
use crate::driver::coord_store::{Database, Store};
use crate::driver::places::Door;
use crate::key::{MachinePublic, NodePublic};
use crate::netmap::wire::{MapRequest, MapResponse, RegisterRequest, RegisterResponse};
use crate::places::limit::{FailureLimit, LogLimit};

/// Messages a map stream may be behind; what comes later is folded into one difference.
const STREAM_QUEUE_MAX: usize = 2;

/// How long a change may wait to be written behind.
const WRITE_DELAY: Duration = Duration::from_secs(2);

/// A user that nobody has added may be a slip.
pub(super) fn tell_unknown_users(server: &Server) {
    let unknown = server.unknown_users();
    if !unknown.is_empty() {
        let users = unknown.join(", ");
        tracing::warn!(
            users,
            "the policy names users that there are not, or not yet"
        );
    }
}

/// A question to the actor.
#[derive(Debug)]
pub(super) enum Ask {
    /// A machine has proven its key.
    Greet(Client, oneshot::Sender<()>),
    Register(
        Client,
        IpAddr,
        Box<RegisterRequest>,
        oneshot::Sender<Registered>,
    ),
    Map(
        Client,
        Box<MapRequest>,
        oneshot::Sender<Result<Mapped, MapRefusal>>,
    ),
    Verify(NodePublic, oneshot::Sender<bool>),
    Settings(Box<Settings>),
    Order(Order, oneshot::Sender<Result<Done, String>>),
    Stop(oneshot::Sender<()>),
}

#[derive(Debug)]
pub(super) enum Registered {
    /// In place of a URL it has the code that belongs there.
    Answer(RegisterResponse),
    /// A person has to approve it, before this time: ask again when the sender is gone.
    Wait(watch::Receiver<()>, Instant),
    /// Too many wait for that.
    Crowded(Duration),
    TooMany(Duration),
    StoreFailed,
}

#[derive(Debug)]
pub(super) enum Mapped {
    Taken,
    Once(Box<MapResponse>),
    Stream(SessionId, mpsc::Receiver<MapResponse>),
}

/// Owns the state; every question passes through here, one at a time.
pub(super) struct Actor {
    server: Server,
    store: Store,
    counters: Arc<Counters>,
    door: Arc<Door<MachinePublic>>,
    streams: BTreeMap<SessionId, mpsc::Sender<MapResponse>>,
    failures: FailureLimit,
    refusals: LogLimit,
    applications: LogLimit,
    /// Dropped when a code is settled.
    waiting: BTreeMap<Code, watch::Sender<()>>,
    write_at: Option<Instant>,
}

/// What a host calls itself, fit for a log.
fn host_name(hostinfo: &serde_json::Value) -> String {
    let name = hostinfo["Hostname"].as_str().unwrap_or_default();
    name.chars().take(63).collect()
}

impl Actor {
    /// An actor that nobody waits for yet.
    pub(super) fn new(server: Server, store: Store, shared: &Shared) -> Self {
        Self {
            server,
            store,
            counters: Arc::clone(&shared.counters),
            door: Arc::clone(&shared.door),
            streams: BTreeMap::new(),
            failures: FailureLimit::default(),
            refusals: LogLimit::default(),
            applications: LogLimit::default(),
            waiting: BTreeMap::new(),
            write_at: None,
        }
    }

    pub(super) async fn run(
        mut self,
        mut asked: mpsc::Receiver<Ask>,
        mut ends: mpsc::UnboundedReceiver<SessionId>,
    ) {
        let mut timeout = self.server.poll_timeout();
        loop {
            tokio::select! {
                ask = asked.recv() => match ask {
                    Some(Ask::Stop(done)) => {
                        self.write().await;
                        let _ = done.send(());
                        return;
                    }
                    // What strangers may ask for ever is not to cost a look at every stream.
                    Some(ask) => if !self.handle(ask).await {
                        continue;
                    },
                    None => return,
                },
                Some(id) = ends.recv() => self.end(id),
                () = at(timeout) => self.server.handle_timeout(now(), wall()),
                () = at(self.write_at) => self.write().await,
            }
            self.tell_left_out();
            for code in self.server.take_settled() {
                self.waiting.remove(&code);
            }
            self.pump();
            self.forget();
            timeout = self.server.poll_timeout();
            if self.write_at.is_none() && self.server.has_writes() {
                self.write_at = Some(now() + WRITE_DELAY);
            }
        }
    }

    /// Answers; whether anything may have changed.
    async fn handle(&mut self, ask: Ask) -> bool {
        match ask {
            Ask::Greet(client, answer) => {
                self.recognise(&client);
                let _ = answer.send(());
                false
            }
            Ask::Register(client, source, request, answer) => {
                let machine = client.machine;
                let registered = self.register(machine, source, &request).await;
                self.tell_refusal(machine, source, &request, &registered);
                self.recognise(&client);
                // What could not be stored is to be tried again: there is something to do.
                let refused = match &registered {
                    Registered::Answer(answer) => !answer.error.is_empty(),
                    Registered::TooMany(_) | Registered::Crowded(_) => true,
                    // There is a new time to look at.
                    Registered::Wait(..) => false,
                    Registered::StoreFailed => false,
                };
                let _ = answer.send(registered);
                !refused
            }
            Ask::Map(client, request, answer) => {
                let wall = wall();
                let random = rand::random();
                let mapped = self
                    .server
                    .handle_map(now(), wall, client.machine, &request, random);
                let refused = mapped.is_err();
                let mapped = mapped.map(|mapped| match mapped {
                    MapAnswer::Taken => Mapped::Taken,
                    MapAnswer::Once(message) => Mapped::Once(message),
                    MapAnswer::Stream(id) => {
                        // One more for the last message.
                        let (sender, receiver) = mpsc::channel(STREAM_QUEUE_MAX + 1);
                        self.streams.insert(id, sender);
                        Mapped::Stream(id, receiver)
                    }
                });
                // The asker may be gone; then its stream ends with the receiver.
                if let Err(Ok(Mapped::Stream(id, ..))) = answer.send(mapped) {
                    self.end(id);
                }
                !refused
            }
            Ask::Verify(key, answer) => {
                let member = self.server.is_member(key);
                let _ = answer.send(member);
                false
            }
            Ask::Settings(settings) => {
                let Settings {
                    derp_map,
                    dns,
                    policy,
                } = *settings;
                if let Some(derp_map) = derp_map {
                    self.server.set_derp_map(now(), derp_map);
                }
                if let Some(dns) = dns {
                    self.server.set_dns(now(), dns);
                }
                if let Some(policy) = policy {
                    self.learn_users().await;
                    self.server.set_policy(now(), Some(policy));
                    tell_unknown_users(&self.server);
                }
                true
            }
            Ask::Order(order, answer) => {
                let _ = answer.send(self.carry_out(&order).await);
                true
            }
            Ask::Stop(_) => false,
        }
    }

    /// A machine is known if a node of it is stored, and for nothing else.
    fn recognise(&self, client: &Client) {
        if self.server.knows(client.machine) && !client.place.is_known() {
            client.place.settle(client.machine);
        }
    }

    /// Machines whose nodes are gone are strangers, also on connections that stand.
    fn forget(&mut self) {
        for machine in self.server.take_forgotten() {
            self.door.estrange(machine);
        }
    }

    async fn register(
        &mut self,
        machine: MachinePublic,
        source: IpAddr,
        request: &RegisterRequest,
    ) -> Registered {
        let wall = wall();
        let text = request.auth.as_ref().map(|auth| auth.auth_key.clone());
        let text = text.filter(|text| !text.is_empty());
        let key = match text {
            Some(text) if !self.server.needs_no_key(wall, machine, request) => {
                if let Some(wait) = self.failures.check(now(), source) {
                    return Registered::TooMany(wait);
                }
                let name = auth_key::name(&text);
                let found = self
                    .store
                    .call(move |database| database.find_key(&name))
                    .await;
                match found {
                    Ok(key) => KeyCheck::of(&text, key.as_ref(), wall),
                    Err(error) => return self.store_failed(&error),
                }
            }
            Some(_) | None => KeyCheck::Absent,
        };
        if let KeyCheck::Valid { user, .. } = key
            && !self.server.knows_user(user)
        {
            self.learn_users().await;
        }
        let code = Code::new(rand::random());
        let plan = self
            .server
            .plan_register(wall, machine, request, &key, code);
        if let KeyCheck::Unknown | KeyCheck::Expired | KeyCheck::Used = key {
            self.failures.handle_failure(now(), source);
        }
        match &plan {
            Registration::Answer(answer) => return Registered::Answer(answer.clone()),
            Registration::Pending(applicant) => {
                return self.put_off(source, Applicant::clone(applicant));
            }
            Registration::Insert(record, _)
            | Registration::Rekey(record, _)
            | Registration::Expire(record) => {
                tracing::info!(node = record.id, name = record.name, machine = %machine.short(),
                               key = %record.node_key.short(), "registration");
            }
            Registration::Delete(_) => {}
        }
        match self.commit(plan).await {
            Ok(Some(answer)) => Registered::Answer(answer),
            Ok(None) => Registered::Answer(RegisterResponse {
                error: KeyCheck::Used.error().unwrap_or_default().to_owned(),
                ..RegisterResponse::default()
            }),
            Err(error) => self.store_failed(&error),
        }
    }

    /// Users are added in the store, beside a running server.
    async fn learn_users(&mut self) {
        match self.store.call(|database| database.users()).await {
            Ok(users) => self.server.set_users(users),
            Err(error) => drop(self.store_failed(&error)),
        }
    }

    /// Has a machine wait for a person.
    fn put_off(&mut self, source: IpAddr, applicant: Applicant) -> Registered {
        let code = applicant.code;
        let name = host_name(&applicant.hostinfo);
        match self.server.handle_applicant(now(), source, applicant) {
            Waits::Told(answer) => {
                if let Some(left_out) = self.applications.admit(now()) {
                    tracing::info!(%source, ?name, left_out, "a machine asks to be let in: \
                                   ringtail coord nodes approve {code}");
                }
                Registered::Answer(answer)
            }
            Waits::Until(code, until) => {
                let settled = self.waiting.entry(code);
                let settled = settled.or_insert_with(|| watch::Sender::new(()));
                Registered::Wait(settled.subscribe(), until)
            }
            Waits::Full(wait) => Registered::Crowded(wait),
        }
    }

    /// Writes to the log whom we did not let in and why; never the key that was shown.
    fn tell_refusal(
        &mut self,
        machine: MachinePublic,
        source: IpAddr,
        request: &RegisterRequest,
        registered: &Registered,
    ) {
        let why = match registered {
            Registered::Answer(answer) if !answer.error.is_empty() => answer.error.as_str(),
            Registered::Answer(answer)
                if answer.node_key_expired && !is_logout(wall(), request) =>
            {
                "its key has expired, and it shows no auth key"
            }
            Registered::TooMany(_) => "too many bad auth keys from this address",
            Registered::Crowded(_) => "too many machines wait for approval",
            // Let in, logged out, waiting, or in the log already.
            Registered::Answer(_) | Registered::Wait(..) | Registered::StoreFailed => return,
        };
        let Some(left_out) = self.refusals.admit(now()) else {
            return;
        };
        let name = request.hostinfo.as_ref().map(host_name).unwrap_or_default();
        tracing::warn!(%source, ?name, machine = %machine.short(), why, "a join was refused");
        if left_out > 0 {
            tracing::warn!(
                left_out,
                "more joins were refused than the log has lines for"
            );
        }
    }

    /// Plans an order, commits it, then puts it into force.
    async fn carry_out(&mut self, order: &Order) -> Result<Done, String> {
        let done = match order {
            Order::Node { node, change } => self.change(node, change).await,
            Order::Admit { code, user } => self.let_in(code, user.as_deref()).await,
        }?;
        self.counters.orders.add(1);
        tracing::info!(
            node = done.id,
            name = done.name,
            ?order,
            "an administrator's order"
        );
        Ok(done)
    }

    /// Lets a machine in that waits.
    async fn let_in(&mut self, code: &str, user: Option<&str>) -> Result<Done, String> {
        self.learn_users().await;
        let plan = self.server.plan_approval(wall(), code, user);
        let plan = plan.map_err(|refusal| refusal.to_string())?;
        let done = plan.record().map(|record| Done::of(record, true));
        match self.commit(plan).await {
            Ok(_) => done.ok_or_else(|| Refusal::NoSuchCode(code.to_owned()).to_string()),
            Err(error) => Err(self.cannot_store(&error)),
        }
    }

    async fn change(&mut self, node: &str, change: &Change) -> Result<Done, String> {
        let wall = wall();
        let planned = self.server.plan_change(node, change, wall);
        let (write, done) = planned.map_err(|refusal| refusal.to_string())?;
        if let Some(mut write) = write {
            self.server.complete(wall, &mut write);
            self.write().await;
            let copy = [write.clone()];
            if let Err(error) = self.store.call(move |database| database.write(&copy)).await {
                return Err(self.cannot_store(&error));
            }
            self.server.put(now(), write);
        }
        Ok(done)
    }

    /// Counts the routes that some node announced in vain.
    fn tell_left_out(&mut self) {
        let left_out = self.server.take_left_out();
        let more = u64::try_from(left_out).unwrap_or(u64::MAX);
        self.counters.routes_left_out.add(more);
    }

    /// Commits, then applies; none when the auth key is used up by now. What waits to be written goes
    /// first, so that names and addresses that became free are free in the store too.
    async fn commit(&mut self, plan: Registration) -> anyhow::Result<Option<RegisterResponse>> {
        self.write().await;
        let host = plan.record().map_or(0, |new| self.server.host_number(new));
        let copy = plan.clone();
        let commit = move |database: &mut Database| database.commit(&copy, host);
        let committed = self.store.call(commit).await?;
        Ok(committed.then(|| self.server.apply(now(), plan)))
    }

    /// What an administrator is told then.
    fn cannot_store(&self, error: &anyhow::Error) -> String {
        self.store_failed(error);
        format!("the server cannot store this now: {error:#}")
    }

    fn store_failed(&self, error: &anyhow::Error) -> Registered {
        tracing::error!(
            error = format!("{error:#}"),
            "the state file cannot be used"
        );
        self.counters.store_errors.add(1);
        Registered::StoreFailed
    }

    /// Writes what was collected; what fails stays to be written.
    async fn write(&mut self) {
        self.write_at = None;
        let writes = self.server.take_writes();
        if writes.is_empty() {
            return;
        }
        let writes: Arc<[Write]> = writes.into();
        let copy = Arc::clone(&writes);
        if let Err(error) = self.store.call(move |database| database.write(&copy)).await {
            self.store_failed(&error);
            self.server.handle_write_failure(&writes);
        }
    }

    fn end(&mut self, id: SessionId) {
        self.streams.remove(&id);
        self.server.handle_session_end(now(), wall(), id);
    }

    /// Gives every stream that is due and can take one its next message.
    fn pump(&mut self) {
        let (now, wall) = (now(), wall());
        let tick = self.server.tick_is_due(now);
        let mut behind = false;
        for id in self.server.due_sessions(now) {
            let Some(stream) = self.streams.get(&id) else {
                continue;
            };
            // A full queue is a slow reader: it gets one larger difference later.
            let room = stream.capacity() > 1;
            let permit = stream.try_reserve().ok().filter(|_| room);
            let Some(permit) = permit else {
                behind = true;
                self.server.handle_full(now, id);
                continue;
            };
            if let Some(message) = self.server.poll_session(now, wall, id) {
                self.counters.messages.add(1);
                permit.send(message);
            }
        }
        if tick {
            self.server.end_tick(now, behind);
        }
        for (id, last) in self.server.take_ended() {
            if let (Some(stream), Some(last)) = (self.streams.get(&id), last) {
                let _ = stream.try_send(*last);
            }
            self.end(id);
        }
    }
}
