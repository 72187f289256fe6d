//! The device against a plain model of it, and the rules of its ids.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

fn key(n: u32) -> NodePublic {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&(n + 1).to_le_bytes());
    NodePublic(key)
}

fn net(n: u32) -> Prefix {
    let [_, a, b, c] = n.to_be_bytes();
    Prefix {
        addr: std::net::Ipv4Addr::new(10, a, b, c).into(),
        bits: 32,
    }
}

fn steps(steps: impl IntoIterator<Item = Step>) -> Transaction {
    Transaction {
        steps: steps.into_iter().collect(),
        ..Transaction::default()
    }
}

/// The whole state in order, from the device and from the model.
type State = Vec<(NodePublic, Vec<Prefix>)>;

fn state(device: &Device) -> State {
    device
        .peers()
        .map(|(_, peer)| (peer.key, peer.allowed_ips().collect()))
        .collect()
}

/// The rules in their plainest form: lists, searched.
fn model(state: &mut State, transaction: &Transaction) {
    if transaction.replace_peers {
        state.clear();
    }
    let mut selected: Option<(NodePublic, bool)> = None;
    for step in &transaction.steps {
        if let Step::Peer(key) = step {
            let made_here = !state.iter().any(|(k, _)| k == key);
            if made_here {
                state.push((*key, Vec::new()));
            }
            selected = Some((*key, made_here));
            continue;
        }
        let Some((key, made_here)) = selected else {
            continue;
        };
        match step {
            Step::Remove => {
                state.retain(|(k, _)| *k != key);
                selected = None;
            }
            Step::UpdateOnly if made_here => {
                state.retain(|(k, _)| *k != key);
                selected = None;
            }
            Step::ReplaceAllowedIps => {
                for (k, prefixes) in state.iter_mut() {
                    if *k == key {
                        prefixes.clear();
                    }
                }
            }
            Step::Allow(prefix) => {
                for (k, prefixes) in state.iter_mut() {
                    prefixes.retain(|p| p != prefix);
                    if *k == key {
                        prefixes.push(*prefix);
                    }
                }
            }
            Step::Disallow(prefix) => {
                for (k, prefixes) in state.iter_mut() {
                    if *k == key {
                        prefixes.retain(|p| p != prefix);
                    }
                }
            }
            Step::UpdateOnly
            | Step::Peer(_)
            | Step::PresharedKey(_)
            | Step::Endpoint(_)
            | Step::Keepalive(_) => {}
        }
    }
}

fn random_transaction(rng: &mut StdRng) -> Transaction {
    let mut transaction = Transaction {
        replace_peers: rng.random_bool(0.1),
        ..Transaction::default()
    };
    for _ in 0..rng.random_range(0..30) {
        let prefix = net(rng.random_range(0..12));
        transaction.steps.push(match rng.random_range(0..20) {
            0..5 => Step::Peer(key(rng.random_range(0..6))),
            5 => Step::Remove,
            6 => Step::UpdateOnly,
            7 => Step::ReplaceAllowedIps,
            8..16 => Step::Allow(prefix),
            16..18 => Step::Disallow(prefix),
            18 => Step::Keepalive(rng.random_range(0..2)),
            _ => Step::PresharedKey(None),
        });
    }
    transaction
}

#[test]
fn peers_and_prefixes_are_where_a_plain_model_has_them() {
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut device, mut wanted) = (Device::default(), State::new());
        let mut holders: BTreeMap<PeerId, NodePublic> = BTreeMap::new();
        // What the data plane makes of the changes it is told of.
        let mut told: BTreeMap<PeerId, PeerConfig> = BTreeMap::new();
        for _ in 0..15 {
            let transaction = random_transaction(&mut rng);
            device.check(&transaction).unwrap();
            model(&mut wanted, &transaction);
            let before = state(&device);
            let changes = device.apply(transaction);
            assert_eq!(state(&device), wanted, "seed {seed}");
            assert_eq!(
                device.allowed_ips_len(),
                wanted.iter().map(|(_, p)| p.len()).sum::<usize>()
            );
            if before != wanted {
                // Another order of the same prefixes does not matter to the data plane.
                let sorted = |state: &State| -> BTreeMap<_, _> {
                    let set = |p: &Vec<Prefix>| p.iter().map(|p| p.addr).collect::<BTreeSet<_>>();
                    state.iter().map(|(k, p)| (*k, set(p))).collect()
                };
                assert!(
                    !changes.peers.is_empty() || sorted(&before) == sorted(&wanted),
                    "seed {seed}"
                );
            }
            let (peers, gone) = device.peers_now(&changes.peers);
            gone.iter().for_each(|id| drop(told.remove(id)));
            told.extend(peers.into_iter().map(|peer| (peer.id, peer)));
            let configs = all(&mut device);
            let by_prefix = |configs: &mut dyn Iterator<Item = &PeerConfig>| -> Vec<PeerConfig> {
                let mut configs: Vec<PeerConfig> = configs.cloned().collect();
                configs.sort_by_key(|config| config.id);
                for config in &mut configs {
                    config
                        .allowed_ips
                        .sort_by_key(|prefix| (prefix.addr, prefix.bits));
                }
                configs
            };
            assert_eq!(
                by_prefix(&mut told.values()),
                by_prefix(&mut configs.iter()),
                "seed {seed}"
            );
            for config in &configs {
                // An id changes hands only after a table without it.
                let before = holders.get(&config.id);
                assert!(
                    before.is_none_or(|key| key.0 == config.public_key),
                    "seed {seed}"
                );
            }
            holders = configs
                .iter()
                .map(|config| (config.id, NodePublic(config.public_key)))
                .collect();
        }
    }
}

