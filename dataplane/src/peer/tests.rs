//! The table: who is kept, and who is called.

use std::time::Duration;

use rand::SeedableRng;
use zeroize::Zeroizing;

use super::*;
use crate::bench_support::shake_hands;
use crate::noise::public_key;
use crate::packet::build::Builder;
use crate::packet::segment::plan;
use crate::packet::vnet::VnetHdr;
use crate::peer::table::PeerTable;
use crate::session::{MESSAGE_LEN_MAX, Moment};
use crate::sys::now;

fn config(id: u32, key: u8) -> PeerEntry {
    PeerEntry {
        config: Arc::new(PeerConfig::new(PeerId(id), [key; 32])),
        shared: Arc::default(),
        owner: 0,
    }
}

fn engine(key: u8) -> Engine {
    let rng = rand::rngs::StdRng::seed_from_u64(key.into());
    let kind = crate::config::Engine::Ringtail;
    Engine::new(kind, &Zeroizing::new([key; 32]), 1420, 0, rng)
}

/// Makes these all the peers there are. Returns who wants a session, and how many packets waited for
/// those that are gone.
fn replace(
    peers: &mut Peers,
    now: Instant,
    mut engine: Option<&mut Engine>,
    entries: impl IntoIterator<Item = PeerEntry>,
) -> (Vec<PeerId>, u64) {
    let entries: Vec<PeerEntry> = entries.into_iter().collect();
    let there = peers.by_id.iter().flatten().map(|peer| peer.id);
    let named = entries.iter().map(|entry| entry.config.id);
    let ids: std::collections::BTreeSet<PeerId> = there.chain(named).collect();
    let mut dropped = 0;
    let wanted = ids.into_iter().filter(|id| {
        let entry = entries.iter().find(|entry| entry.config.id == *id);
        peers.set(now, engine.as_deref_mut(), *id, entry, &mut dropped)
    });
    (wanted.collect(), dropped)
}

#[test]
fn an_unchanged_peer_keeps_its_session_and_a_new_key_does_not() {
    let (mut peers, mut engine, now) = (Peers::new(false, 1), engine(1), now());
    let kept = config(1, 1);
    replace(&mut peers, now, None, [kept.clone(), config(2, 2)]);
    for id in [PeerId(1), PeerId(2)] {
        assert!(peers.wake(now, id, &mut engine).is_some());
    }
    peers.wait(now, PeerId(2), &[0; 30], 1);
    peers.touch(now, PeerId(2));
    let entries = [kept, config(2, 9)];
    let (wanted, dropped) = replace(&mut peers, now, Some(&mut engine), entries);
    assert_eq!((wanted, dropped), (vec![], 1));
    assert!(peers.get(PeerId(1)).unwrap().session().is_some());
    assert!(peers.get(PeerId(2)).unwrap().session().is_none());
    assert_eq!(peers.next_deadline(), None);
    // Gone and back, and we saw only the last table.
    let entries = [config(1, 1)];
    replace(&mut peers, now, Some(&mut engine), entries);
    assert!(peers.get(PeerId(1)).unwrap().session().is_none());
}

#[test]
fn sessions_of_peers_that_go_give_their_indexes_back() {
    let (mut peers, mut engine, now) = (Peers::new(false, 1), engine(1), now());
    replace(&mut peers, now, None, [config(1, 1)]);
    let at = Moment {
        now,
        wall: Duration::from_secs(1),
    };
    let mut out = [0; MESSAGE_LEN_MAX];
    let peer = peers.wake(now, PeerId(1), &mut engine).unwrap();
    let session = peer.session().unwrap();
    assert!(session.initiate(&mut engine, at, true, &mut out).is_some());
    let index = u32::from_le_bytes([out[4], out[5], out[6], out[7]]);
    assert_eq!(engine.holder(index), Some(PeerId(1)));
    replace(&mut peers, now, Some(&mut engine), std::iter::empty());
    assert_eq!(engine.holder(index), None);
}

