//! What must not pass: every damaged byte, every wrong length, every useless key.

use super::*;

/// Every u-coordinate of low order (the seven that fit 255 bits; the top bit of a coordinate is
/// ignored, so each counts twice).
fn low_order() -> impl Iterator<Item = [u8; 32]> {
    let mut one = [0; 32];
    one[0] = 1;
    let near_p = |low: u8| {
        let mut point = [0xff; 32];
        point[0] = low;
        point[31] = 0x7f;
        point
    };
    let of_order_8 = [
        [
            0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f,
            0xc4, 0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16,
            0x5f, 0x49, 0xb8, 0x00,
        ],
        [
            0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83,
            0xef, 0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd,
            0xd0, 0x9f, 0x11, 0x57,
        ],
    ];
    let points = [
        [0; 32],
        one,
        of_order_8[0],
        of_order_8[1],
        near_p(0xec),
        near_p(0xed),
        near_p(0xee),
    ];
    points.into_iter().flat_map(|point| {
        let mut high = point;
        high[31] |= 0x80;
        [point, high]
    })
}

#[test]
fn every_damaged_byte_of_an_initiation_is_refused() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, true);
    let (_, message) = a.initiate(&mut rng, None);
    for at in 0..132 {
        let mut damaged = message;
        damaged[at] ^= 1 << rng.random_range(0..8);
        let error = peek_initiation(&b.local, &damaged).unwrap_err();
        let expected = if at < 4 { Error::Kind } else { Error::Mac1 };
        assert_eq!(error, expected, "byte {at}");
        // Somebody who knows the responder's public key can make MAC1 right. The index is what the
        // sender wants to be called, and is not part of what is authenticated.
        put_mac1(&a.remote, &mut damaged);
        if !(4..8).contains(&at) && at < 116 {
            let error = b.receive(&damaged).unwrap_err();
            let expected = if at < 4 {
                Error::Kind
            } else {
                Error::Authentication
            };
            assert_eq!(error, expected, "byte {at}");
        }
    }
    assert!(b.receive(&message).is_ok());
}

#[test]
fn every_damaged_byte_of_a_response_is_refused_and_the_true_one_is_still_good() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, true);
    let (initiated, message) = a.initiate(&mut rng, None);
    let (theirs, answer) = b.respond(&mut rng, &message);
    for at in 0..76 {
        let mut damaged = answer;
        damaged[at] ^= 1 << rng.random_range(0..8);
        let expected = match at {
            0..4 => Error::Kind,
            8..12 => Error::WrongIndex,
            _ => Error::Mac1,
        };
        assert_eq!(a.finish(&initiated, &damaged).unwrap_err(), expected);
        put_mac1(&b.remote, &mut damaged);
        if (12..60).contains(&at) {
            let error = a.finish(&initiated, &damaged).unwrap_err();
            assert_eq!(error, Error::Authentication, "byte {at}");
        }
    }
    assert_joined(&a.finish(&initiated, &answer).unwrap(), &theirs);
}

#[test]
fn only_the_exact_length_is_taken() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, false);
    let (initiated, message) = a.initiate(&mut rng, None);
    let (_, answer) = b.respond(&mut rng, &message);
    for len in 0..=200 {
        let cut = |message: &[u8]| {
            let mut cut = message.to_vec();
            cut.resize(len, 0);
            cut
        };
        if len != 148 {
            let error = peek_initiation(&b.local, &cut(&message)).unwrap_err();
            assert_eq!(error, Error::Length);
        }
        if len != 92 {
            let error = a.finish(&initiated, &cut(&answer)).unwrap_err();
            assert_eq!(error, Error::Length);
        }
        if len != 64 {
            let error = consume_cookie_reply(&a.remote, &cut(&answer), &[0; 16]).unwrap_err();
            assert_eq!(error, Error::Length);
        }
    }
}

#[test]
fn a_peer_of_low_order_never_handshakes() {
    let mut rng = seeded();
    let local = LocalKeys::new(&rng.random());
    let mut points = 0;
    for point in low_order() {
        let remote = Remote::new(&local, &point, None);
        let mut out = [0; 148];
        let error = initiation(&local, &remote, 1, stamp(1), None, &mut rng, &mut out);
        assert_eq!(error.unwrap_err(), Error::LowOrder);
        assert_eq!(out, [0; 148], "nothing was written");
        points += 1;
    }
    assert_eq!(points, 14);
}

