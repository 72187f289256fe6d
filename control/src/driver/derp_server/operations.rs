//! Lists of operations on a relay's registry, beside a small model that says what must come of them: what the
//! fuzzer and the tests run.
//!
//! The model knows which connections a key has and which of them is the active one, what was sent to whom, and
//! who is to be told of whose leaving. Every frame that a connection is given was for its key while it was the
//! active one, in the order of sending and once; PeerGone comes when the last connection of a key that it heard
//! from is gone, and not otherwise; what is not given is counted; nothing is left when all have left.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Weak};

use super::registry::{Client, Lane, Registry};
use super::{CONTROL_QUEUE_BYTES, Counters, DATA_QUEUE_BYTES, DISCO_QUEUE_BYTES};
use crate::derp::budget::{Account, Budget};
use crate::derp::frame::{self, Decoder, FrameType, PeerGoneReason, client_verdict};
use crate::derp::queue::Chunk;
use crate::key::NodePublic;

const KEYS: u8 = 5;
const CONNECTIONS_MAX: usize = 12;
const BUDGET: usize = 1 << 30;
/// Bytes of a packet, of which the first few say which it is.
const PACKET_LENS: [usize; 4] = [16, 1200, 9000, 60_000];

fn key(n: u8) -> NodePublic {
    NodePublic([n + 1; 32])
}

/// A connection, and what it is still to be given.
struct Connection {
    key: u8,
    client: Arc<Client>,
    account: Arc<Account>,
    /// Numbers of packets, in order, of each lane.
    data: VecDeque<u64>,
    disco: VecDeque<u64>,
    /// Keys whose leaving it is to be told of, and keys that were not there.
    gone: VecDeque<(u8, PeerGoneReason)>,
}

struct World {
    /// So much that nobody has to lose anything for want of it: that is a story of its own.
    budget: Arc<Budget>,
    registry: Registry,
    counters: Counters,
    connections: BTreeMap<u64, Connection>,
    /// Of each key, its connections in the order of coming, and the active one.
    keys: BTreeMap<u8, (Vec<u64>, u64)>,
    /// Who heard from a key since it came.
    heard: BTreeMap<u8, BTreeSet<u64>>,
    sent: u64,
    given: u64,
    ended: Vec<Weak<Client>>,
}

/// Runs a list of operations: a byte that says which, and two that say on what. Returns how many packets were
/// given to somebody.
///
/// # Panics
/// If the registry and the model disagree.
pub(crate) fn run(bytes: &[u8]) -> u64 {
    let mut world = World {
        budget: Arc::new(Budget::new(BUDGET)),
        registry: Registry::default(),
        counters: Counters::default(),
        connections: BTreeMap::new(),
        keys: BTreeMap::new(),
        heard: BTreeMap::new(),
        sent: 0,
        given: 0,
        ended: Vec::new(),
    };
    for operation in bytes.chunks_exact(3) {
        world.operate(operation[0], operation[1], operation[2]);
        world.check();
    }
    let all: Vec<u64> = world.connections.keys().copied().collect();
    for id in &all {
        world.read(*id);
    }
    for id in all {
        world.leave(id);
    }
    assert_eq!(world.registry.keys_count(), 0, "nobody is left");
    assert!(world.ended.iter().all(|client| client.strong_count() == 0));
    assert_eq!(world.budget.used(), 0, "all memory is given back");
    world.given
}

impl World {
    fn operate(&mut self, operation: u8, who: u8, what: u8) {
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        let chosen = ids.get(usize::from(who) % ids.len().max(1)).copied();
        match (operation % 8, chosen) {
            (0, _) | (_, None) => self.come(who % KEYS),
            (1, Some(id)) => self.leave(id),
            (2, Some(id)) => self.write(id),
            (3, Some(id)) => self.read(id),
            (4, Some(id)) => self.send(id, what % KEYS, Lane::Disco, 1, 0),
            (_, Some(id)) => {
                let len = usize::from(what >> 6);
                let count = 1 + usize::from(operation >> 4);
                self.send(id, what % KEYS, Lane::Data, count, len);
            }
        }
    }

    fn come(&mut self, n: u8) {
        if self.connections.len() >= CONNECTIONS_MAX {
            return;
        }
        let source = std::net::IpAddr::from([192, 0, 2, n]);
        let account = Arc::new(self.budget.account(source));
        let registered = Arc::clone(&account);
        let client = self.registry.register(key(n), registered, &self.counters);
        let id = client.id;
        let (members, active) = self.keys.entry(n).or_default();
        members.push(id);
        *active = id;
        let connection = Connection {
            key: n,
            client,
            account,
            data: VecDeque::new(),
            disco: VecDeque::new(),
            gone: VecDeque::new(),
        };
        let before = self.connections.insert(id, connection);
        assert!(before.is_none(), "an id is never used again");
    }

    fn leave(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        self.registry.unregister(&connection.client, &self.counters);
        self.ended.push(Arc::downgrade(&connection.client));
        let n = connection.key;
        let Some((members, active)) = self.keys.get_mut(&n) else {
            panic!("its key is known");
        };
        members.retain(|member| *member != id);
        match members.last() {
            Some(newest) if *active == id => *active = *newest,
            Some(_) => {}
            None => {
                self.keys.remove(&n);
                for receiver in self.heard.remove(&n).unwrap_or_default() {
                    if let Some(receiver) = self.connections.get_mut(&receiver) {
                        receiver.gone.push_back((n, PeerGoneReason::Disconnected));
                    }
                }
            }
        }
    }