#[test]
fn only_peers_that_want_it_are_called_and_at_their_time() {
    let (mut peers, mut engine, now) = (Peers::new(false, 1), engine(1), now());
    let ids = 0..10u8;
    replace(
        &mut peers,
        now,
        None,
        ids.map(|i| config(u32::from(i), i + 1)),
    );
    for i in 0..10 {
        peers.wake(now, PeerId(i), &mut engine);
    }
    assert_eq!(peers.next_deadline(), None, "idle sessions want nothing");
    for i in [3, 5] {
        let since = now + Duration::from_secs(u64::from(i));
        peers.wait(since, PeerId(i), &[0; 30], 1);
        peers.touch(now, PeerId(i));
    }
    let at = |secs| now + Duration::from_secs(secs);
    assert_eq!(peers.next_deadline(), Some(at(93)));
    assert_eq!(peers.take_due(at(92)), None);
    assert_eq!(peers.take_due(at(94)), Some(PeerId(3)));
    assert_eq!(peers.take_due(at(94)), None);
    assert_eq!(peers.take_due(at(95)), Some(PeerId(5)));
    // What is not done by then comes back.
    peers.touch(now, PeerId(5));
    assert_eq!(peers.next_deadline(), Some(at(95)));
}

#[test]
fn an_id_out_of_range_is_not_used() {
    let mut peers = Peers::new(false, 1);
    let beyond = u32::try_from(PEERS_MAX).unwrap();
    replace(&mut peers, now(), None, [config(beyond, 1)]);
    assert!(peers.get(PeerId(beyond)).is_none());
}

#[test]
fn a_new_keep_alive_or_a_new_key_of_ours_wants_sessions_at_once() {
    let (first, second) = (config(1, 1), config(2, 2));
    let kept_alive = |entry: &PeerEntry, seconds| {
        let mut entry = entry.clone();
        let mut config = PeerConfig::clone(&entry.config);
        config.persistent_keepalive = seconds;
        entry.config = Arc::new(config);
        entry
    };
    let (mut peers, mut engine, now) = (Peers::new(true, 1), engine(1), now());
    let wanted = |peers: &mut Peers, seconds| {
        let entries = [kept_alive(&first, seconds), second.clone()];
        replace(peers, now, None, entries).0
    };
    assert_eq!(wanted(&mut peers, None), []);
    assert_eq!(wanted(&mut peers, Some(0)), [], "0 is off");
    assert_eq!(wanted(&mut peers, Some(25)), [PeerId(1)]);
    for id in [PeerId(1), PeerId(2)] {
        assert!(peers.wake(now, id, &mut engine).is_some());
    }
    assert_eq!(peers.end_sessions(), [PeerId(1)]);
    assert!(peers.get(PeerId(2)).unwrap().session().is_none());
}

/// An owner with a peer that has keys and a path, and another shard's view of it.
struct Loan {
    now: Instant,
    owner: Peers,
    engine: Engine,
    far: (Engine, Session),
    table: PeerTable,
    guests: Guests,
}

const LENT: PeerId = PeerId(3);

impl Loan {
    fn at(&self, ms: u64) -> Instant {
        self.now + Duration::from_millis(ms)
    }

    fn new() -> Loan {
        let now = now();
        let config = |key| PeerConfig::new(LENT, public_key(&[key; 32]));
        let table = PeerTable::default().changed(vec![config(2)], &[], None, 1);
        let mut owner = Peers::new(true, 2);
        let (mut engine, mut far_engine) = (engine(1), engine(2));
        replace(&mut owner, now, Some(&mut engine), table.peers().cloned());
        let far = far_engine.session(now, &config(1));
        Loan {
            now,
            owner,
            engine,
            far: (far_engine, far),
            table,
            guests: Guests::default(),
        }
    }

    fn shake(&mut self, ms: u64) {
        let at = Moment {
            now: self.at(ms),
            wall: Duration::from_secs(1) + Duration::from_millis(ms),
        };
        let (far_engine, far) = &mut self.far;
        let peer = self.owner.wake(at.now, LENT, &mut self.engine).unwrap();
        let session = peer.session().unwrap();
        shake_hands(at, (&mut self.engine, session), (far_engine, far));
    }

    /// Has keys, and lends them with a first way.
    fn lending() -> Loan {
        let mut loan = Loan::new();
        loan.shake(0);
        loan.decide(1);
        loan.owner.touch(loan.now, LENT);
        loan
    }

