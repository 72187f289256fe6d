//! How good the best address is, from the Pongs to its Pings.

use std::time::Duration;

/// Heartbeats that the loss figure looks back on.
const WINDOW: u32 = 20;
/// Of these lost: alarm.
const LOST_ALARM: u32 = 6;
/// Times the round trip at promotion: alarm, if also [`RTT_ALARM_MIN`] above it.
const RTT_ALARM_FACTOR: u32 = 3;
const RTT_ALARM_MIN: Duration = Duration::from_millis(100);
/// Ticks in a row that must agree.
const ALARM_TICKS: u32 = 3;

/// What is wrong with a best address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alarm {
    /// Too many heartbeats are lost.
    Loss,
    /// It has become slow.
    Rtt,
}

/// Smoothed round trip (1/8) and jitter (1/16), and the fate of the last heartbeats.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quality {
    rtt: Duration,
    last_rtt: Duration,
    rtt_at_promotion: Duration,
    jitter: Duration,
    /// One bit per heartbeat, newest lowest, 1 is lost.
    lost: u32,
    heartbeats: u32,
    alarming_ticks: u32,
}

impl Quality {
    pub(super) fn new(rtt: Duration) -> Self {
        Self {
            rtt,
            last_rtt: rtt,
            rtt_at_promotion: rtt,
            jitter: Duration::ZERO,
            lost: 0,
            heartbeats: 0,
            alarming_ticks: 0,
        }
    }

    /// A Pong to any Ping.
    pub(super) fn pong(&mut self, rtt: Duration) {
        let change = rtt.abs_diff(self.last_rtt);
        self.last_rtt = rtt;
        self.rtt = (self.rtt * 7 + rtt) / 8;
        self.jitter = (self.jitter * 15 + change) / 16;
    }

    /// A heartbeat was answered or is lost.
    pub(super) fn heartbeat(&mut self, answered: bool) {
        self.lost = (self.lost << 1 | u32::from(!answered)) & ((1 << WINDOW) - 1);
        self.heartbeats = (self.heartbeats + 1).min(WINDOW);
    }

    pub(super) fn rtt(&self) -> Duration {
        self.rtt
    }

    pub(super) fn jitter(&self) -> Duration {
        self.jitter
    }

    /// Lost of the last 20 heartbeats, in percent.
    pub(super) fn loss_pct(&self) -> u8 {
        let pct = self.lost.count_ones() * 100 / self.heartbeats.max(1);
        u8::try_from(pct).expect("no more are lost than were sent")
    }

    /// Once per tick: what is wrong, when it has been for several ticks; then it starts counting
    /// anew.
    pub(super) fn tick(&mut self) -> Option<Alarm> {
        let slow = self.rtt > self.rtt_at_promotion * RTT_ALARM_FACTOR
            && self.rtt > self.rtt_at_promotion + RTT_ALARM_MIN;
        let alarm = match (self.lost.count_ones() >= LOST_ALARM, slow) {
            (true, _) => Alarm::Loss,
            (false, true) => Alarm::Rtt,
            (false, false) => {
                self.alarming_ticks = 0;
                return None;
            }
        };
        self.alarming_ticks += 1;
        if self.alarming_ticks < ALARM_TICKS {
            return None;
        }
        self.alarming_ticks = 0;
        Some(alarm)
    }

    /// It has just been tested: what was counted before no longer speaks against it.
    pub(super) fn absolve(&mut self, rtt: Duration) {
        (self.lost, self.heartbeats, self.alarming_ticks) = (0, 0, 0);
        self.rtt_at_promotion = self.rtt_at_promotion.max(rtt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sixth_lost_heartbeat_of_twenty_alarms_after_three_ticks() {
        let mut quality = Quality::new(Duration::from_millis(10));
        for n in 0..30 {
            quality.heartbeat(n % 4 != 0);
        }
        assert_eq!(quality.loss_pct(), 25);
        assert_eq!(quality.tick(), None);
        quality.heartbeat(false);
        assert_eq!(quality.loss_pct(), 30);
        let alarms = [
            quality.tick(),
            quality.tick(),
            quality.tick(),
            quality.tick(),
        ];
        assert_eq!(alarms, [None, None, Some(Alarm::Loss), None]);
        quality.absolve(Duration::from_millis(10));
        assert_eq!(quality.loss_pct(), 0);
    }

    #[test]
    fn a_path_is_slow_by_factor_and_by_difference() {
        let mut near = Quality::new(Duration::from_millis(10));
        let mut far = Quality::new(Duration::from_millis(200));
        for _ in 0..60 {
            near.pong(Duration::from_millis(90));
            far.pong(Duration::from_millis(500));
        }
        assert!((0..9).all(|_| near.tick().is_none() && far.tick().is_none()));
        for _ in 0..60 {
            near.pong(Duration::from_millis(150));
            far.pong(Duration::from_millis(700));
        }
        assert_eq!([near.tick(), near.tick(), near.tick()][2], Some(Alarm::Rtt));
        assert_eq!([far.tick(), far.tick(), far.tick()][2], Some(Alarm::Rtt));
    }

    #[test]
    fn smoothing_is_an_eighth_and_a_sixteenth() {
        let mut quality = Quality::new(Duration::from_millis(80));
        quality.pong(Duration::from_millis(160));
        assert_eq!(quality.rtt(), Duration::from_millis(90));
        assert_eq!(quality.jitter(), Duration::from_millis(5));
    }
}
