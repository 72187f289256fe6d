//! A shard without its driver and its device: what it decides between two waits.

use std::net::{SocketAddr, UdpSocket};

use super::*;

/// A shard's seat in a hub of its own.
fn seat() -> Seat {
    let now = epoch();
    let key = zeroize::Zeroizing::new([1; 32]);
    Seat {
        id: 0,
        hub: Arc::new(Hub::new(now, 1).unwrap()),
        queues: Arc::new([]),
        gso: false,
        driver: DriverKind::Epoll,
        cpu: None,
        settings: Arc::new(Settings {
            private_key: Some(key),
            mtu: 1420,
        }),
        roam: false,
        kind: config::Engine::Ringtail,
        published: Published::default(),
    }
}

#[expect(clippy::disallowed_methods, reason = "any instant will do")]
fn epoch() -> Instant {
    Instant::now()
}

fn shard(seat: &Seat) -> Shard<'_> {
    let v4 = UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let sockets = Arc::new(Sockets { v4, v6: None });
    Shard::new(seat, &seat.hub.inboxes[0], sockets, seat.hub.epoch)
}

#[test]
fn a_shard_that_was_asked_to_end_before_it_armed_its_bell_does_not_sleep() {
    let seat = seat();
    let (hub, shard) = (&seat.hub, shard(&seat));
    let wake = &hub.inboxes[0].wake;
    wake.about_to_sleep();
    assert_eq!(shard.wait(false), None, "nothing to do");
    wake.awake();
    // The loop has looked at the flag, and the bell is not armed yet: ringing it does nothing.
    hub.stop();
    wake.about_to_sleep();
    assert_eq!(shard.wait(false), Some(Duration::ZERO));
}