    /// Of what is lent, by the open run.
    fn way(&mut self) -> String {
        let address = self.guests.get(LENT).unwrap().way().udp.unwrap();
        address.ip().to_string()
    }

    fn decide(&mut self, last: u8) {
        let endpoint = SocketAddr::from(([192, 0, 2, last], 1));
        let now = self.now;
        self.owner
            .get(LENT)
            .unwrap()
            .aim(now, Aim::Endpoint(endpoint));
    }

    fn admits(&mut self, ms: u64) -> bool {
        let admitted = self.guests.admit(self.at(ms), &self.table, LENT);
        admitted.expect("a peer of the table")
    }
}

#[test]
fn timestamps_are_remembered_while_our_key_is_gone() {
    let mut loan = Loan::new();
    let now = loan.now;
    let at = |secs, wall| Moment {
        now: now + Duration::from_secs(secs),
        wall: Duration::from_secs(wall),
    };
    let initiation = |session: &mut Session, engine: &mut Engine, at| {
        let mut out = [0; MESSAGE_LEN_MAX];
        let len = session.initiate(engine, at, true, &mut out).unwrap();
        out[..len].to_vec()
    };
    let hear = |session: &mut Session, engine: &mut Engine, at, message: &[u8]| {
        let mut out = [0; MESSAGE_LEN_MAX];
        let outcome = session.handle_handshake(engine, at, message, None, &mut out);
        outcome.map(|outcome| outcome.handshake)
    };
    let (far_engine, far) = &mut loan.far;
    let owner = &mut loan.owner;
    let theirs = initiation(far, far_engine, at(0, 100));
    let session = owner.wake(now, LENT, &mut loan.engine).unwrap().session();
    let session = session.unwrap();
    let heard = hear(session, &mut loan.engine, at(0, 100), &theirs);
    assert_eq!(heard, Ok(true));
    let ours = initiation(session, &mut loan.engine, at(1, 100));
    assert_eq!(hear(far, far_engine, at(1, 100), &ours), Ok(true));

    // It goes away, and comes back.
    owner.end_sessions();
    owner.end_sessions();
    loan.engine = engine(1);
    let session = owner.wake(now, LENT, &mut loan.engine).unwrap().session();
    let session = session.unwrap();
    let heard = hear(session, &mut loan.engine, at(2, 102), &theirs);
    assert_eq!(heard, Err(DropReason::HandshakeReplayed));
    // Our clock was set back.
    let ours = initiation(session, &mut loan.engine, at(2, 50));
    assert_eq!(hear(far, far_engine, at(2, 50), &ours), Ok(true));
}

#[test]
fn another_shard_is_admitted_once_there_are_keys_and_a_way_and_nothing_waits() {
    let mut loan = Loan::new();
    assert!(!loan.admits(0), "no keys");
    assert!(loan.guests.get(LENT).is_none(), "nothing is kept of it");
    loan.shake(0);
    loan.owner.touch(loan.now, LENT);
    assert!(!loan.admits(0), "no way");
    loan.decide(1);
    let now = loan.now;
    loan.owner.wait(now, LENT, &[0; 30], 1);
    loan.owner.touch(now, LENT);
    assert!(!loan.admits(0), "those that wait go first");
    assert!(loan.owner.next_waiting(now, LENT).is_some());
    loan.owner.touch(now, LENT);
    assert!(loan.admits(0));
    loan.guests.settle(LENT);

    let shared = Arc::clone(&loan.owner.get(LENT).unwrap().shared);
    shared.loan.hand(|| true);
    assert!(
        !loan.admits(0),
        "so do those on their way through the owner"
    );
    shared.loan.arrived();
    assert!(loan.admits(0));
    assert_eq!(loan.guests.admit(now, &loan.table, PeerId(9)), None);
}

