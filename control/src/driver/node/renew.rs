//! Another node key under a running node: before the old one expires by an auth key, and at any time by a
//! person (`ringtail login`).
//!
//! The order loses nothing: the next key is on disk before anybody hears of it; the home relay is connected
//! under it too; the server takes it in the place of the old one, which moves neither name nor address; then
//! the data plane goes over under living sessions. Peers hear of it one by one, so for a while packets go and
//! come by relay under both keys. A registration that is refused leaves the old key as it is; one that is not
//! answered goes on for as long as that takes, because the server may have heard it and know no other key by
//! now. If the process dies in between, the next start asks for the next key first. Should the old key's
//! connection hear first that the server knows it no more, the next key's answer says whether this node is out.
//!
//! Plain WireGuard peers of the settings file are told by nobody: to them another key is another peer. With any,
//! nothing is renewed that a person has not asked for.

use std::time::{Duration, Instant};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::login::pending;
use super::{Ended, Node, now, wall};
use crate::coord::CoordEvent;
use crate::coord::renewal::{Due, KeyLife};
use crate::driver::clock::{at, since_1970};
use crate::driver::coord_client::CoordClient;
use crate::driver::relay::{RelayEvent, RelayEvents, RelayPool};
use crate::key::NodePrivate;

/// So long relays know us by the key before too. Peers hear of the new one within a second or two.
const BOTH_KEYS: Duration = Duration::from_secs(10);
/// An attempt that the server has not answered by then goes on, but that is said, and the old key waits for it
/// no more.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(60);
/// A server that does not know the old key any more has a person's answer by then, if he has given one.
const PERSON_LIMIT: Duration = Duration::from_secs(10);
/// What is said after [`ATTEMPT_LIMIT`], where nothing else is known.
const NO_ANSWER: &str = "the coordination server does not answer";

/// How it stands with the next key.
#[derive(Default)]
pub(super) struct Renewal {
    /// What the server says to the next key.
    events: Option<mpsc::Receiver<CoordEvent>>,
    attempt: Option<Attempt>,
    before: Option<Before>,
    /// When to look again, and at which expiry we looked last.
    due: Option<Instant>,
    seen: Option<OffsetDateTime>,
    /// The auth key was refused: it does not take the place of a person any more.
    key_refused: bool,
    /// Of this node, from 0 to 1.
    random: f64,
    /// Whom the old key's registration waits for, or what has ended it.
    pub(super) old: Old,
}

/// How it stands with the registration of the old key while the next one is registered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Old {
    /// It goes on.
    #[default]
    Stands,
    /// It waits for what becomes of the next one, which the server may know already.
    Waits,
    /// It has expired: without the next one this node is out.
    Expired,
    /// The server does not know it, for this reason if it does not know the next one either, which it may have
    /// put in its place.
    Gone(String),
}

impl Old {
    /// Why this node is out if the next key is `refused`, unless there is another way.
    fn out(&self, by_person: bool, refused: &str) -> Option<String> {
        match self {
            Self::Stands | Self::Waits => None,
            // A person can do what the auth key could not.
            Self::Expired => by_person.then(|| refused.to_owned()),
            Self::Gone(why) => Some(why.clone()),
        }
    }
}

/// A registration of the next key.
struct Attempt {
    key: NodePrivate,
    by_person: bool,
    client: CoordClient,
    relays: RelayPool,
    relay_events: RelayEvents,
    limit: Option<Instant>,
    /// Why the server was not reached, or did not do it, when it was tried last.
    error: Option<String>,
}

/// What happens while a key is renewed.
pub(super) enum News {
    /// What the server says to the next key.
    Server(CoordEvent),
    /// What comes by relay for the key before.
    Relayed(RelayEvent),
    /// It is time to look again.
    Due,
}

/// Relays that know us by the key before.
struct Before {
    relays: RelayPool,
    events: RelayEvents,
    until: Instant,
}

impl Renewal {
    pub(super) fn new() -> Self {
        Self {
            random: rand::random(),
            ..Self::default()
        }
    }

    /// What happens next. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> News {
        let limit = self.attempt.as_ref().and_then(|attempt| attempt.limit);
        let until = self.before.as_ref().map(|before| before.until);
        let due = [self.due, limit, until].into_iter().flatten().min();
        let before = self.before.as_mut();
        let relayed = async {
            match before {
                Some(before) => before.events.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(event) = super::next(&mut self.events) => News::Server(event),
            Some(event) = relayed => News::Relayed(event),
            () = at(due) => News::Due,
        }
    }