/// Every peer as the data plane is to have it.
fn all(device: &mut Device) -> Vec<PeerConfig> {
    let ids = device.peers().map(|(id, _)| id).collect();
    device.peers_now(&ids).0
}

#[test]
fn a_prefix_that_moves_changes_both_peers_and_no_other() {
    let mut device = Device::default();
    let many = (1..1000).flat_map(|n| [Step::Peer(key(n)), Step::Allow(net(n))]);
    device.apply(steps(many));
    let ids: Vec<PeerId> = device.peers().map(|(id, _)| id).collect();
    let changes = device.apply(steps([Step::Peer(key(7)), Step::Allow(net(9))]));
    assert_eq!(changes.peers, BTreeSet::from([ids[6], ids[8]]));
    let (told, gone) = device.peers_now(&changes.peers);
    let held: Vec<usize> = told.iter().map(|peer| peer.allowed_ips.len()).collect();
    assert_eq!((held, gone), (vec![2, 0], vec![]));
    let changes = device.apply(steps([Step::Peer(key(7)), Step::Remove]));
    let (told, gone) = device.peers_now(&changes.peers);
    assert_eq!((told, gone), (vec![], vec![ids[6]]));
}

#[test]
fn changes_name_what_the_data_plane_must_be_told() {
    let mut device = Device::default();
    let endpoint: SocketAddr = "192.0.2.1:5".parse().unwrap();
    let first = device.apply(steps([
        Step::Peer(key(1)),
        Step::Endpoint(endpoint),
        Step::Keepalive(5),
        Step::Allow(net(1)),
        Step::Peer(key(2)),
        Step::Endpoint(endpoint),
        Step::Remove,
    ]));
    let (id, _) = device.peers().next().unwrap();
    assert_eq!(first.endpoints, BTreeMap::from([(id, endpoint)]));
    assert!(first.peers.contains(&id) && !first.private_key);

    let again = device.apply(steps([
        Step::Peer(key(1)),
        Step::Keepalive(5),
        Step::Allow(net(1)),
        Step::PresharedKey(None),
        Step::Disallow(net(7)),
    ]));
    assert_eq!(again, Changes::default());
    let roamed_back = device.apply(steps([Step::Peer(key(1)), Step::Endpoint(endpoint)]));
    assert_eq!(
        roamed_back.endpoints.len(),
        1,
        "the peer may have roamed since"
    );

    for step in [
        Step::Keepalive(6),
        Step::PresharedKey(Some(PresharedKey([1; 32]))),
        Step::Disallow(net(1)),
        Step::Allow(net(3)),
        Step::ReplaceAllowedIps,
        Step::Remove,
    ] {
        let changes = device.apply(steps([Step::Peer(key(1)), step.clone()]));
        assert_eq!(changes.peers, BTreeSet::from([id]), "{step:?}");
    }
    let own = NodePrivate::clamped([9; 32]);
    let transaction = Transaction {
        private_key: Some(Some(own)),
        ..Transaction::default()
    };
    assert!(device.apply(transaction.clone()).private_key);
    assert!(!device.apply(transaction).private_key, "the same key again");
}

#[test]
fn a_peer_replaced_by_itself_is_a_new_one() {
    let mut device = Device::default();
    device.apply(steps([Step::Peer(key(1))]));
    let before = all(&mut device)[0].id;
    device.apply(Transaction {
        replace_peers: true,
        ..steps([Step::Peer(key(1))])
    });
    let after = all(&mut device)[0].id;
    assert_ne!(before, after, "its session and counters begin anew");
}