#[test]
fn a_change_of_keys_or_way_reaches_guests_with_their_next_run_and_old_keys_are_gone() {
    let mut loan = Loan::lending();
    assert!(loan.admits(0));
    assert_eq!(loan.way(), "192.0.2.1");
    loan.decide(2);
    loan.owner.touch(loan.now, LENT);
    assert_eq!(loan.way(), "192.0.2.1", "the open run");
    loan.guests.settle(LENT);
    assert!(loan.admits(0));
    assert_eq!(loan.way(), "192.0.2.2");
    loan.guests.settle(LENT);

    let session = loan.owner.get(LENT).unwrap().session().unwrap();
    let old = Arc::downgrade(session.lend(loan.now).unwrap());
    // Each handshake retires a pair of keys, and three of them are kept for opening.
    for i in 1..=4 {
        loan.shake(200 * i);
        loan.owner.touch(loan.at(200 * i), LENT);
    }
    assert!(old.upgrade().is_none(), "no guest keeps them alive");
    assert!(loan.admits(800));
    loan.guests.settle(LENT);
    assert!(!loan.admits(180_800), "too old");
    loan.owner.end_sessions();
    assert!(!loan.admits(800), "our own key has changed");
}

#[test]
fn a_grant_that_has_ended_is_given_up_although_runs_of_others_keep_it_alive() {
    let mut loan = Loan::lending();
    let open = |loan: &Loan| {
        let mut other = Guests::default();
        assert_eq!(other.admit(loan.now, &loan.table, LENT), Some(true));
        other
    };
    let first = open(&loan);
    assert!(loan.admits(0));
    assert_eq!(loan.way(), "192.0.2.1");
    loan.guests.settle(LENT);
    loan.decide(2);
    loan.owner.touch(loan.now, LENT);
    assert!(loan.admits(0));
    assert_eq!(loan.way(), "192.0.2.2", "the way has moved");
    loan.guests.settle(LENT);
    let second = open(&loan);
    loan.owner.end_sessions();
    assert!(!loan.admits(0), "our own key has changed");

    loan.shake(200);
    loan.owner.touch(loan.at(200), LENT);
    assert!(loan.admits(200));
    loan.guests.settle(LENT);
    let third = open(&loan);
    replace(&mut loan.owner, loan.now, None, []);
    assert!(!loan.admits(200), "the peer is gone");
    drop([first, second, third]);
}

/// A guest would go on with the old way until the owner has its report, and the answer to what it sent
/// would bring the owner back to it.
#[test]
fn nobody_goes_back_to_the_local_address_that_routes_have_moved_away_from() {
    let mut loan = Loan::lending();
    let local = |last: u8| Local {
        addr: [192, 0, 2, last].into(),
        interface: 2,
    };
    let arrives = |loan: &mut Loan, ms, at| {
        let (now, from) = (loan.at(ms), SocketAddr::from(([192, 0, 2, 1], 1)));
        let peer = loan.owner.get(LENT).unwrap();
        peer.arrived(now, Source::Udp(from), Some(at), &mut vec![]);
        loan.owner.touch(now, LENT);
    };
    let lent = |loan: &mut Loan, ms| {
        let admitted = loan.admits(ms);
        let way = loan.guests.get(LENT).unwrap().way();
        loan.guests.settle(LENT);
        admitted.then_some(way.local)
    };
    arrives(&mut loan, 0, local(7));
    assert_eq!(lent(&mut loan, 0), Some(Some(local(7))));
    loan.table.get(LENT).unwrap().shared.unstick();
    assert_eq!(lent(&mut loan, 10), None, "the owner is to send it");
    let (now, peer) = (loan.at(20), loan.owner.get(LENT).unwrap());
    peer.troubled(now, Trouble::default(), &mut vec![]);
    loan.owner.touch(now, LENT);
    assert_eq!(lent(&mut loan, 20), Some(None));
    arrives(&mut loan, 30, local(7));
    assert_eq!(lent(&mut loan, 30), Some(None), "it was under way");
    arrives(&mut loan, 40, local(8));
    assert_eq!(lent(&mut loan, 40), Some(Some(local(8))));
}

#[test]
fn a_grant_nothing_was_sealed_with_is_let_go() {
    let mut loan = Loan::new();
    loan.shake(0);
    let now = loan.now;
    let session = loan.owner.get(LENT).unwrap().session().unwrap();
    let sealing = Arc::clone(session.lend(now).unwrap());
    let ids = [LENT, PeerId(4)];
    let config = |id: PeerId| PeerConfig::new(id, [u8::try_from(id.0).unwrap(); 32]);
    let table = PeerTable::default().changed(ids.map(config).to_vec(), &[], None, 1);
    let lent = ids.map(|id| {
        let lent = Lent::new(Terms::new(Arc::clone(&sealing), Way::default(), None));
        table.get(id).unwrap().shared.loan.set(&lent);
        lent
    });
    let grants = lent.each_ref().map(Lent::offer);
    for id in ids {
        assert_eq!(loan.guests.admit(now, &table, id), Some(true));
    }
    loan.guests.settle(LENT);
    drop(lent);
    assert!(grants[0].upgrade().is_none(), "its packet came to nothing");
    assert!(grants[1].upgrade().is_some(), "its packet is being sealed");
    loan.guests.settle(PeerId(4));
    assert!(grants[1].upgrade().is_none());
}