    /// Any frame makes a connection its key's active one.
    fn write(&mut self, id: u64) {
        let connection = &self.connections[&id];
        connection.client.wrote();
        if let Some((_, active)) = self.keys.get_mut(&connection.key) {
            *active = id;
        }
    }

    /// As a connection's task does it.
    fn send(&mut self, id: u64, to: u8, lane: Lane, count: usize, len: usize) {
        self.write(id);
        let (from, sender) = {
            let connection = &self.connections[&id];
            (connection.key, Arc::clone(&connection.client))
        };
        let mut run = Chunk::default();
        let numbers = self.sent..self.sent + count as u64;
        for number in numbers.clone() {
            let mut packet = vec![0; PACKET_LENS[len]];
            packet[..8].copy_from_slice(&number.to_be_bytes());
            packet[8] = to;
            packet[9] = u8::from(lane == Lane::Disco);
            frame::put_recv_packet(run.buffer(), &key(from), &packet);
        }
        self.sent = numbers.end;
        let found = self.registry.find(&key(to));
        let holder = self.keys.get(&to).map(|(_, active)| *active);
        assert_eq!(
            found.as_ref().map(|client| client.id),
            holder,
            "who holds {to}"
        );
        let Some(receiver) = found else {
            sender.tell_gone(&key(to), PeerGoneReason::NotHere, &self.counters);
            let sender = self.connections.get_mut(&id).expect("it sends");
            sender.gone.push_back((to, PeerGoneReason::NotHere));
            return;
        };
        sender.delivered_to(&receiver);
        self.heard.entry(from).or_default().insert(receiver.id);
        receiver.push(lane, &mut run, count as u64, &self.counters);
        assert!(run.is_empty());
        let receiver = self.connections.get_mut(&receiver.id).expect("it is there");
        match lane {
            Lane::Data => receiver.data.extend(numbers),
            Lane::Disco => receiver.disco.extend(numbers),
        }
    }

    /// A connection takes all that waits for it.
    fn read(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let mut outbox = connection.client.outbox();
        let mut bytes = std::mem::take(&mut outbox.control);
        while let Some(chunk) = outbox.disco.pop().or_else(|| outbox.data.pop()) {
            bytes.extend_from_slice(chunk.frames());
        }
        assert!(outbox.is_empty());
        outbox.charge(&connection.account);
        drop(outbox);
        let (mut rest, mut decoder) = (&bytes[..], Decoder::default());
        while let Some(raw) = decoder
            .next(&mut rest, client_verdict)
            .expect("frames of ours")
        {
            match raw.kind {
                FrameType::RECV_PACKET => {
                    let (_, packet) = frame::split_key(raw.body()).expect("it has its sender");
                    let number = packet.first_chunk().expect("it has its number");
                    let number = u64::from_be_bytes(*number);
                    assert_eq!(packet[8], connection.key, "for whom it is");
                    let lane = if packet[9] == 1 {
                        &mut connection.disco
                    } else {
                        &mut connection.data
                    };
                    // What went before it was dropped, the oldest first.
                    while lane.pop_front().expect("it was sent here, once") != number {}
                    self.given += 1;
                }
                FrameType::PEER_GONE => {
                    let said = frame::parse_peer_gone(raw.body()).expect("a key and why");
                    let owed = connection.gone.pop_front();
                    let owed = owed.map(|(n, reason)| (key(n), reason));
                    assert_eq!(Some(said), owed, "who is told of what");
                }
                FrameType::HEALTH => {}
                other => panic!("{other:?}"),
            }
        }
        connection.data.clear();
        connection.disco.clear();
        assert!(connection.gone.is_empty(), "{:?} is owed", connection.gone);
    }

    fn check(&self) {
        assert_eq!(self.registry.keys_count(), self.keys.len());
        for n in 0..KEYS {
            let found = self.registry.find(&key(n)).map(|client| client.id);
            assert_eq!(found, self.keys.get(&n).map(|(_, active)| *active));
        }
        for connection in self.connections.values() {
            let outbox = connection.client.outbox();
            // A run may stand above what the limit leaves, if it is alone.
            assert!(outbox.data.len_bytes() <= DATA_QUEUE_BYTES.max(16 * 61_000));
            assert!(outbox.disco.len_bytes() <= DISCO_QUEUE_BYTES);
            assert!(outbox.control.len() <= CONTROL_QUEUE_BYTES + 200);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_lists;

    #[test]
    fn a_plain_list_gets_as_far_as_a_packet_and_a_farewell() {
        // Two come, one sends twice to the other and leaves, who then reads.
        let list = [
            [0, 0, 0],
            [0, 1, 0],
            [5, 0, 1],
            [4, 0, 1],
            [1, 0, 0],
            [3, 0, 0],
        ];
        assert_eq!(run(list.as_flattened()), 2);
    }

    #[test]
    fn random_operations_match_the_model() {
        let mut given = 0;
        random_lists(50, 300, |bytes| given += run(bytes));
        assert!(given > 100, "{given}");
    }
}