    /// The relays by which peers reach us that know us by the key before.
    pub(super) fn relays(&self) -> Option<&RelayPool> {
        self.before.as_ref().map(|before| &before.relays)
    }

    /// Whether the server has had its time to answer.
    fn is_late(&self, turn: Instant) -> bool {
        let limit = self.attempt.as_ref().and_then(|attempt| attempt.limit);
        limit.is_some_and(|limit| limit <= turn)
    }

    /// Whether a person is waited for, who lets the next key in.
    pub(super) fn asks_person(&self) -> bool {
        self.attempt
            .as_ref()
            .is_some_and(|attempt| attempt.by_person)
    }
}

impl Node {
    /// The relays by which peers reach us under any key of ours, the one to come among them.
    pub(super) fn pools(&self) -> impl Iterator<Item = &RelayPool> {
        let next = self.renewal.attempt.as_ref().map(|attempt| &attempt.relays);
        let all = [Some(&self.relays), next, self.renewal.relays()];
        all.into_iter().flatten()
    }

    /// There is a next key from the run before: whoever is asked first, the server may know no other. True if
    /// the old key waits for what becomes of it.
    pub(super) fn resume_renewal(&mut self) -> bool {
        if self.keys.next.is_none() {
            return false;
        }
        let asked_for = self.next_is_asked_for();
        self.renew(asked_for);
        let waits = !asked_for && self.renewal.attempt.is_some();
        if waits {
            self.renewal.old = Old::Waits;
        }
        waits
    }

    /// Registers the next key beside the old one, by the auth key or by a person. The auth key takes the place
    /// of a person who is waited for.
    pub(super) fn renew(&mut self, by_person: bool) {
        let may = match (&self.renewal.attempt, &self.renewal.old) {
            (None, _) => true,
            // An auth key would undo what an administrator has done.
            (Some(_), Old::Gone(_)) => false,
            (Some(attempt), _) => attempt.by_person && !by_person,
        };
        let Some(to) = self.coordination.clone().filter(|_| may) else {
            return;
        };
        let key = self
            .keys
            .next
            .get_or_insert_with(NodePrivate::generate)
            .clone();
        if let Err(error) = self.state.save_keys(&self.keys) {
            self.renewal_failed(&format!("{error:#}"));
            return;
        }
        let mut config = to.config_of(key.public());
        config.old_node = Some(self.keys.node.public());
        if by_person {
            config.auth_key = None;
            config.followup = pending(&self.state, &config);
        }
        let (relays, relay_events) = self.relays.beside(key.clone());
        let own_state = self.self_state.subscribe();
        let started =
            CoordClient::start(config, self.names.clone(), to.underlay, to.roots, own_state);
        match started {
            Ok((client, events)) => {
                tracing::info!(next = %key.public(), by_person, "renewing this node's key");
                self.renewal.events = Some(events);
                self.renewal.attempt = Some(Attempt {
                    key,
                    by_person,
                    client,
                    relays,
                    relay_events,
                    limit: (!by_person).then(|| now() + ATTEMPT_LIMIT),
                    error: None,
                });
            }
            Err(error) => self.renewal_failed(&format!("{error:#}")),
        }
    }

    /// The server has no use for the old key: all depends on the next one. Its connection may have died meanwhile,
    /// and the answer with it.
    pub(super) fn old_key_ends(&mut self, old: Old) {
        self.renewal.old = old;
        self.coord_client = None;
        if let Some(attempt) = &self.renewal.attempt {
            attempt.client.redial();
        }
    }

    /// Whether a next key is being registered.
    pub(super) fn is_being_renewed(&self) -> bool {
        self.renewal.attempt.is_some()
    }

    /// What stood with the coordination server, under any key of ours, cannot be counted on.
    pub(super) fn redial(&self) {
        let next = self.renewal.attempt.as_ref().map(|attempt| &attempt.client);
        let all = [self.coord_client.as_ref(), next];
        all.into_iter().flatten().for_each(CoordClient::redial);
    }

    /// # Errors
    /// This node is out of the network; says why.
    pub(super) fn take_renewal_news(&mut self, news: News) -> anyhow::Result<Option<Ended>> {
        match news {
            News::Server(event) => return self.take_from_renewal(event),
            News::Relayed(event) => self.take_from_relays_before(event),
            News::Due => {
                if let Old::Gone(why) = &self.renewal.old
                    && self.renewal.asks_person()
                    && self.renewal.is_late(now())
                {
                    return self.not_admitted(why.clone());
                }
                self.look_at_key();
            }
        }
        Ok(None)
    }