#[test]
fn guests_whose_runs_are_open_together_hold_on_until_each_is_closed() {
    let mut loan = Loan::lending();
    let now = loan.now;
    let other = PeerId(4);
    let config = PeerConfig::new(other, [4; 32]);
    let table = loan.table.changed(vec![config], &[], None, 1);
    let session = loan.owner.get(LENT).unwrap().session().unwrap();
    let sealing = Arc::clone(session.lend(now).unwrap());
    let lent = Lent::new(Terms::new(sealing, Way::default(), None));
    table.get(other).unwrap().shared.loan.set(&lent);
    let grant = lent.offer();

    let mut packet = Builder::new(([10, 0, 0, 1], 1).into(), ([10, 0, 0, 2], 2).into()).udp(b"x");
    let plan = plan(&VnetHdr::PLAIN, &packet).unwrap();
    for id in [other, LENT] {
        assert_eq!(loan.guests.admit(now, &table, id), Some(true));
        let guest = loan.guests.get(id).unwrap();
        let staged = guest.stage(&mut loan.engine, &plan, &mut packet, 0..1, &mut [0; 100]);
        assert_eq!(staged.segments, 1);
    }
    drop(lent);
    loan.guests.settle(other);
    loan.guests.settle(LENT);
    assert!(grant.upgrade().is_some());
    loan.guests.closed(other);
    assert!(grant.upgrade().is_none());
    assert_eq!(loan.way(), "192.0.2.1", "that of the other");
    loan.guests.closed(LENT);
    assert_eq!(loan.guests.get(LENT).unwrap().way(), Way::default());
}

#[test]
fn the_owner_hears_of_what_was_sent_at_once_and_then_now_and_then() {
    let mut loan = Loan::lending();
    let send = |loan: &mut Loan, ms, trouble| {
        assert!(loan.admits(ms));
        let now = loan.at(ms);
        loan.guests.get(LENT).unwrap().sent(now, trouble);
        loan.guests.settle(LENT);
        loan.guests.report_due()
    };
    let start = loan.now;
    let ms_of = |at: Instant| (at - start).as_millis();
    let report = |loan: &mut Loan, ms, room: bool| {
        let mut told = Vec::new();
        let now = loan.at(ms);
        loan.guests.report(now, |owner, report| {
            assert_eq!((owner, report.peer), (0, LENT));
            told.push((ms_of(report.at), report.trouble));
            room
        });
        told
    };
    let fine = Trouble::default();
    assert_eq!(report(&mut loan, 0, true), [], "nothing was sent");
    assert_eq!(send(&mut loan, 1000, fine), Some(loan.at(1000)), "at once");
    assert_eq!(report(&mut loan, 1000, true), [(1000, fine)]);
    for ms in [1001, 1020] {
        assert_eq!(send(&mut loan, ms, fine), Some(loan.at(1050)));
        assert_eq!(report(&mut loan, ms, true), []);
    }
    assert_eq!(
        report(&mut loan, 1050, false),
        [(1020, fine)],
        "no room there"
    );
    assert_eq!(
        report(&mut loan, 1100, true),
        [(1020, fine)],
        "so once more"
    );
    assert_eq!(loan.guests.report_due(), None);
    let gso = Trouble { gso: true, ..fine };
    assert_eq!(send(&mut loan, 1101, gso), Some(loan.at(1101)), "trouble");
    assert_eq!(report(&mut loan, 1101, true), [(1101, gso)]);
    assert_eq!(send(&mut loan, 1102, fine), Some(loan.at(1151)));
    loan.guests.forget(LENT);
    assert_eq!(report(&mut loan, 1200, true), [], "the peer is gone");
}
