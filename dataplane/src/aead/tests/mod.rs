//! Every backend against published vectors and against ring.
//!
//! With `RINGTAIL_LONG_TESTS` set there are a hundred times as many random batches.

mod portable;
mod vectors;

use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::{
    Aead, Backend, Engine, HEADER_LEN, Key, MESSAGE_LEN_MAX, MESSAGE_LEN_MIN, Open, Seal, TAG_LEN,
    known,
};
use crate::seeded;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    let byte = |pair: &[u32]| u8::try_from(16 * pair[0] + pair[1]).unwrap();
    digits.chunks_exact(2).map(byte).collect()
}

fn long() -> bool {
    std::env::var_os("RINGTAIL_LONG_TESTS").is_some()
}

/// An emulated processor is there for one backend; RINGTAIL_AEAD_BACKENDS says so, and then that
/// backend must not be left out in silence (`scripts/avx512.sh`).
#[test]
fn the_backends_asked_for_are_there() {
    let names: Vec<&str> = backends().map(|aead| aead.backend().name()).collect();
    println!("this machine runs {names:?}");
    let asked = std::env::var("RINGTAIL_AEAD_BACKENDS").unwrap_or_else(|_| "ring".to_owned());
    for name in asked.split(',') {
        let backend = Backend::ALL.iter().find(|backend| backend.name() == name);
        let backend = backend.unwrap_or_else(|| panic!("no backend is named {name}"));
        assert!(Aead::force(*backend).is_some(), "{name}");
    }
}

/// A way to seal and open: a backend as the product uses it, or the kernel on its own.
struct Way {
    name: String,
    seal: SealBatch,
    open: OpenBatch,
}

