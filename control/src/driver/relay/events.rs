//! What the relay connections tell the agent, bounded in bytes and in number.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use ringtail_dataplane::{Datagrams, RegionId};
use tokio::sync::Notify;

use super::Counters;
use crate::derp::news::News;
use crate::key::NodePublic;

/// Bytes of packets that wait for the agent at most.
pub const EVENT_BYTES_MAX: usize = 8 << 20;

/// Events that wait for the agent at most.
pub const EVENTS_MAX: usize = 16 << 10;

/// What comes from the relays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayEvent {
    /// Consecutive packets of one peer, as many as one read brought.
    Data {
        /// Where they came in.
        region: RegionId,
        /// Whose they are.
        src: NodePublic,
        /// What they are; empty packets are left out.
        data: Datagrams,
    },
    /// A DISCO packet.
    Disco {
        /// Where it came in.
        region: RegionId,
        /// The node the relay names as sender.
        src: NodePublic,
        /// The sealed packet.
        packet: Vec<u8>,
    },
    /// Anything but packets.
    News {
        /// The region it is about.
        region: RegionId,
        /// What.
        news: News,
    },
}

/// The receiving end; there is one.
#[derive(Debug)]
pub struct RelayEvents(pub(super) Rc<EventQueue>);

impl RelayEvents {
    /// Waits for the next event; `None` once the pool is gone. Nothing is lost when the future is
    /// dropped.
    pub async fn recv(&mut self) -> Option<RelayEvent> {
        loop {
            if let Some(event) = self.try_recv() {
                return Some(event);
            }
            if self.0.state.borrow().closed {
                return None;
            }
            self.0.notify.notified().await;
        }
    }

    /// The next event if one waits.
    pub fn try_recv(&mut self) -> Option<RelayEvent> {
        let mut state = self.0.state.borrow_mut();
        let event = state.queue.pop_front()?;
        state.bytes -= weight(&event);
        Some(event)
    }
}

#[derive(Debug, Default)]
pub(super) struct EventQueue {
    state: RefCell<State>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<RelayEvent>,
    bytes: usize,
    closed: bool,
}

impl EventQueue {
    /// Appends an event; the oldest packets go when too much waits.
    pub(super) fn push(&self, event: RelayEvent, counters: &Counters) {
        let mut state = self.state.borrow_mut();
        state.bytes += weight(&event);
        state.queue.push_back(event);
        while state.bytes > EVENT_BYTES_MAX || state.queue.len() > EVENTS_MAX {
            let Some(old) = state.queue.pop_front() else {
                break;
            };
            state.bytes -= weight(&old);
            counters.count_lost_event(&old);
        }
        drop(state);
        self.notify.notify_one();
    }

    pub(super) fn close(&self) {
        self.state.borrow_mut().closed = true;
        self.notify.notify_one();
    }
}

fn weight(event: &RelayEvent) -> usize {
    match event {
        RelayEvent::Data { data, .. } => data.bytes.len() + 2 * data.lens.len(),
        RelayEvent::Disco { packet, .. } => packet.len(),
        RelayEvent::News { .. } => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_waiting_packets_lose_the_oldest_and_are_counted() {
        let queue = Rc::new(EventQueue::default());
        let counters = Counters::default();
        let mut events = RelayEvents(queue.clone());
        let batch = |first: u8| RelayEvent::Data {
            region: RegionId(1),
            src: NodePublic([1; 32]),
            data: Datagrams {
                bytes: vec![first; 1 << 20],
                lens: vec![1 << 15; 32],
            },
        };
        for i in 0..10 {
            queue.push(batch(i), &counters);
        }
        let Some(RelayEvent::Data { data, .. }) = events.try_recv() else {
            panic!("data waits");
        };
        assert_eq!(data.bytes[0], 3);
        assert_eq!(counters.rx_dropped_agent_slow.get(), 3 * 32);
    }
}
