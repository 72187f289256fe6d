//! Tests of [`super::Places`].

use super::*;

fn limits() -> Limits {
    Limits {
        strangers: Bounds {
            all: 12,
            wide: 6,
            narrow: 3,
        },
        local: Bounds {
            all: 4,
            wide: 4,
            narrow: 3,
        },
        known: Bounds {
            all: 5,
            wide: 4,
            narrow: 3,
        },
        owner: 2,
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn enter(places: &mut Places<u8>, source: &str) -> PlaceId {
    let entered = places.enter(ip(source)).unwrap();
    if let Some(gone) = entered.displaced {
        places.leave(gone);
    }
    entered.id
}

#[test]
fn who_fills_his_network_takes_his_own_places() {
    for [host, same, beside, elsewhere] in [
        ["192.0.2.1", "::ffff:192.0.2.1", "192.0.2.9", "192.0.3.1"],
        [
            "2001:db8:0:7::1",
            "2001:db8:0:7:8::2",
            "2001:db8:0:8::1",
            "2001:db8:1::1",
        ],
    ] {
        let mut places = Places::<u8>::new(limits());
        let other = enter(&mut places, elsewhere);
        let held: Vec<PlaceId> = [host, same, host]
            .map(|source| enter(&mut places, source))
            .to_vec();
        // The host is full: its oldest goes.
        assert_eq!(places.enter(ip(same)).unwrap().displaced, Some(held[0]));
        // The network around it is full after three more: of the host that holds most, the oldest.
        for _ in 0..3 {
            assert_eq!(places.enter(ip(beside)).unwrap().displaced, None);
        }
        assert!(places.enter(ip(beside)).unwrap().displaced.is_some());
        for n in 0..40 {
            // An address for each connection is of no use within one customer's network.
            let source = match ip(host) {
                IpAddr::V4(_) => format!("192.0.2.{}", 100 + n),
                IpAddr::V6(_) => format!("2001:db8:0:{n}::1"),
            };
            enter(&mut places, &source);
        }
        assert_eq!(places.count_taken().strangers, 7);
        assert!(places.strangers.contains_key(&other), "nobody else notices");
    }
}

#[test]
fn when_all_is_taken_who_holds_most_loses_and_everybody_gets_in() {
    let mut places = Places::<u8>::new(limits());
    let quiet = enter(&mut places, "198.51.100.1");
    for n in 0..100 {
        enter(&mut places, &format!("10.0.{}.{}", n % 5, n));
    }
    assert_eq!(places.count_taken().strangers, 12);
    assert!(places.strangers.contains_key(&quiet));
    // A network for each connection: the oldest goes, and the newest always gets in.
    for n in 0..100 {
        let id = enter(&mut places, &format!("10.1.{n}.1"));
        assert!(places.strangers.contains_key(&id));
    }
    assert_eq!(places.count_taken().strangers, 12);
}

#[test]
fn this_machine_has_places_of_its_own() {
    let mut places = Places::<u8>::new(limits());
    let operator = enter(&mut places, "127.0.0.1");
    for n in 0..200 {
        enter(&mut places, &format!("10.0.{n}.1"));
    }
    assert!(places.strangers.contains_key(&operator));
    for n in 0..200 {
        enter(&mut places, &format!("127.0.0.{}", 2 + n % 9));
    }
    let newest = enter(&mut places, "::1");
    assert!(places.strangers.contains_key(&newest));
    assert_eq!(places.count_taken().local, 4);
    assert_eq!(places.count_taken().strangers, 12);
}

#[test]
fn who_is_known_leaves_his_place_to_the_next_and_is_not_displaced_by_strangers() {
    let mut places = Places::<u8>::new(limits());
    let first = enter(&mut places, "10.0.0.1");
    assert_eq!(places.settle(first, 1), Settled::Known(None));
    assert_eq!(places.settle(first, 1), Settled::Known(None));
    assert_eq!(places.count_taken().strangers, 0);
    for n in 0..100 {
        enter(&mut places, &format!("10.0.0.{}", n % 3));
    }
    assert!(places.known.contains_key(&first));
    // The owner's third connection ends his first.
    let more = [0; 2].map(|_| enter(&mut places, "10.2.0.1"));
    assert_eq!(places.settle(more[0], 1), Settled::Known(None));
    assert_eq!(places.settle(more[1], 1), Settled::Known(Some(first)));
    assert_eq!(places.settle(first, 1), Settled::Gone);
    places.leave(first);
    assert_eq!(places.count_taken().known, 2);
}

#[test]
fn places_of_those_known_run_out_per_network_and_in_all() {
    let mut places = Places::<u8>::new(limits());
    for n in 0..3 {
        let id = enter(&mut places, "10.0.0.1");
        assert_eq!(places.settle(id, n), Settled::Known(None));
    }
    let id = enter(&mut places, "10.0.0.1");
    assert_eq!(places.settle(id, 9), Settled::Full, "its host");
    assert!(places.strangers.contains_key(&id), "it stays a stranger");
    let id = enter(&mut places, "10.0.0.2");
    assert_eq!(places.settle(id, 3), Settled::Known(None));
    let id = enter(&mut places, "10.0.0.3");
    assert_eq!(places.settle(id, 9), Settled::Full, "its customer");
    let second = enter(&mut places, "10.1.0.1");
    assert_eq!(places.settle(second, 2), Settled::Known(None));
    // All are taken: owner 2 has two.
    let id = enter(&mut places, "127.0.0.1");
    assert!(matches!(places.settle(id, 9), Settled::Known(Some(_))));
    // One each: the network with most loses one, until it has no more than the next.
    let oldest = *places.known.keys().next().unwrap();
    let id = enter(&mut places, "127.0.0.1");
    assert_eq!(places.settle(id, 10), Settled::Known(Some(oldest)));
    for (source, owner) in [("127.0.0.1", 11), ("10.0.0.2", 12), ("10.1.0.1", 13)] {
        let id = enter(&mut places, source);
        assert_eq!(places.settle(id, owner), Settled::Full, "{source}");
    }
}

#[test]
fn who_holds_the_places_for_those_known_from_few_networks_keeps_nobody_out() {
    for [crowd, elsewhere] in [["10.0.", "198.51."], ["2001:db8:", "2001:db9:"]] {
        let source = |prefix: &str, wide: u32, host: u32| {
            if prefix.contains(':') {
                format!("{prefix}{wide}:{host}::1")
            } else {
                format!("{prefix}{wide}.{host}")
            }
        };
        let known = Bounds {
            all: 24,
            wide: 12,
            narrow: 6,
        };
        let mut places = Places::<u32>::new(Limits { known, ..limits() });
        let mut come = |from: &str, owner: u32| {
            let entered = places.enter(ip(from)).unwrap();
            entered
                .displaced
                .into_iter()
                .for_each(|id| places.leave(id));
            let settled = places.settle(entered.id, owner);
            if let Settled::Known(Some(gone)) = settled {
                places.leave(gone);
            }
            settled
        };
        // Four hosts of two networks, a new key for each connection, take it all.
        for n in 0..24 {
            let settled = come(&source(crowd, n % 2, n / 2 % 2), n);
            assert_eq!(settled, Settled::Known(None));
        }
        assert_eq!(come(&source(crowd, 0, 0), 100), Settled::Full);
        // Whoever comes from elsewhere has a place all the same, and they share what there is.
        for n in 0..8 {
            let settled = come(&source(elsewhere, n, 1), 200 + n);
            assert!(
                matches!(settled, Settled::Known(Some(_))),
                "{n}: {settled:?}"
            );
            // Who had to go for it has no turn again.
            assert_eq!(
                come(&source(crowd, n % 2, 0), 300 + n),
                Settled::Full,
                "{n}"
            );
        }
        let wide = |prefix: &str, n| networks(ip(&source(prefix, n, 1)))[1];
        let taken = |net| places.taken_of(Class::Known, net);
        assert_eq!([0, 1].map(|n| taken(wide(crowd, n))), [8, 8]);
        assert!((0..8).all(|n| taken(wide(elsewhere, n)) == 1));
    }
}

#[test]
fn a_forgotten_owner_s_connections_are_strangers_again() {
    let mut places = Places::<u8>::new(limits());
    let ids = ["10.0.0.1", "::1"].map(|source| enter(&mut places, source));
    for id in ids {
        places.settle(id, 7);
    }
    assert_eq!(places.estrange(7), ids);
    let taken = Taken {
        strangers: 1,
        local: 1,
        known: 0,
    };
    assert_eq!(places.count_taken(), taken);
    assert_eq!(places.estrange(7), []);
    assert!(places.make_room().is_some_and(|id| ids.contains(&id)));
}

#[test]
fn a_driver_that_does_not_end_who_lost_his_place_lets_nobody_in() {
    let mut places = Places::<u8>::new(limits());
    let entered: Vec<_> = (0..1000)
        .map_while(|_| places.enter(ip("10.0.0.1")))
        .collect();
    assert_eq!(entered.len(), 3 + LEAVING_MAX);
    // Whoever comes from this machine waits for nobody outside.
    assert!(places.enter(ip("::1")).is_some());
    let gone = entered.iter().find_map(|entered| entered.displaced);
    places.leave(gone.unwrap());
    assert!(places.enter(ip("10.0.0.1")).is_some());
}

#[test]
fn descriptors_bound_all_and_leave_those_known_the_most() {
    for descriptors in [0, 1, 8, 24, 100, 1 << 20] {
        let limits = limits().within(descriptors);
        let all = limits.strangers.all + limits.local.all + limits.known.all;
        assert!(all <= descriptors.max(3), "{descriptors}: {limits:?}");
    }
    assert_eq!(limits().within(24).known.all, 5);
    assert_eq!(limits().within(8).known.all, 5);
    assert_eq!(limits().within(1 << 20), limits());
}

#[test]
fn counts_hold_over_any_operations() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    let mut places = Places::<u64>::new(limits());
    let mut live: Vec<PlaceId> = Vec::new();
    for step in 0..20_000 {
        let pick = usize::try_from(random(1 << 16)).unwrap();
        let id = (!live.is_empty()).then(|| live[pick % live.len()]);
        match (random(8), id) {
            (0..4, _) => {
                let source = match random(4) {
                    0 => format!("10.{}.{}.{}", random(2), random(3), random(3)),
                    1 => format!("2001:db8:{}:{}::{}", random(3), random(3), random(9)),
                    2 => format!("127.0.0.{}", random(5)),
                    _ => "::1".to_owned(),
                };
                live.extend(places.enter(ip(&source)).map(|entered| entered.id));
            }
            (4, Some(id)) => drop(places.settle(id, random(6))),
            (5, Some(id)) => {
                live.retain(|other| *other != id);
                places.leave(id);
            }
            (6, _) => drop(places.estrange(random(6))),
            (7, _) => {
                let leaving: Vec<PlaceId> = places.leaving.keys().copied().collect();
                for id in leaving {
                    live.retain(|other| *other != id);
                    places.leave(id);
                }
            }
            _ => {}
        }
        let (taken, limits) = (places.count_taken(), limits());
        let of = |class: Class| places.of_class(class).count();
        assert_eq!(taken.strangers, of(Class::Stranger), "{step}");
        assert_eq!(taken.local, of(Class::Local), "{step}");
        let sum: usize = places.networks.values().sum();
        assert_eq!(sum, 2 * (places.strangers.len() + places.known.len()));
        let owned: usize = places.owners.values().map(BTreeSet::len).sum();
        assert_eq!(owned, taken.known, "{step}");
        assert!(taken.known <= limits.known.all, "{step}");
        let all = places.strangers.len() + places.known.len() + places.leaving.len();
        assert_eq!(all, live.len(), "{step}: every connection has one place");
    }
}
