//! When a session wants to be called again: one alarm per rule of the WireGuard paper's section 6.
//!
//! Pure bookkeeping: the machine sets and clears alarms as things happen, and asks which one is due.

#![forbid(unsafe_code)]

use std::time::Instant;

/// What an alarm is for. Alarms that are due together go off in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Alarm {
    /// All keys go (§6.3: three times `REJECT_AFTER_TIME` without a new one).
    ZeroKeys,
    /// The current key has reached `REJECT_AFTER_TIME` (§6.2).
    Expire,
    /// No response came (§6.4: `REKEY_TIMEOUT` and jitter).
    Retransmit,
    /// A handshake was asked for when none could be started yet (§6.1, §6.2).
    Initiate,
    /// Data was sent and nothing came back (§6.5, but after [`super::QUIET_LIMIT`], and not while the
    /// keys are younger than [`super::FRESH`]).
    NewHandshake,
    /// Data was received and nothing was sent back (§6.5: `KEEPALIVE_TIMEOUT`).
    PassiveKeepalive,
    /// Nothing passed for the configured interval.
    PersistentKeepalive,
}

impl Alarm {
    /// Every alarm, in the order of their slots.
    pub(crate) const ALL: [Alarm; 7] = [
        Alarm::ZeroKeys,
        Alarm::Expire,
        Alarm::Retransmit,
        Alarm::Initiate,
        Alarm::NewHandshake,
        Alarm::PassiveKeepalive,
        Alarm::PersistentKeepalive,
    ];

    fn slot(self) -> usize {
        usize::from(self as u8)
    }
}

/// The alarms of one session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Alarms {
    at: [Option<Instant>; Alarm::ALL.len()],
}

impl Alarms {
    /// Sets an alarm, whether it was set or not.
    pub(crate) fn set(&mut self, alarm: Alarm, at: Instant) {
        self.at[alarm.slot()] = Some(at);
    }

    /// Sets an alarm unless it is set for an earlier time.
    pub(crate) fn set_no_later(&mut self, alarm: Alarm, at: Instant) {
        let slot = &mut self.at[alarm.slot()];
        *slot = Some(slot.map_or(at, |set| set.min(at)));
    }

    /// Clears an alarm.
    pub(crate) fn clear(&mut self, alarm: Alarm) {
        self.at[alarm.slot()] = None;
    }

    /// When an alarm will go off, if it is set.
    pub(crate) fn get(&self, alarm: Alarm) -> Option<Instant> {
        self.at[alarm.slot()]
    }

    /// When the first alarm will go off.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.at.iter().flatten().min().copied()
    }

    /// Clears and returns an alarm that is due.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Alarm> {
        let due = Alarm::ALL
            .into_iter()
            .find(|alarm| self.get(*alarm).is_some_and(|at| at <= now))?;
        self.clear(due);
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn alarms_go_off_once_and_in_their_order() {
        let start = crate::sys::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut alarms = Alarms::default();
        assert_eq!(alarms.next(), None);
        for (i, alarm) in Alarm::ALL.into_iter().enumerate() {
            assert_eq!(alarm.slot(), i);
            alarms.set(alarm, at(10));
        }
        alarms.set(Alarm::Expire, at(30));
        alarms.set_no_later(Alarm::Initiate, at(5));
        alarms.set_no_later(Alarm::Retransmit, at(50));
        alarms.clear(Alarm::NewHandshake);
        alarms.set_no_later(Alarm::NewHandshake, at(40));
        assert_eq!(alarms.next(), Some(at(5)));
        assert_eq!(alarms.take_due(at(4)), None);
        let due: Vec<Alarm> = std::iter::from_fn(|| alarms.take_due(at(10))).collect();
        assert_eq!(
            due,
            [
                Alarm::ZeroKeys,
                Alarm::Retransmit,
                Alarm::Initiate,
                Alarm::PassiveKeepalive,
                Alarm::PersistentKeepalive
            ]
        );
        assert_eq!(alarms.next(), Some(at(30)));
    }
}
