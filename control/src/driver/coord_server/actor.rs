//! The one task that owns the state, and the questions it answers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::counters::Counters;
use super::{Client, Shared};
use crate::coord::admin::{Done, Order};
use crate::coord::auth_key::KeyCheck;
use crate::coord::server::{
    MapAnswer, MapRefusal, Registration, Server, SessionId, Write, is_logout,
};
use crate::coord::{admin, auth_key};
use crate::driver::clock::{at, now, wall};
use crate::driver::coord_store::Store;
use crate::driver::places::Door;
use crate::key::{MachinePublic, NodePublic};
use crate::netmap::DerpMap;
use crate::netmap::wire::{MapRequest, MapResponse, RegisterRequest, RegisterResponse};
use crate::places::limit::{FailureLimit, LogLimit};

/// Messages a map stream may be behind; what comes later is folded into one difference.
const STREAM_QUEUE_MAX: usize = 2;

/// How long a change may wait to be written behind.
const WRITE_DELAY: Duration = Duration::from_secs(2);

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
    DerpMap(DerpMap),
    Order(Order, oneshot::Sender<Result<Done, String>>),
    Stop(oneshot::Sender<()>),
}

#[derive(Debug)]
pub(super) enum Registered {
    Answer(RegisterResponse),
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
    write_at: Option<Instant>,
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
                () = at(timeout) => self.server.handle_timeout(now()),
                () = at(self.write_at) => self.write().await,
            }
            self.tell_left_out();
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
                    Registered::TooMany(_) => true,
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
            Ask::DerpMap(derp_map) => {
                self.server.set_derp_map(now(), derp_map);
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
        let plan = self.server.plan_register(wall, machine, request, &key);
        if let KeyCheck::Unknown | KeyCheck::Expired | KeyCheck::Used = key {
            self.failures.handle_failure(now(), source);
        }
        let (record, host) = match &plan {
            Registration::Answer(answer) => return Registered::Answer(answer.clone()),
            Registration::Insert(record, _) => (record, self.server.host_number(record)),
            Registration::Rekey(record, _) | Registration::Expire(record) => (record, 0),
            Registration::Delete(_) => return self.commit(plan, 0).await,
        };
        tracing::info!(node = record.id, name = record.name, machine = %machine.short(),
                       key = %record.node_key.short(), "registration");
        self.commit(plan, host).await
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
            // Let in, logged out, or in the log already.
            Registered::Answer(_) | Registered::StoreFailed => return,
        };
        let Some(left_out) = self.refusals.admit(now()) else {
            return;
        };
        let name = request
            .hostinfo
            .as_ref()
            .and_then(|info| info["Hostname"].as_str());
        let name: String = name.unwrap_or_default().chars().take(63).collect();
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
        let planned = admin::plan(self.server.records(), order, wall());
        let (write, done) = planned.map_err(|refusal| refusal.to_string())?;
        if let Some(write) = write {
            self.write().await;
            let copy = [write.clone()];
            if let Err(error) = self.store.call(move |database| database.write(&copy)).await {
                self.store_failed(&error);
                return Err(format!("the server cannot store this now: {error:#}"));
            }
            self.server.put(now(), write);
        }
        self.counters.orders.add(1);
        tracing::info!(
            node = done.id,
            name = done.name,
            ?order,
            "an administrator's order"
        );
        Ok(done)
    }

    /// Counts the routes that some node announced in vain.
    fn tell_left_out(&mut self) {
        let left_out = self.server.take_left_out();
        let more = u64::try_from(left_out).unwrap_or(u64::MAX);
        self.counters.routes_left_out.add(more);
    }

    /// Commits, then applies. What waits to be written goes first, so that names and addresses
    /// that became free are free in the store too.
    async fn commit(&mut self, plan: Registration, host: u32) -> Registered {
        self.write().await;
        let copy = plan.clone();
        let committed = self
            .store
            .call(move |database| database.commit(&copy, host))
            .await;
        match committed {
            Ok(true) => Registered::Answer(self.server.apply(now(), plan)),
            Ok(false) => Registered::Answer(RegisterResponse {
                error: KeyCheck::Used.error().unwrap_or_default().to_owned(),
                ..RegisterResponse::default()
            }),
            Err(error) => self.store_failed(&error),
        }
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