    fn take_from_renewal(&mut self, event: CoordEvent) -> anyhow::Result<Option<Ended>> {
        let Some(attempt) = &mut self.renewal.attempt else {
            return Ok(None);
        };
        match event {
            CoordEvent::Registered { user } => self.renewed(user),
            CoordEvent::AuthUrl(url) if attempt.by_person => {
                // The server is asked; had he visited the address, it would say so at once.
                if let Old::Gone(_) = self.renewal.old {
                    attempt.limit = Some(now() + PERSON_LIMIT);
                }
                let next = attempt.key.public();
                self.ask_person(next, url);
            }
            CoordEvent::AuthUrl(_) => {
                return self.next_is_refused("the server wants a person to do it");
            }
            CoordEvent::KeyExpired => {
                return self.next_is_refused("the server has the new key as expired");
            }
            CoordEvent::Fatal(why) => return self.next_is_refused(&why),
            CoordEvent::Lost { error, .. } => {
                tracing::debug!(error, "the next key is not registered yet");
                attempt.error = Some(error);
                if attempt.by_person {
                    attempt.limit = None;
                }
            }
            CoordEvent::ControlKey(_) | CoordEvent::Netmap(_) => {}
        }
        Ok(None)
    }

    fn next_is_refused(&mut self, why: &str) -> anyhow::Result<Option<Ended>> {
        match self.renewal.old.out(self.renewal.asks_person(), why) {
            Some(out) => self.not_admitted(out),
            None => {
                self.renewal_failed(why);
                Ok(None)
            }
        }
    }

    /// The server knows the next key, and the old one no more.
    fn renewed(&mut self, user: String) {
        let Some(attempt) = self.renewal.attempt.take() else {
            return;
        };
        self.keys.node = attempt.key;
        (self.keys.next, self.keys.since) = (None, Some(since_1970().as_secs()));
        if let Err(error) = self.state.save_keys(&self.keys) {
            // It stands there as the next one, which the next start asks for first.
            tracing::warn!(
                error = format!("{error:#}"),
                "the new key is not saved as ours"
            );
        }
        let public = self.keys.node.public();
        let key = Zeroizing::new(*self.keys.node.as_bytes());
        self.dataplane.renew_key(&key);
        self.agent.handle_own_key(public);
        self.renewal.before = Some(Before {
            relays: std::mem::replace(&mut self.relays, attempt.relays),
            events: std::mem::replace(&mut self.relay_events, attempt.relay_events),
            until: now() + BOTH_KEYS,
        });
        self.coord_client = Some(attempt.client);
        self.coord = self.renewal.events.take();
        if let Some(to) = &mut self.coordination {
            to.config.node = public;
        }
        (self.renewal.old, self.renewal.key_refused) = (Old::Stands, false);
        self.agent.set_health("key", Vec::new());
        tracing::info!(node_key = %public, "this node's key is renewed");
        self.let_in(user);
        self.look_at_key();
    }

    /// The next key was refused. The old key stays; there is another attempt later, if no person is needed for it.
    fn renewal_failed(&mut self, why: &str) {
        let attempt = self.renewal.attempt.take();
        self.renewal.events = None;
        if attempt.is_some_and(|attempt| !attempt.by_person) {
            self.renewal.key_refused = true;
            // It took the place of a person, who may visit the address yet: then the server knows this key. And
            // nobody else helps one that has expired.
            if self.next_is_asked_for() || self.renewal.old == Old::Expired {
                tracing::warn!(why, "the auth key does not renew this node's key");
                self.renew(true);
                return;
            }
        }
        self.keys.next = None;
        self.login.forget_url();
        if let Err(error) = self.state.save_keys(&self.keys) {
            tracing::debug!(error = format!("{error:#}"), "the next key stays on disk");
        }
        self.refused(why);
        if self.renewal.old == Old::Waits {
            self.renewal.old = Old::Stands;
            self.connect_coordination(true);
            return;
        }
        self.not_renewed(why);
        let retry = self.key_life().map(|life| life.retry(wall()));
        self.renewal.due = retry.map(|wait| now() + wait);
    }