#[test]
fn an_ephemeral_key_of_low_order_is_refused_in_both_messages() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, false);
    let (initiated, message) = a.initiate(&mut rng, None);
    let (_, answer) = b.respond(&mut rng, &message);
    for point in low_order() {
        let mut forged = message;
        forged[8..40].copy_from_slice(&point);
        put_mac1(&a.remote, &mut forged);
        let error = peek_initiation(&b.local, &forged).unwrap_err();
        assert_eq!(error, Error::LowOrder);
        let mut forged = answer;
        forged[12..44].copy_from_slice(&point);
        put_mac1(&b.remote, &mut forged);
        let error = a.finish(&initiated, &forged).unwrap_err();
        assert_eq!(error, Error::LowOrder);
    }
    assert!(a.finish(&initiated, &answer).is_ok());
}

#[test]
fn an_initiator_that_claims_a_static_key_of_low_order_is_refused() {
    let mut rng = seeded();
    for point in low_order() {
        let (mut a, mut b) = ends(&mut rng, false);
        // The claim is sealed like any static key; only the responder's own look at it helps.
        a.local.public = point;
        let (_, message) = a.initiate(&mut rng, None);
        let peeked = peek_initiation(&b.local, &message).unwrap();
        assert_eq!(*peeked.peer(), point);
        b.remote = Remote::new(&b.local, &point, None);
        let error = consume_initiation(&peeked, &b.remote).unwrap_err();
        assert_eq!(error, Error::LowOrder);
    }
}

#[test]
fn messages_of_strangers_and_for_strangers_are_refused() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, false);
    let (c, d) = ends(&mut rng, false);
    let (initiated, message) = a.initiate(&mut rng, None);
    // For another responder.
    let error = peek_initiation(&d.local, &message).unwrap_err();
    assert_eq!(error, Error::Mac1);
    // From another peer than the one it is held against.
    let peeked = peek_initiation(&b.local, &message).unwrap();
    let error = consume_initiation(&peeked, &c.remote).unwrap_err();
    assert_eq!(error, Error::UnknownPeer);
    // Claims to be a, but was made without its private key.
    let mut liar = End {
        local: LocalKeys::new(&rng.random()),
        remote: Remote::new(&c.local, b.local.public(), None),
    };
    liar.local.public = *a.local.public();
    let (_, forged) = liar.initiate(&mut rng, None);
    assert_eq!(b.receive(&forged).unwrap_err(), Error::Authentication);
    // A response by somebody who is not b, with a right MAC1 and the right index.
    let (_, answer) = b.respond(&mut rng, &message);
    let mut forged = [0; 92];
    let stranger = Remote::new(&d.local, a.local.public(), None);
    let received = b.receive(&message).unwrap();
    response(&stranger, received, 5, None, &mut rng, &mut forged).unwrap();
    forged[44..60].fill(7);
    put_mac1(&b.remote, &mut forged);
    let error = a.finish(&initiated, &forged).unwrap_err();
    assert_eq!(error, Error::Authentication);
    assert!(a.finish(&initiated, &answer).is_ok());
}

#[test]
fn ends_that_disagree_about_the_preshared_key_do_not_join() {
    let mut rng = seeded();
    let (a, mut b) = ends(&mut rng, true);
    b.remote.set_preshared(None);
    let (initiated, message) = a.initiate(&mut rng, None);
    let (_, answer) = b.respond(&mut rng, &message);
    let error = a.finish(&initiated, &answer).unwrap_err();
    assert_eq!(error, Error::Authentication);
}

#[test]
fn a_response_to_another_initiation_is_refused() {
    let mut rng = seeded();
    let (a, b) = ends(&mut rng, false);
    let (_, message) = a.initiate(&mut rng, None);
    let (second, _) = a.initiate(&mut rng, None);
    let (_, mut answer) = b.respond(&mut rng, &message);
    assert_eq!(a.finish(&second, &answer).unwrap_err(), Error::WrongIndex);
    answer[8..12].copy_from_slice(&second.index().to_le_bytes());
    put_mac1(&b.remote, &mut answer);
    let error = a.finish(&second, &answer).unwrap_err();
    assert_eq!(error, Error::Authentication);
}
