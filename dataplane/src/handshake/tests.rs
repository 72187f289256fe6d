//! The worker without its sockets.

use std::time::Duration;

use zeroize::Zeroizing;

use super::*;
use crate::noise::{CookieStore, LOAD_BURST, Remote, Tai64n, consume_initiation, initiation};
use crate::types::PeerConfig;

fn from() -> SocketAddr {
    "192.0.2.1:5000".parse().unwrap()
}

fn local(n: u8) -> LocalKeys {
    LocalKeys::new(&[n; 32])
}

fn settings(n: Option<u8>) -> Settings {
    Settings {
        private_key: n.map(|n| Zeroizing::new([n; 32])),
        mtu: 1420,
        ..Settings::default()
    }
}

fn worker(now: Instant) -> Worker {
    let mut worker = Worker::new(now, &settings(Some(1)), rand::make_rng());
    let peer = PeerConfig::new(PeerId(4), *local(2).public());
    let table = PeerTable::default().changed(vec![peer], &[], None, 1);
    worker.set_peers(Arc::new(table));
    worker
}

/// An initiation to us.
fn made_by(n: u8, cookies: &mut CookieStore, now: Instant) -> [u8; 148] {
    let maker = local(n);
    let remote = Remote::new(&maker, local(1).public(), None);
    let stamp = Tai64n::next(Duration::from_secs(1), None);
    let mut out = [0; 148];
    let cookie = cookies.cookie(now).cloned();
    let initiated = initiation(
        &maker,
        &remote,
        5,
        stamp,
        cookie.as_ref(),
        &mut rand::rng(),
        &mut out,
    )
    .unwrap();
    cookies.sent(initiated.mac1());
    out
}

#[test]
fn an_initiation_of_a_known_peer_passes_with_what_was_computed() {
    let now = now();
    let message = made_by(2, &mut CookieStore::default(), now);
    let passed = worker(now).check(now, from(), Standing::Stranger, &message);
    let passed = passed.unwrap();
    assert_eq!((passed.peer, passed.shard), (Some(PeerId(4)), 0));
    let peeked = passed.peeked.unwrap();
    let remote = Remote::new(&local(1), peeked.peer(), None);
    assert!(consume_initiation(&peeked, &remote).is_ok());
}

#[test]
fn strangers_go_no_further_under_their_own_reason() {
    let now = now();
    let message = made_by(3, &mut CookieStore::default(), now);
    let refused = worker(now).check(now, from(), Standing::Stranger, &message);
    let reason = DropReason::HandshakeUnknownPeer;
    assert_eq!(refused.unwrap_err(), Stopped::Dropped(reason));
}

#[test]
fn a_cookie_reply_goes_to_the_shard_its_index_names() {
    let now = now();
    let mut message = [0; COOKIE_LEN];
    message[0] = 3;
    message[4..8].copy_from_slice(&[0x11, 0x02, 0x33, 0x44]);
    let passed = worker(now).check(now, from(), Standing::Awaited, &message);
    let passed = passed.unwrap();
    assert_eq!((passed.peer, passed.shard), (None, 2));
}

#[test]
fn a_flood_is_answered_with_cookies_that_open_the_door() {
    let now = now();
    let mut worker = worker(now);
    let mut cookies = CookieStore::default();
    let message = made_by(2, &mut cookies, now);
    let stranger = Standing::Stranger;
    for _ in 0..LOAD_BURST {
        assert!(worker.check(now, from(), stranger, &message).is_ok());
    }
    let hub = Hub::new(now, 1).unwrap();
    worker.handle(now, &hub, from(), None, &message);
    worker.draw(now);
    let (leave, reply) = worker.replies[0];
    assert_eq!((leave.to, worker.replies.len()), (from(), 1));
    let remote = Remote::new(&local(2), local(1).public(), None);
    cookies.receive(now, &remote, &reply).unwrap();
    let message = made_by(2, &mut cookies, now);
    assert!(worker.check(now, from(), stranger, &message).is_ok());
}

#[test]
fn the_newest_key_counts() {
    let now = now();
    let hub = Hub::new(now, 1).unwrap();
    let mut worker = worker(now);
    let message = made_by(2, &mut CookieStore::default(), now);
    for (key, expected) in [
        (None, Err(Stopped::Dropped(DropReason::HandshakeNoKey))),
        (Some(9), Err(Stopped::Dropped(DropReason::HandshakeMac))),
        (Some(1), Ok(())),
    ] {
        let newer = Arc::new(settings(key));
        drop(hub.handshake_settings.force_push(newer));
        worker.hear(&hub);
        let judged = worker.check(now, from(), Standing::Stranger, &message);
        assert_eq!(judged.map(|_| ()), expected);
    }
}

#[test]
fn a_renewed_key_counts_beside_the_one_before_which_is_erased_in_time() {
    let start = now();
    let hub = Hub::new(start, 1).unwrap();
    let mut worker = worker(start);
    let until = start + Duration::from_secs(30);
    hub.change_settings(|newest| {
        newest.set_key(Some(&Zeroizing::new([1; 32])));
        newest.renew_key(&Zeroizing::new([9; 32]), until);
    });
    worker.hear(&hub);
    assert!((29_900..=30_001).contains(&worker.wait_ms(start)));
    let message = made_by(2, &mut CookieStore::default(), start);
    let passes = |worker: &mut Worker| worker.check(start, from(), Standing::Stranger, &message);
    assert!(passes(&mut worker).is_ok());
    worker.end_renewal(start, &hub);
    assert!(hub.settings.lock().unwrap().previous_key.is_some());
    worker.end_renewal(until, &hub);
    assert!(hub.settings.lock().unwrap().previous_key.is_none());
    let of_the_shard = hub.inboxes[0].settings.pop().unwrap();
    assert!(of_the_shard.previous_key.is_none());
    worker.hear(&hub);
    assert_eq!(worker.wait_ms(until), FOREVER);
    let mac = Stopped::Dropped(DropReason::HandshakeMac);
    assert_eq!(passes(&mut worker).unwrap_err(), mac);
}

#[test]
fn a_full_shard_costs_messages_not_memory() {
    let now = now();
    let hub = Hub::new(now, 1).unwrap();
    let mut worker = worker(now);
    let mut message = [0; COOKIE_LEN];
    message[0] = 3;
    for n in 1..=400u32 {
        let index = n << 16;
        hub.inboxes[0].awaited.insert(index);
        message[4..8].copy_from_slice(&index.to_le_bytes());
        worker.handle(now, &hub, from(), None, &message);
    }
    // Of a shard that there is not.
    message[5] = 7;
    worker.handle(now, &hub, from(), None, &message);
    let queued = hub.inboxes[0].handshakes.len() as u64;
    let counted = worker.counters.snapshot();
    let dropped = counted.drops(DropReason::HandshakeQueueFull);
    assert!(
        queued < 400 && queued + dropped == 400,
        "{queued} {dropped}"
    );
}