    /// The server has not answered for a while. It is asked on for the same key; asked for the old one too, it
    /// must not take that for a wish to have it back.
    fn renewal_is_late(&mut self) {
        let Some(attempt) = &mut self.renewal.attempt else {
            return;
        };
        attempt.limit = None;
        let why = attempt.error.take();
        let why = why.as_deref().unwrap_or(NO_ANSWER);
        self.refused(why);
        self.not_renewed(why);
        if self.renewal.old == Old::Waits {
            self.renewal.old = Old::Stands;
            self.connect_coordination(false);
        }
    }

    fn not_renewed(&mut self, why: &str) {
        let until = self.key_life().map(|life| life.until);
        let until = until.map_or_else(String::new, |until| {
            format!(", which expires at {}", text(until))
        });
        self.agent.set_health(
            "key",
            vec![format!(
                "this node's key{until}, could not be renewed: {why}"
            )],
        );
    }

    /// Whether a person was given an address to visit for the next key.
    pub(super) fn next_is_asked_for(&self) -> bool {
        let next = self.keys.next.as_ref().map(NodePrivate::public);
        let asked = self.coordination.as_ref().zip(next);
        asked.is_some_and(|(to, next)| pending(&self.state, &to.config_of(next)).is_some())
    }

    /// When our key was let in and when it expires, if it does.
    fn key_life(&self) -> Option<KeyLife> {
        let until = self.agent.key_expiry()?;
        let since = self.keys.since.and_then(|secs| i64::try_from(secs).ok());
        let since = since.and_then(|secs| OffsetDateTime::from_unix_timestamp(secs).ok());
        Some(KeyLife {
            since: since.unwrap_or_else(wall),
            until,
        })
    }

    /// Renews the key if that is due, or has a person told of its end. To be called when the map is another,
    /// and whenever it is due.
    pub(super) fn look_at_key(&mut self) {
        let turn = now();
        if self
            .renewal
            .before
            .as_ref()
            .is_some_and(|before| before.until <= turn)
        {
            self.renewal.before = None;
        }
        if self.renewal.is_late(turn) {
            self.renewal_is_late();
        }
        let expiry = self.agent.key_expiry();
        if std::mem::replace(&mut self.renewal.seen, expiry) != expiry {
            self.renewal.due = None;
            // What was said of another expiry, or of none.
            self.agent.set_health("key", Vec::new());
        }
        if self.renewal.due.is_some_and(|due| turn < due) {
            return;
        }
        self.renewal.due = None;
        let asks_person = self.renewal.asks_person();
        if self.is_being_renewed() && !asks_person {
            return;
        }
        let by_key = self
            .coordination
            .as_ref()
            .is_some_and(|to| to.config.auth_key.is_some())
            && !self.agent.has_plain_peers()
            && !(asks_person && self.renewal.key_refused);
        let Some(life) = self.key_life().filter(|_| self.coordination.is_some()) else {
            return;
        };
        match life.due(wall(), by_key, self.renewal.random) {
            Due::Later(wait) => {
                self.renewal.due = Some(turn + wait);
                self.agent.set_health("key", Vec::new());
            }
            Due::Told(wait) => {
                self.renewal.due = Some(turn + wait);
                let until = text(life.until);
                let line = if self.agent.has_plain_peers() {
                    format!(
                        "this node's key expires at {until}, and is not renewed by itself, since the settings \
                         file's peers know no other: an administrator extends it, or `ringtail login` renews \
                         it and the peers are given the new one"
                    )
                } else {
                    format!(
                        "this node's key expires at {until}: `ringtail login` renews it, and so does a start \
                         with a valid auth key; or an administrator extends it"
                    )
                };
                self.agent.set_health("key", vec![line]);
            }
            Due::Renew => self.renew(false),
        }
    }
}

fn text(time: OffsetDateTime) -> String {
    let time = time.replace_nanosecond(0).unwrap_or(time);
    time.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_next_key_leaves_the_old_one_unless_the_server_has_no_use_for_that() {
        let gone = Old::Gone("removed".into());
        for (old, by_person, out) in [
            (&Old::Stands, true, None),
            (&Old::Stands, false, None),
            (&Old::Waits, false, None),
            (&Old::Expired, true, Some("refused")),
            (&Old::Expired, false, None),
            (&gone, true, Some("removed")),
            (&gone, false, Some("removed")),
        ] {
            let found = old.out(by_person, "refused");
            assert_eq!(found.as_deref(), out, "{old:?} {by_person}");
        }
    }
}
