//! The memory of flows beside a plain one, and two of them with what one tells the other between.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use rand::RngExt;

use super::flows::{
    FLOW_REPORT_INTERVAL, FLOW_TIMEOUT, FLOWS_MAX, FlowMemory, NODE_FLOWS_MAX, SHARD_FLOWS_MIN,
    Tell, flows_max,
};
use crate::packet::header::{Flow, HashKey, UDP};
use crate::seeded;
use crate::sys::now;

fn memory(now: Instant) -> FlowMemory {
    FlowMemory::new(now, HashKey::random(), FLOWS_MAX)
}

/// The replies of the `number`th of many flows.
fn flow(number: u32) -> Flow {
    let [high, low, ports @ ..] = number.to_be_bytes();
    Flow {
        src: IpAddr::from([10, 1, high, low]),
        dst: IpAddr::from([10, 0, 0, 1]),
        protocol: UDP,
        src_port: 53,
        dst_port: u16::from_be_bytes(ports),
    }
}

/// An owner of a peer and a shard that seals for it.
struct Two {
    owner: FlowMemory,
    guest: FlowMemory,
    /// What the owner is yet to take from its queue.
    told: VecDeque<Flow>,
    tellings: usize,
}

impl Two {
    fn new(now: Instant, room: usize) -> Two {
        let memory = || FlowMemory::new(now, HashKey::random(), room);
        Two {
            owner: memory(),
            guest: memory(),
            told: VecDeque::new(),
            tellings: 0,
        }
    }

    /// A packet of the flow leaves by one of the two.
    fn sends(&mut self, now: Instant, reply: Flow, by_guest: bool) {
        if by_guest {
            let forgot = self.owner.forgotten();
            if let Some(tell) = self.guest.remember(now, reply, forgot) {
                self.told.push_back(tell.reply);
                self.tellings += 1;
            }
        } else {
            self.owner.remember(now, reply, None);
        }
    }

    fn learns(&mut self, now: Instant) {
        for reply in self.told.drain(..) {
            self.owner.remember(now, reply, None);
        }
    }
}

/// So many flows take turns at so many packets a second, half of them by either shard, while 200
/// send every 10 s by the guest, and are answered 200 ms later. Gives the answers that came and those let in.
fn beside_a_flood(room: usize, flows: u32, per_second: u32) -> (usize, usize) {
    const QUIET: u32 = 200;
    let now = now();
    let mut two = Two::new(now, room);
    let mut next = 0;
    let mut answers: VecDeque<(u32, Flow)> = VecDeque::new();
    let (mut came, mut passed) = (0, 0);
    for ms in 0..52_000 {
        let at = now + Duration::from_millis(ms.into());
        for _ in 0..per_second / 1000 {
            two.sends(at, flow(next), next % 2 == 0);
            next = (next + 1) % flows;
        }
        // Each at a time of its own within the ten seconds.
        if ms % 50 == 0 {
            let quiet = flow(0x8000_0000 | (ms / 50 % QUIET));
            two.sends(at, quiet, true);
            answers.push_back((ms + 200, quiet));
        }
        two.learns(at);
        while answers.front().is_some_and(|(due, _)| *due <= ms) {
            let (_, answer) = answers.pop_front().unwrap();
            came += 1;
            passed += usize::from(two.owner.admits(at, &answer));
        }
    }
    println!("{flows} flows: {} tellings", two.tellings);
    (came, passed)
}

#[test]
fn quiet_flows_get_all_their_answers_beside_a_flood_of_others() {
    // The second table is short of room all the time, and forgets what was not used for 8 s.
    for (room, flows, per_second) in [(FLOWS_MAX, 160_000, 8_000), (16_384, 100_000, 2_000)] {
        let (came, passed) = beside_a_flood(room, flows, per_second);
        assert!(came > 1000);
        assert_eq!(passed, came, "{flows} flows");
    }
}

#[test]
fn who_seals_tells_again_before_the_owner_has_forgotten_and_not_with_every_packet() {
    let now = now();
    let at = |tenths: u64| now + Duration::from_millis(100 * tenths);
    let mut guest = memory(now);
    let forgot = |tenths| Some(at(tenths));
    assert!(guest.remember(at(40), flow(1), None).is_some());
    // The owner kept what was used in the last 4 s: half of that is left for the reply.
    assert_eq!(guest.remember(at(59), flow(1), forgot(19)), None);
    let again = guest.remember(at(60), flow(1), forgot(20)).unwrap();
    assert!(!again.new);
    assert_eq!(guest.remember(at(79), flow(1), forgot(39)), None);
    assert_eq!(guest.remember(at(80), flow(1), None), None);
    assert!(guest.remember(at(80), flow(1), forgot(40)).is_some());
    // However short it is of room, not more than ten times a second.
    assert_eq!(guest.remember(at(80), flow(1), forgot(80)), None);
    assert!(guest.remember(at(81), flow(1), forgot(81)).is_some());
}

#[test]
fn a_flow_that_cannot_be_told_is_new_again_and_a_known_one_due() {
    let now = now();
    let mut guest = memory(now);
    let tell = |new| Tell {
        reply: flow(1),
        new,
    };
    let (new, again) = (Some(tell(true)), Some(tell(false)));
    assert_eq!(guest.remember(now, flow(1), None), new);
    guest.untold(&tell(true));
    assert!(!guest.admits(now, &flow(1)));
    assert_eq!(
        guest.remember(now, flow(2), None).map(|t| t.new),
        Some(true)
    );
    assert_eq!(guest.remember(now, flow(1), None), new);
    let later = now + FLOW_REPORT_INTERVAL;
    assert_eq!(guest.remember(later, flow(1), None), again);
    guest.untold(&tell(false));
    assert!(guest.admits(later, &flow(1)));
    assert_eq!(guest.remember(later, flow(1), None), again);
    assert_eq!(guest.remember(later, flow(1), None), None);
    // Another owner has heard of nothing.
    guest.owners_changed();
    assert_eq!(guest.remember(later, flow(1), None), new);
    assert_eq!(guest.remember(later, flow(1), None), None);
}

