//! Published vectors, and every backend against ring.

use super::{Aead, Backend, HEADER_LEN, Key, MESSAGE_LEN_MAX, MESSAGE_LEN_MIN, Open, Seal};

/// Every backend that this machine can run.
fn backends() -> impl Iterator<Item = Aead> {
    Backend::ALL.into_iter().filter_map(Aead::force)
}

#[test]
fn a_backend_is_found() {
    assert!(backends().any(|aead| aead.backend() == Aead::detect().backend()));
    assert!(Aead::force(Backend::Ring).is_some());
}

#[test]
fn the_header_is_written_as_on_the_wire() {
    for aead in backends() {
        let key = Key::new(&[1; 32]);
        let mut message = [0xff; 32];
        aead.seal(&mut [Seal {
            key: &key,
            receiver: 0x0403_0201,
            counter: 0x0807_0605_0403_0201,
            message: &mut message,
        }]);
        let header = [4, 0, 0, 0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(message[..HEADER_LEN], header, "{aead:?}");
    }
}

#[test]
fn messages_of_impossible_lengths_are_refused() {
    let key = Key::new(&[1; 32]);
    for aead in backends() {
        for len in [0, 1, 15, 16, 31, MESSAGE_LEN_MAX + 1] {
            let mut message = vec![0; len];
            let mut batch = [Open {
                key: &key,
                counter: 0,
                message: &mut message,
                ok: true,
            }];
            aead.open(&mut batch);
            assert!(!batch[0].ok, "{aead:?} {len}");
        }
    }
}

#[test]
#[should_panic(expected = "room for header and tag")]
fn sealing_without_room_for_the_tag_panics() {
    let key = Key::new(&[1; 32]);
    Aead::detect().seal(&mut [Seal {
        key: &key,
        receiver: 0,
        counter: 0,
        message: &mut [0; MESSAGE_LEN_MIN - 1],
    }]);
}