type SealBatch = Box<dyn Fn(&mut [Seal<'_>])>;
type OpenBatch = Box<dyn Fn(&mut [Open<'_>])>;

/// Every backend that this machine can run, with its choice of shapes and without; and the kernel in
/// plain code.
fn ways() -> Vec<Way> {
    let mut ways = Vec::new();
    let mut add = |name: String, seal: SealBatch, open: OpenBatch| {
        ways.push(Way { name, seal, open });
    };
    for aead in backends() {
        let name = aead.backend().name().to_owned();
        let mut add_aead = |name, aead: Aead| {
            let seal = Box::new(move |batch: &mut [Seal<'_>]| aead.seal(batch));
            add(name, seal, Box::new(move |batch| aead.open(batch)));
        };
        if aead.backend() != Backend::Ring {
            add_aead(format!("{name} for every shape"), aead.for_every_shape());
        }
        add_aead(name, aead);
    }
    macro_rules! kernel {
        ($name:expr, $run:expr) => {
            add(
                $name.to_owned(),
                Box::new(|batch| {
                    batch.iter_mut().for_each(Seal::write_header);
                    $run(batch);
                }),
                Box::new(|batch| {
                    batch.iter_mut().for_each(Open::prepare);
                    $run(batch);
                }),
            );
        };
    }
    kernel!("interleaved, portable", portable::run_interleaved);
    kernel!("lockstep, portable", portable::run_lockstep);
    ways
}

/// Every backend that this machine can run.
fn backends() -> impl Iterator<Item = Aead> {
    Backend::ALL.iter().copied().filter_map(Aead::force)
}

/// What a test knows of a packet.
#[derive(Clone)]
struct Packet {
    key: usize,
    counter: u64,
    plaintext: Vec<u8>,
    /// Unused bytes before the message in its buffer, which must stay as they are.
    offset: usize,
    /// A bit of the sealed message to change before opening: byte, and mask.
    damage: Option<(usize, u8)>,
}

impl Packet {
    fn new(rng: &mut StdRng, keys: usize, len: usize) -> Packet {
        let mut plaintext = vec![0; len];
        rng.fill_bytes(&mut plaintext);
        Packet {
            key: rng.random_range(0..keys),
            counter: rng.random(),
            plaintext,
            offset: rng.random_range(0..64),
            damage: None,
        }
    }

    /// Header, ciphertext and tag by ring.
    fn sealed(&self, keys: &[[u8; 32]], receiver: u32) -> Vec<u8> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, &keys[self.key]).unwrap();
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.counter.to_le_bytes());
        let nonce = Nonce::assume_unique_for_key(nonce);
        let mut message = vec![4, 0, 0, 0];
        message.extend(receiver.to_le_bytes());
        message.extend(self.counter.to_le_bytes());
        let mut text = self.plaintext.clone();
        LessSafeKey::new(key)
            .seal_in_place_append_tag(nonce, Aad::empty(), &mut text)
            .unwrap();
        message.append(&mut text);
        message
    }
}

/// Seals and opens the batch and compares every byte, in and around the messages.
fn compare(way: &Way, packets: &[Packet]) {
    let bytes: Vec<[u8; 32]> = (0..4).map(|k| [k * 31 + 7; 32]).collect();
    let keys: Vec<Key> = bytes.iter().map(Key::new).collect();
    let around = |packet: &Packet, message: &[u8]| {
        [&[0x11; 64][..packet.offset], message, &[0x22; 64]].concat()
    };
    let inside = |packet: &Packet| packet.offset..packet.offset + packet.plaintext.len() + 32;
    let shape: Vec<usize> = packets
        .iter()
        .map(|packet| packet.plaintext.len())
        .collect();
    let name = &way.name;

    let receiver = 0x1234_5678;
    let expected: Vec<Vec<u8>> = packets
        .iter()
        .map(|packet| around(packet, &packet.sealed(&bytes, receiver)))
        .collect();
    let mut buffers: Vec<Vec<u8>> = packets
        .iter()
        .map(|packet| {
            let room = [&[0x33; 16], &packet.plaintext[..], &[0x33; 16]].concat();
            around(packet, &room)
        })
        .collect();
    let mut batch: Vec<Seal<'_>> = packets
        .iter()
        .zip(&mut buffers)
        .map(|(packet, buffer)| Seal {
            key: &keys[packet.key],
            receiver,
            counter: packet.counter,
            message: &mut buffer[inside(packet)],
        })
        .collect();
    (way.seal)(&mut batch);
    for (i, (buffer, expected)) in buffers.iter().zip(&expected).enumerate() {
        assert!(buffer == expected, "{name} seals packet {i} of {shape:?}");
    }

    for (packet, buffer) in packets.iter().zip(&mut buffers) {
        if let Some((byte, mask)) = packet.damage {
            buffer[packet.offset + byte] ^= mask;
        }
    }
    let expected: Vec<Vec<u8>> = packets
        .iter()
        .zip(&buffers)
        .map(|(packet, sealed)| {
            let mut opened = sealed.clone();
            let text = &mut opened[inside(packet)][HEADER_LEN..HEADER_LEN + packet.plaintext.len()];
            match packet.damage {
                None => text.copy_from_slice(&packet.plaintext),
                Some(_) => text.fill(0),
            }
            opened
        })
        .collect();
    let mut batch: Vec<Open<'_>> = packets
        .iter()
        .zip(&mut buffers)
        .map(|(packet, buffer)| Open {
            key: &keys[packet.key],
            counter: packet.counter,
            message: &mut buffer[inside(packet)],
            ok: packet.damage.is_some(),
        })
        .collect();
    (way.open)(&mut batch);
    for (i, (opened, packet)) in batch.iter().zip(packets).enumerate() {
        let right = packet.damage.is_none();
        assert_eq!(opened.ok, right, "{name} judges packet {i} of {shape:?}");
    }
    for (i, (buffer, expected)) in buffers.iter().zip(&expected).enumerate() {
        assert!(buffer == expected, "{name} opens packet {i} of {shape:?}");
    }
}

#[test]
fn every_length_is_as_ring_seals_and_opens_it() {
    let mut rng = seeded();
    let lengths: Vec<usize> = (0..=2048).chain([4095, 8900, 65_535]).collect();
    for way in ways() {
        // In batches of one, where a packet has all lanes, and of several.
        for batch_len in [1, 7] {
            for lengths in lengths.chunks(batch_len) {
                let packet = |len: &usize| Packet::new(&mut rng, 1, *len);
                let packets: Vec<Packet> = lengths.iter().map(packet).collect();
                compare(&way, &packets);
            }
        }
    }
}

#[test]
fn every_alignment_is_as_good() {
    let mut rng = seeded();
    for way in ways() {
        let packet = |offset| Packet {
            offset,
            ..Packet::new(&mut rng, 4, 200)
        };
        let packets: Vec<Packet> = (0..64).map(packet).collect();
        compare(&way, &packets);
    }
}

#[test]
fn any_batch_is_as_ring_seals_and_opens_it() {
    let mut rng = seeded();
    for way in ways() {
        for _ in 0..if long() { 2000 } else { 20 } {
            let keys = rng.random_range(1..=4);
            let equal = rng.random_bool(0.5).then(|| rng.random_range(0..1500));
            let len_max = [20, 200, 1500, 9000][rng.random_range(0..4)];
            // Up to three sets of the kernel that takes 16 packets at a time.
            let packets: Vec<Packet> = (0..rng.random_range(0..=40))
                .map(|_| {
                    let len = equal.unwrap_or_else(|| rng.random_range(0..len_max));
                    let mut packet = Packet::new(&mut rng, keys, len);
                    if rng.random_bool(0.2) {
                        let byte = rng.random_range(HEADER_LEN..MESSAGE_LEN_MIN + len);
                        packet.damage = Some((byte, 1 << rng.random_range(0..8)));
                    }
                    packet
                })
                .collect();
            compare(&way, &packets);
        }
    }
}

/// A super-packet: what the groups are shaped for.
#[test]
fn a_super_packet_and_its_tail() {
    let mut rng = seeded();
    for way in ways() {
        let mut lengths = vec![1420; if long() { 45 } else { 9 }];
        lengths.push(333);
        let packets = lengths.iter().map(|len| Packet::new(&mut rng, 1, *len));
        compare(&way, &packets.collect::<Vec<_>>());
    }
}

#[test]
fn every_flipped_bit_is_noticed_and_spoils_no_other_packet() {
    let mut rng = seeded();
    let len = 80;
    for way in ways() {
        let three = [len, len, len].map(|len| Packet::new(&mut rng, 2, len));
        let bits =
            (HEADER_LEN..MESSAGE_LEN_MIN + len).flat_map(|byte| (0..8).map(move |bit| (byte, bit)));
        for (n, (byte, bit)) in bits.enumerate() {
            let mut packets = three.clone();
            packets[n % 3].damage = Some((byte, 1 << bit));
            compare(&way, &packets);
        }
    }
}

/// The header is not authenticated but for the counter, which is the nonce: WireGuard's receiver
/// finds the key by the index.
#[test]
fn another_counter_or_key_opens_nothing() {
    let keys = [Key::new(&[1; 32]), Key::new(&[2; 32])];
    for way in ways() {
        for (key, counter, right) in [
            (0, 5, true),
            (0, 4, false),
            (0, 5 << 32, false),
            (1, 5, false),
        ] {
            let mut message = [7; 132];
            let mut batch = [Seal {
                key: &keys[0],
                receiver: 9,
                counter: 5,
                message: &mut message,
            }];
            (way.seal)(&mut batch);
            let mut batch = [Open {
                key: &keys[key],
                counter,
                message: &mut message,
                ok: !right,
            }];
            (way.open)(&mut batch);
            assert_eq!(batch[0].ok, right, "{} {key} {counter}", way.name);
            let text = &message[HEADER_LEN..132 - TAG_LEN];
            assert!(text.iter().all(|byte| *byte == if right { 7 } else { 0 }));
        }
    }
}

/// Backends that do nearly everything right, each with a fault of its own.
#[test]
fn a_backend_with_a_fault_does_not_answer_the_known_question() {
    let ring = Engine::Ring;
    let flip = |message: &mut [u8], at: usize| message[at] ^= 1;
    let answers = |seal: &dyn Fn(&mut [Seal<'_>]), open: &dyn Fn(&mut [Open<'_>])| {
        known::answers(|batch| seal(batch), |batch| open(batch))
    };
    let seal = |batch: &mut [Seal<'_>]| ring.seal(batch);
    let open = |batch: &mut [Open<'_>]| ring.open(batch);
    assert!(answers(&seal, &open));

    let wrong_tag = |batch: &mut [Seal<'_>]| {
        ring.seal(batch);
        let last = batch[10].message.len() - 1;
        flip(batch[10].message, last);
    };
    assert!(!answers(&wrong_tag, &open));
    let wrong_ciphertext = |batch: &mut [Seal<'_>]| {
        ring.seal(batch);
        flip(batch[7].message, HEADER_LEN + 446);
    };
    assert!(!answers(&wrong_ciphertext, &open));
    let leaves_out_the_last = |batch: &mut [Seal<'_>]| ring.seal(&mut batch[..10]);
    assert!(!answers(&leaves_out_the_last, &open));
    let opens_anything = |batch: &mut [Open<'_>]| {
        ring.open(batch);
        batch.iter_mut().for_each(|packet| packet.ok = true);
    };
    assert!(!answers(&seal, &opens_anything));
    let refuses_one = |batch: &mut [Open<'_>]| {
        ring.open(batch);
        batch[0].ok = false;
    };
    assert!(!answers(&seal, &refuses_one));
    let wrong_text = |batch: &mut [Open<'_>]| {
        ring.open(batch);
        flip(batch[5].message, HEADER_LEN + 64);
    };
    assert!(!answers(&seal, &wrong_text));
    let shows_what_was_damaged = |batch: &mut [Open<'_>]| {
        ring.open(batch);
        let damaged = batch.iter_mut().find(|packet| !packet.ok);
        flip(damaged.expect("one is").message, HEADER_LEN);
    };
    assert!(!answers(&seal, &shows_what_was_damaged));
}

/// Whatever the place of a dropped key holds, it is not the key.
#[test]
fn a_dropped_key_leaves_nothing_behind() {
    let mut place = std::mem::MaybeUninit::new(Key::new(&[0xab; 32]));
    // SAFETY: `Key` has no padding, so every byte of a key is initialised; nothing else refers to the place.
    let bytes = |place: &std::mem::MaybeUninit<Key>| unsafe {
        std::slice::from_raw_parts(place.as_ptr().cast::<u8>(), size_of::<Key>()).to_vec()
    };
    let of_the_key = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == 0xab).count();
    assert!(of_the_key(&bytes(&place)) >= 64, "in both forms");
    // SAFETY: it is initialised, and not used as a key again.
    unsafe { place.assume_init_drop() };
    assert_eq!(of_the_key(&bytes(&place)), 0);
}

#[test]
fn a_backend_is_found() {
    assert!(backends().any(|aead| aead.backend() == Aead::detect().backend()));
    assert!(Aead::force(Backend::Ring).is_some());
}

#[test]
fn the_header_is_written_as_on_the_wire() {
    let key = Key::new(&[1; 32]);
    for aead in backends() {
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

/// Alone, and between good ones.
#[test]
fn messages_of_impossible_lengths_are_refused() {
    let key = Key::new(&[1; 32]);
    let mut good = [0; 132];
    Aead::detect().seal(&mut [Seal {
        key: &key,
        receiver: 0,
        counter: 0,
        message: &mut good,
    }]);
    for way in ways() {
        for len in [0, 1, 15, 16, 31, MESSAGE_LEN_MAX + 1] {
            for neighbours in [0, 5] {
                let mut messages = vec![good.to_vec(); neighbours];
                messages.insert(neighbours / 2, vec![7; len]);
                let mut batch: Vec<Open<'_>> = messages
                    .iter_mut()
                    .map(|message| Open {
                        key: &key,
                        counter: 0,
                        message,
                        ok: true,
                    })
                    .collect();
                (way.open)(&mut batch);
                for (i, packet) in batch.iter().enumerate() {
                    let (name, good) = (&way.name, i != neighbours / 2);
                    assert_eq!(packet.ok, good, "{name} {len} packet {i}");
                    let text_end = packet.message.len().saturating_sub(TAG_LEN);
                    let text = packet.message.get(HEADER_LEN..text_end).unwrap_or_default();
                    assert!(good || text.iter().all(|byte| *byte == 0), "{name} {len}");
                }
            }
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

#[test]
fn a_key_says_nothing_of_itself() {
    assert_eq!(format!("{:?}", Key::new(&[0xab; 32])), "Key(..)");
}
