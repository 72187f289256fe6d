//! A session as plain data, to be taken up by another process (`design.md` decision 16).
//!
//! Instants become durations before or after the moment of the export, because another process's
//! clock may count from elsewhere. Secrets are erased when the data is dropped.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::keypair::{Keypair, Material};
use super::machine::Machine;
use super::timers::{Alarm, Alarms};
use super::window::Window;
use super::{Own, REJECT_AFTER_MESSAGES};
use crate::noise::{CookieStore, CookieStoreState, INITIATED_LEN, Initiated, Remote, Tai64n};
use crate::types::PeerId;

/// Which part a keypair plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Current,
    Next,
    /// Replaced; 0 is the newest.
    Previous(u8),
}

/// A keypair.
#[cfg_attr(test, derive(PartialEq))]
pub(crate) struct KeypairState {
    pub(crate) role: Role,
    pub(crate) send: Zeroizing<[u8; 32]>,
    pub(crate) receive: Zeroizing<[u8; 32]>,
    pub(crate) local_index: u32,
    pub(crate) remote_index: u32,
    pub(crate) age: Duration,
    pub(crate) initiator: bool,
    /// The next counter to seal with.
    pub(crate) next_counter: u64,
    /// The newest counter received plus one, and the bitmap behind it.
    pub(crate) received: u64,
    pub(crate) window: Vec<u64>,
}

/// The whole state of a session but its configuration (keys of both ends, preshared key).
#[cfg_attr(test, derive(PartialEq))]
pub(crate) struct SessionState {
    pub(crate) keypairs: Vec<KeypairState>,
    /// Our outstanding initiation.
    pub(crate) initiated: Option<Zeroizing<[u8; INITIATED_LEN]>>,
    /// How long we have been trying.
    pub(crate) attempt: Option<Duration>,
    /// How long ago the last handshake message was sent, and the last initiation answered.
    pub(crate) handshake_sent: Option<Duration>,
    pub(crate) answered: Option<Duration>,
    /// Timestamps of the newest initiation of the peer, and of ours.
    pub(crate) newest: Option<[u8; Tai64n::LEN]>,
    pub(crate) stamped: Option<[u8; Tai64n::LEN]>,
    pub(crate) cookies: CookieStoreState,
    /// How far ahead each alarm is, in the order of [`Alarm::ALL`].
    pub(crate) alarms: [Option<Duration>; Alarm::ALL.len()],
    pub(crate) another_keepalive: bool,
    pub(crate) late_rekey: bool,
    /// The interval that the persistent keep-alive had.
    pub(crate) keepalive: Option<Duration>,
    pub(crate) up: bool,
}

impl Machine {
    /// Ends the session here and returns what another process goes on with. A shard that still has
    /// the keys seals no more with them: all counters that are left go along.
    pub(super) fn export(mut self, own: &mut Own, now: Instant) -> SessionState {
        let since = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at));
        let keys = &self.keys;
        let roles = [(Role::Current, &keys.current), (Role::Next, &keys.next)];
        let previous = (0..).map(Role::Previous).zip(&keys.previous);
        let keypairs = roles
            .into_iter()
            .chain(previous)
            .filter_map(|(role, keypair)| {
                let keypair = keypair.as_ref()?;
                let (send, remote_index, next_counter) = keypair.sealing.close();
                let (received, window) = keypair.window.parts();
                Some(KeypairState {
                    role,
                    send: send.to_bytes(),
                    receive: keypair.opening.to_bytes(),
                    local_index: keypair.local_index,
                    remote_index,
                    age: now.saturating_duration_since(keypair.born),
                    initiator: keypair.sealing.initiator,
                    next_counter,
                    received,
                    window: window.to_vec(),
                })
            });
        let state = SessionState {
            keypairs: keypairs.collect(),
            initiated: self.initiated.as_ref().map(Initiated::export),
            attempt: since(self.attempt),
            handshake_sent: since(self.handshake_sent),
            answered: since(self.answered),
            newest: self.newest.map(|stamp| stamp.0),
            stamped: self.stamped.map(|stamp| stamp.0),
            cookies: self.cookies.export(now),
            alarms: Alarm::ALL.map(|alarm| {
                let at = self.alarms.get(alarm)?;
                Some(at.saturating_duration_since(now))
            }),
            another_keepalive: self.another_keepalive,
            late_rekey: self.late_rekey,
            keepalive: self.keepalive,
            up: self.up,
        };
        self.close(own);
        state
    }

    /// Takes a session up. `None` if it cannot be: an index is in use here or belongs to another
    /// shard, the data contradicts itself, or a key is older than an instant can say (on Linux that
    /// is below the start of the clock, so only an age out of the question is); nothing is taken
    /// then.
    pub(super) fn import(
        own: &mut Own,
        now: Instant,
        peer: PeerId,
        remote: Remote,
        state: &SessionState,
    ) -> Option<Machine> {
        // What is too long ago for an instant is as good as never.
        let ago = |age: Option<Duration>| now.checked_sub(age?);
        let mut machine = Machine::new(now, peer, remote, own.generation, None);
        if let Some(bytes) = &state.initiated {
            let initiated = Initiated::import(bytes);
            own.indexes.take_up(initiated.index(), peer).then_some(())?;
            machine.initiated = Some(initiated);
        }
        for keypair in &state.keypairs {
            if machine.take_up(own, now, keypair).is_none() {
                machine.close(own);
                return None;
            }
        }
        machine.attempt = ago(state.attempt);
        machine.handshake_sent = ago(state.handshake_sent);
        machine.answered = ago(state.answered);
        machine.newest = state.newest.map(Tai64n);
        machine.stamped = state.stamped.map(Tai64n);
        machine.cookies = CookieStore::import(now, &state.cookies);
        machine.alarms = Alarms::default();
        for (alarm, ahead) in Alarm::ALL.into_iter().zip(state.alarms) {
            if let Some(at) = ahead.and_then(|ahead| now.checked_add(ahead)) {
                machine.alarms.set(alarm, at);
            }
        }
        machine.another_keepalive = state.another_keepalive;
        machine.late_rekey = state.late_rekey;
        machine.keepalive = state.keepalive;
        machine.up = state.up;
        Some(machine)
    }

    fn take_up(&mut self, own: &mut Own, now: Instant, state: &KeypairState) -> Option<()> {
        let window = Window::from_parts(state.received, &state.window)?;
        let born = now.checked_sub(state.age)?;
        let slot = match state.role {
            Role::Current => &mut self.keys.current,
            Role::Next => &mut self.keys.next,
            Role::Previous(which) => self.keys.previous.get_mut(usize::from(which))?,
        };
        let sane = slot.is_none() && state.next_counter <= REJECT_AFTER_MESSAGES;
        (sane && own.indexes.take_up(state.local_index, self.peer)).then_some(())?;
        *slot = Some(Keypair::new(Material {
            send: &state.send,
            receive: &state.receive,
            local_index: state.local_index,
            remote_index: state.remote_index,
            born,
            initiator: state.initiator,
            next_counter: state.next_counter,
            window,
        }));
        Some(())
    }
}