#[test]
fn a_full_table_refuses_one_more_and_can_be_replaced_whole() {
    let max = u32::try_from(PEERS_MAX).unwrap();
    let peers = |range: std::ops::Range<u32>| steps(range.map(|n| Step::Peer(key(n))));
    let mut device = Device::default();
    assert_eq!(device.check(&peers(0..max + 1)), Err(Errno::NO_SPACE));
    device.check(&peers(0..max)).unwrap();
    device.apply(peers(0..max));
    assert_eq!(device.check(&peers(max..max + 1)), Err(Errno::NO_SPACE));
    device.check(&peers(0..5)).unwrap();

    // One out, one in, as `wg syncconf` does it.
    let mut swap = steps([Step::Peer(key(0)), Step::Remove, Step::Peer(key(max))]);
    device.check(&swap).unwrap();
    swap.steps.push(Step::Peer(key(max + 1)));
    assert_eq!(device.check(&swap), Err(Errno::NO_SPACE));
    let update = steps([Step::Peer(key(max + 1)), Step::UpdateOnly]);
    assert_eq!(device.check(&update), Err(Errno::NO_SPACE));

    let all_new = Transaction {
        replace_peers: true,
        ..peers(max..2 * max)
    };
    device.check(&all_new).unwrap();
    device.apply(all_new);
    assert_eq!(all(&mut device).len(), PEERS_MAX);
}

#[test]
fn prefixes_have_a_bound() {
    let many = u32::try_from(ALLOWED_IPS_MAX).unwrap() + 1;
    let prefixes = (0..many).map(|n| Step::Allow(net(n)));
    let transaction = steps(std::iter::once(Step::Peer(key(1))).chain(prefixes));
    assert_eq!(Device::default().check(&transaction), Err(Errno::NO_SPACE));
}

/// `wg set wg0 peer P allowed-ips …` and `wg syncconf` say the whole list again.
#[test]
fn a_full_list_of_prefixes_can_be_set_again() {
    let max = u32::try_from(ALLOWED_IPS_MAX).unwrap();
    let list = |first: &[Step], range: std::ops::Range<u32>| {
        let prefixes = range.map(|n| Step::Allow(net(n)));
        steps(first.iter().cloned().chain(prefixes))
    };
    let mut device = Device::default();
    let set = |device: &mut Device, transaction: Transaction| {
        device.check(&transaction)?;
        device.apply(transaction);
        Ok(device.allowed_ips_len())
    };
    let two = Step::Peer(key(2));
    let again = [Step::Peer(key(1)), Step::ReplaceAllowedIps];
    assert_eq!(set(&mut device, list(&again, 0..max)), Ok(max as usize));
    assert_eq!(set(&mut device, list(&again, 0..max)), Ok(max as usize));
    // To another peer, without saying that these are all.
    assert_eq!(
        set(&mut device, list(std::slice::from_ref(&two), 0..9)),
        Ok(max as usize)
    );
    // One more is one too many, also for a moment.
    let more = list(std::slice::from_ref(&two), max..max + 1);
    assert_eq!(set(&mut device, more), Err(Errno::NO_SPACE));
    let moved = [two.clone(), Step::Allow(net(max)), Step::Disallow(net(0))];
    assert_eq!(set(&mut device, steps(moved.clone())), Err(Errno::NO_SPACE));
    let [two, allow, disallow] = moved;
    let moved = steps([two, disallow, allow]);
    assert_eq!(set(&mut device, moved), Ok(max as usize));
}

/// `protocol/uapi.md` §6: the sizes the kernel's own tests use.
#[test]
fn a_large_device_is_set_and_read_back_whole() {
    use crate::uapi::{DeviceStatus, Parser, PeerStatus, READ_LEN_MAX, Request};
    for (peers, prefixes) in [(1, 130_560), (2_000, 130_560), (40, 40 * 52), (30, 1)] {
        let mut text = "set=1\nreplace_peers=true\n".to_owned();
        let mut next = 0;
        for peer in 0..peers {
            text += &format!("public_key={}\n", key(peer).to_hex());
            let share = if peer == 0 {
                prefixes - (peers - 1) * (prefixes / peers)
            } else {
                prefixes / peers
            };
            for _ in 0..share {
                text += &format!("allowed_ip={}/32\n", net(next).addr);
                next += 1;
            }
        }
        text.push('\n');
        let mut parser = Parser::new(|_| None);
        let mut device = Device::default();
        for piece in text.as_bytes().chunks(READ_LEN_MAX) {
            parser.handle_bytes(piece);
            while let Some(request) = parser.poll_request() {
                let Request::Set(Ok(transaction)) = request else {
                    panic!("refused");
                };
                device.check(&transaction).unwrap();
                device.apply(transaction);
            }
        }
        let reply = device.reply(DeviceStatus::default(), &|_| PeerStatus::default());
        let reply = std::str::from_utf8(reply.as_bytes()).unwrap();
        let count = |what: &str| reply.lines().filter(|l| l.starts_with(what)).count();
        assert_eq!(count("public_key="), peers as usize);
        assert_eq!(count("allowed_ip="), prefixes as usize);
        let sent = text.lines().filter(|l| l.starts_with("allowed_ip="));
        assert!(sent.eq(reply.lines().filter(|l| l.starts_with("allowed_ip="))));
    }
}