#[test]
fn every_port_of_one_destination_fits() {
    let now = now();
    let addresses: [(IpAddr, IpAddr); 2] = [
        ([100, 64, 0, 2].into(), [100, 64, 0, 1].into()),
        (
            Ipv6Addr::new(0xfd7a, 1, 2, 3, 4, 5, 6, 7).into(),
            Ipv6Addr::new(0xfd7a, 1, 2, 3, 4, 5, 6, 8).into(),
        ),
    ];
    for (src, dst) in addresses {
        let mut memory = memory(now);
        let reply = |number: u32| Flow {
            src,
            dst,
            protocol: UDP,
            src_port: u16::try_from(7 + number / 64_000).unwrap(),
            dst_port: u16::try_from(1024 + number % 64_000).unwrap(),
        };
        for number in 0..149_951 {
            assert!(memory.remember(now, reply(number), None).is_some());
        }
        let passed = (0..149_951).filter(|number| memory.admits(now, &reply(*number)));
        assert_eq!(passed.count(), 149_951);
        assert_eq!(memory.take_evicted(), 0);
        assert!(memory.longest_chain() < 12, "{}", memory.longest_chain());
    }
}

#[test]
fn flows_chosen_to_meet_a_victim_under_a_known_hash_do_not() {
    let now = now();
    let victim = flow(0x8000_0000);
    let known = HashKey([3, 1, 4, 1, 5, 9]);
    for (name, hash) in [
        ("no key", &Flow::hash as &dyn Fn(&Flow) -> u64),
        ("another key", &|flow: &Flow| flow.keyed_hash(&known)),
    ] {
        let place = hash(&victim) % 8192;
        let aimed: Vec<Flow> = (0..4_000_000)
            .map(flow)
            .filter(|flow| hash(flow) % 8192 == place)
            .collect();
        assert!(aimed.len() > 400, "{name}: {}", aimed.len());
        let mut memory = memory(now);
        memory.remember(now, victim, None);
        for flow in &aimed {
            memory.remember(now + Duration::from_secs(1), *flow, None);
        }
        assert!(
            memory.admits(now + Duration::from_secs(1), &victim),
            "{name}"
        );
        assert!(
            memory.longest_chain() < 5,
            "{name}: {}",
            memory.longest_chain()
        );
    }
}

/// The flows of a table, the one longest unused first.
#[derive(Default)]
struct Plain(Vec<(Flow, Instant)>);

impl Plain {
    fn use_of(&mut self, now: Instant, flow: Flow) -> bool {
        let found = self.0.iter().position(|(known, _)| *known == flow);
        let used = found.map(|at| self.0.remove(at).1);
        self.0.push((flow, now));
        used.is_some_and(|used| now - used < FLOW_TIMEOUT)
    }
}

#[test]
fn a_full_table_forgets_the_flow_longest_unused_and_no_other() {
    let mut rng = seeded();
    for _ in 0..20 {
        let mut now = now();
        let mut memory = FlowMemory::new(now, HashKey(rng.random()), 16);
        let mut plain = Plain::default();
        let mut evicted = 0;
        for _ in 0..2000 {
            // Whole ticks: use within one is not told apart.
            let pause = if rng.random_bool(0.01) { 2000 } else { 1 };
            now += Duration::from_millis(100 * pause);
            let flow = flow(rng.random_range(0..24));
            match rng.random_range(0..8) {
                0..4 => {
                    let tell = memory.remember(now, flow, None);
                    let known = plain.use_of(now, flow);
                    assert_eq!(tell.is_none_or(|tell| !tell.new), known, "{flow:?}");
                    if plain.0.len() > 16 {
                        let (_, used) = plain.0.remove(0);
                        if now - used < FLOW_TIMEOUT {
                            evicted += 1;
                            assert!(memory.forgotten().is_some_and(|until| used < until));
                        }
                    }
                }
                4..7 => {
                    let known = plain
                        .0
                        .iter()
                        .any(|(known, used)| *known == flow && now - *used < FLOW_TIMEOUT);
                    assert_eq!(memory.admits(now, &flow), known, "{flow:?}");
                    if known {
                        plain.use_of(now, flow);
                    }
                }
                _ => {
                    memory.untold(&Tell {
                        reply: flow,
                        new: true,
                    });
                    plain.0.retain(|(known, _)| *known != flow);
                }
            }
            // Whatever was used since is still there.
            let until = memory.forgotten();
            for (known, used) in &plain.0 {
                let gone = now - *used >= FLOW_TIMEOUT || until.is_some_and(|until| *used < until);
                assert!(memory.knows(known) || gone);
            }
        }
        assert_eq!(memory.take_evicted(), evicted);
        assert!(evicted > 10);
    }
}

#[test]
fn a_node_remembers_no_more_for_having_more_shards() {
    assert_eq!([1, 2, 4].map(flows_max), [FLOWS_MAX; 3]);
    for shards in 1..=crate::config::SHARDS_MAX {
        let flows = flows_max(shards);
        assert!(flows.is_power_of_two() && flows >= SHARD_FLOWS_MIN);
        assert!(flows == SHARD_FLOWS_MIN || flows * shards <= NODE_FLOWS_MAX);
    }
}
