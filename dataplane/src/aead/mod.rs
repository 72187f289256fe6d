//! Multi-packet ChaCha20-Poly1305 (RFC 8439) for WireGuard transport data.
//!
//! [`Aead::seal`] and [`Aead::open`] take a batch of packets of any lengths, each with its own key
//! and counter, and work in place in the caller's buffers. Nothing is allocated.
//!
//! A message on the wire (WireGuard paper §5.4.6), lengths in bytes:
//!
//! ```text
//! 0    1           4              8            16              len-16        len
//! | 4 | 0  0  0 | receiver LE | counter LE | text, 0..=65535 | tag           |
//! ```
//!
//! The nonce is four zero bytes and the counter, little-endian; there is no associated data.
//!
//! # Backends
//!
//! AVX-512 with IFMA, AVX2, and ring, one packet after the other. [`Aead::detect`] takes the first that
//! the processor can run and that answers a known question (`known`); off x86-64 that is ring. A batch
//! of a shape for which ring is faster goes to ring, by the small rule of `Engine::unless_ring_is_faster`.
//!
//! # The kernels
//!
//! Both compute ChaCha20 with a vector for each of the 16 words of the state and a *lane* for each block
//! (`chacha20`). Every lane has the key, nonce and block number of the packet it works for, so that
//! nothing in the rounds knows of packets. Afterwards a transposition turns lanes into blocks of
//! keystream. What differs is who multiplies for Poly1305:
//!
//! - `interleaved`, for AVX2, which has no wide multiplication: scalar Poly1305 (`poly1305`, radix 2^64).
//!   The rounds of one group of lanes run amid the MAC of the group before it, a few blocks of the MAC
//!   in each double round; the processor's out-of-order window does both at once, because the one uses
//!   vector units and the other multiplier and adders. `deal` says which lane is which block. One-time
//!   keys are blocks like others, and lanes are idle only where the batch ends.
//! - `lockstep`, for AVX-512 with IFMA: Poly1305 in vectors too (`macs`, radix 2^44), a lane for each of
//!   eight packets, four blocks of each between one chain of carries and the next. The batch is taken in
//!   sets of 16 packets (`set`), and the MACs of one set run amid the rounds of its neighbour (`cipher`).
//!
//! They know of a processor only the few operations of the traits in `lanes`, which the tests implement
//! once more in plain arrays: so the logic of both is tested everywhere, and with overflow checks.
//!
//! AVX2, measured on Zen 3 in ns per packet of 1420 bytes in a batch of 45: `interleaved` 570, ring 826;
//! where the other hardware thread of the core is busy, about 865 and 1090. It has its steps in assembly
//! (`assembly`); as the compiler makes them it takes 615, and 965 beside a busy thread. Tried there: the
//! MAC in vectors too, with limbs of 26 bits; groups of 16 blocks in two vectors, to share the
//! bookkeeping; two packets and so two MACs at a time. All were slower, the last above all beside a busy
//! thread, where what counts is the number of instructions.
//!
//! AVX-512, measured on an Intel core that ran at 3.0 GHz, in ns per packet of 1420 bytes: 454 to 461 in a batch of
//! 45 with warm caches, which is 0.48 of ring's time to seal and 0.51 to open; 480 to 540 with 4 to 256 batches in
//! turn; 765 for each of three packets that a super-packet leaves over. Of 200 bytes, 45 at once: 0.47 of ring. A
//! batch of four mixed lengths lost to ring there (1.42). The core starts two 512-bit additions, exclusive ors or
//! IFMA a cycle, but one rotation.
//!
//! The 1380 cycles of a packet are more than the models say. llvm-mca 19 estimates, in cycles for a step of 16 blocks
//! of ChaCha20 and for the 64 of Poly1305 that belong to them, bookkeeping included: on Sapphire Rapids 535 and 192,
//! and 716 for both together, so about 1050 for a packet; on Zen 4 537, 365 and 898 (its model gives a wide
//! multiplication two cycles; with one, 537, 206 and 754). There are 1320 vector operations, two of which can start
//! in a cycle, so 660 is the least. A kernel without interleaving took as long on that core, so there the MACs gain
//! next to nothing by being amid the rounds, as the model says: either alone keeps busy the ports that it needs most.
//! They are there for processors where what the one leaves free the other can take. With scalar MACs, as for AVX2,
//! both together would take 1070 and 1150: the vector units have less to do then, but there are more instructions
//! than places for them in a cycle, along chains of multiplications.
//!
//! Where there is no such processor, `scripts/avx512.sh` runs the tests on an emulated one.
//!
//! # Constant time
//!
//! No branch and no address depends on a key, a text or a tag: rounds are additions, exclusive ors and
//! rotations by constants; the MACs are additions, shifts and multiplications whose time does not
//! depend on the operands; the tag is compared as a whole (`packet`). What branches depend on are
//! lengths, the number of packets, whether packets share a key *object*, and in the end whether a
//! tag was right: all of them public. `bench/benches/aead_timing.rs` looks for leaks.
//!
//! # Opening
//!
//! `lockstep` decrypts nothing whose tag is wrong. `interleaved` decrypts a group of lanes after its MAC
//! and so before the packet's tag is known: the caller, who has lent the buffers exclusively, cannot look
//! until `open` returns, and no other thread and no input or output has them meanwhile. By then every tag has been compared, and the text of a packet that failed is
//! zeros, with any backend. Packets share nothing but the vector registers: a bad one changes nothing for
//! the others.
//!
//! # Zeroising
//!
//! [`Key`]s on drop; before the kernel returns, what ChaCha20 starts from, the buffers of keystream, one-time
//! keys and MACs. Values in use are moved and copied, by the compiler when it runs out of registers and by
//! the code from one function to another: such copies on the stack are out of reach.

#[cfg(target_arch = "x86_64")]
mod assembly;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", test))]
mod chacha20;
#[cfg(any(target_arch = "x86_64", test))]
mod cipher;
#[cfg(any(target_arch = "x86_64", test))]
mod deal;
#[cfg(any(target_arch = "x86_64", test))]
mod interleaved;
mod known;
#[cfg(any(target_arch = "x86_64", test))]
mod lanes;
#[cfg(any(target_arch = "x86_64", test))]
mod lockstep;
#[cfg(any(target_arch = "x86_64", test))]
mod macs;
#[cfg(any(target_arch = "x86_64", test))]
mod packet;
#[cfg(any(target_arch = "x86_64", test))]
mod poly1305;
mod ring;
#[cfg(any(target_arch = "x86_64", test))]
mod set;
#[cfg(test)]
mod tests;

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use ::ring::aead::{CHACHA20_POLY1305, LessSafeKey, UnboundKey};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::named;

/// Bytes before the text: type, three zero bytes, receiver index, counter.
pub const HEADER_LEN: usize = 16;
/// Bytes of the Poly1305 tag behind the text.
pub const TAG_LEN: usize = 16;
/// The shortest message: a keep-alive, with no text.
pub const MESSAGE_LEN_MIN: usize = HEADER_LEN + TAG_LEN;
/// The longest message: more than any datagram holds.
pub const MESSAGE_LEN_MAX: usize = MESSAGE_LEN_MIN + 65_535;

/// A transport key of one direction, in the forms the backends want. Zeroised on drop.
///
/// Moving it leaves a copy behind, as with any value: put it where it stays (an `Arc`, a `Box`).
pub struct Key {
    words: [u32; 8],
    /// `MaybeUninit` so that dropping may overwrite it with zeros, which are no valid key of ring's.
    ring: MaybeUninit<LessSafeKey>,
}

impl Key {
    /// The key of these 32 bytes.
    #[must_use]
    pub fn new(bytes: &[u8; 32]) -> Key {
        let (words, _) = bytes.as_chunks();
        let ring = UnboundKey::new(&CHACHA20_POLY1305, bytes).expect("32 bytes are a key");
        Key {
            words: std::array::from_fn(|i| u32::from_le_bytes(words[i])),
            ring: MaybeUninit::new(LessSafeKey::new(ring)),
        }
    }

    /// The 32 bytes, for an export of the session.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<[u8; 32]> {
        let mut bytes = Zeroizing::new([0; 32]);
        for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(self.words) {
            *chunk = word.to_le_bytes();
        }
        bytes
    }

    fn ring(&self) -> &LessSafeKey {
        // SAFETY: `new` initialises it, and only `drop` overwrites it.
        unsafe { self.ring.assume_init_ref() }
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // `LessSafeKey` owns nothing, so nothing leaks by not dropping it.
        const { assert!(!std::mem::needs_drop::<LessSafeKey>()) }
        self.words.zeroize();
        self.ring.zeroize();
    }
}

impl ZeroizeOnDrop for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// One packet to seal.
#[derive(Debug)]
pub struct Seal<'a> {
    /// The sending key of the session.
    pub key: &'a Key,
    /// The peer's index for this session; goes into the header.
    pub receiver: u32,
    /// Never used before with this key; goes into the header and is the nonce.
    pub counter: u64,
    /// The message, [`MESSAGE_LEN_MIN`] to [`MESSAGE_LEN_MAX`] bytes: room for the header, the text
    /// in place, room for the tag.
    pub message: &'a mut [u8],
}

impl Seal<'_> {
    fn write_header(&mut self) {
        self.message[..4].copy_from_slice(&[4, 0, 0, 0]);
        self.message[4..8].copy_from_slice(&self.receiver.to_le_bytes());
        self.message[8..16].copy_from_slice(&self.counter.to_le_bytes());
    }
}

/// One packet to open.
#[derive(Debug)]
pub struct Open<'a> {
    /// The receiving key of the session.
    pub key: &'a Key,
    /// As the header says it: the header is not read again here.
    pub counter: u64,
    /// The whole datagram, header first.
    pub message: &'a mut [u8],
    /// Set by [`Aead::open`]: whether the tag was right. If so the text is in place of the
    /// ciphertext; if not, zeros are. Any length but [`MESSAGE_LEN_MIN`] to [`MESSAGE_LEN_MAX`] is
    /// refused.
    pub ok: bool,
}

impl Open<'_> {
    /// Before anything is opened: nothing is right, and a message of an impossible length has no text.
    fn prepare(&mut self) {
        self.ok = false;
        if !well_formed(self.message) {
            self.wipe();
        }
    }

    /// Overwrites what may hold text that nobody vouches for.
    fn wipe(&mut self) {
        if let Some(text_end) = self.message.len().checked_sub(TAG_LEN)
            && let Some(text) = self.message.get_mut(HEADER_LEN..text_end)
        {
            text.fill(0);
        }
    }
}

named! {
    /// An implementation, in [`Self::ALL`] the fastest first.
    pub enum Backend {
        /// 16 blocks of ChaCha20 and 8 MACs at a time (AVX-512F and IFMA).
        Avx512 = "avx512",
        /// 8 blocks of ChaCha20 at a time (AVX2).
        Avx2 = "avx2",
        /// One packet at a time, by the ring crate. Runs everywhere.
        Ring = "ring",
    }
}

/// Seals and opens batches by one backend.
#[derive(Clone, Copy, Debug)]
pub struct Aead {
    engine: Engine,
    every_shape: bool,
}

/// A backend, and the proof that the processor can run it.
#[derive(Clone, Copy, Debug)]
enum Engine {
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    Ring,
}

impl Engine {
    fn new(backend: Backend) -> Option<Engine> {
        match backend {
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512 => avx512::Avx512::detect().map(Engine::Avx512),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2 => avx2::Avx2::detect().map(Engine::Avx2),
            #[cfg(not(target_arch = "x86_64"))]
            Backend::Avx512 | Backend::Avx2 => None,
            Backend::Ring => Some(Engine::Ring),
        }
    }

    /// Seals every packet; the messages are of possible lengths.
    fn seal(self, batch: &mut [Seal<'_>]) {
        batch.iter_mut().for_each(Seal::write_header);
        match self {
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512(cpu) => cpu.run(batch),
            #[cfg(target_arch = "x86_64")]
            Engine::Avx2(cpu) => cpu.run(batch),
            Engine::Ring => ring::seal(batch),
        }
    }

    /// Opens every packet.
    fn open(self, batch: &mut [Open<'_>]) {
        batch.iter_mut().for_each(Open::prepare);
        match self {
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512(cpu) => cpu.run(batch),
            #[cfg(target_arch = "x86_64")]
            Engine::Avx2(cpu) => cpu.run(batch),
            Engine::Ring => ring::open(batch),
        }
    }

    /// This engine, or ring for a batch of this shape if that is faster. What is compared are lengths
    /// and their number, which everybody on the wire sees.
    ///
    /// AVX2, measured on Zen 3 (`cargo bench -p ringtail-bench --bench aead -- --ratios`, alone and beside
    /// a busy thread): ring wins on single packets and on batches too small to fill the lanes of a few
    /// groups.
    ///
    /// AVX-512: the MACs take as long as the longest packet's, however many there are. Where the line runs is an
    /// estimate; on an Intel core it lets a batch of four mixed lengths through that ring does faster.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "there is only ring")
    )]
    fn unless_ring_is_faster(self, shape: Shape) -> Engine {
        let ours = match self {
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512(_) => shape.packets >= 3 && shape.bytes >= 2 * shape.longest,
            #[cfg(target_arch = "x86_64")]
            Engine::Avx2(_) => shape.packets >= 4 || shape.packets >= 2 && shape.bytes >= 2800,
            Engine::Ring => true,
        };
        if ours { self } else { Engine::Ring }
    }
}

/// What a batch looks like from outside.
#[derive(Clone, Copy)]
struct Shape {
    packets: usize,
    /// Of all messages, and of the longest.
    bytes: usize,
    longest: usize,
}

impl Shape {
    fn of(lens: impl Iterator<Item = usize>) -> Shape {
        let mut shape = Shape {
            packets: 0,
            bytes: 0,
            longest: 0,
        };
        for len in lens {
            shape.packets += 1;
            shape.bytes += len;
            shape.longest = shape.longest.max(len);
        }
        shape
    }
}

impl Aead {
    /// The fastest backend that this processor can run and that answers its known question; looked
    /// for once per process.
    #[must_use]
    pub fn detect() -> Aead {
        static FASTEST: OnceLock<Aead> = OnceLock::new();
        *FASTEST.get_or_init(|| {
            let fastest = Backend::ALL.iter().copied().find_map(Aead::force);
            fastest.expect("ring runs everywhere and answers its question")
        })
    }

    /// This backend, or nothing where the processor lacks what it needs or its answer to the known
    /// question is wrong. Shapes for which ring is faster still go to ring.
    #[must_use]
    pub fn force(backend: Backend) -> Option<Aead> {
        let engine = Engine::new(backend)?;
        let right = known::answers(|batch| engine.seal(batch), |batch| engine.open(batch));
        right.then_some(Aead {
            engine,
            every_shape: false,
        })
    }

    /// The same backend for batches of every shape, to test and to measure it.
    #[must_use]
    #[cfg(feature = "internals")]
    pub fn for_every_shape(self) -> Aead {
        Aead {
            every_shape: true,
            ..self
        }
    }

    fn engine_for(self, shape: Shape) -> Engine {
        if self.every_shape {
            self.engine
        } else {
            self.engine.unless_ring_is_faster(shape)
        }
    }

    /// The backend in use.
    #[must_use]
    #[cfg(feature = "internals")]
    pub fn backend(self) -> Backend {
        match self.engine {
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512(_) => Backend::Avx512,
            #[cfg(target_arch = "x86_64")]
            Engine::Avx2(_) => Backend::Avx2,
            Engine::Ring => Backend::Ring,
        }
    }

    /// Seals every packet in place: writes header and tag, and the ciphertext over the text.
    ///
    /// # Panics
    ///
    /// Where a message is shorter than [`MESSAGE_LEN_MIN`] or longer than [`MESSAGE_LEN_MAX`]:
    /// messages to seal are the caller's own making. Nothing has been sealed then.
    pub fn seal(&self, batch: &mut [Seal<'_>]) {
        for packet in &*batch {
            assert!(
                well_formed(packet.message),
                "a message to seal has room for header and tag, and fits a datagram"
            );
        }
        let shape = Shape::of(batch.iter().map(|packet| packet.message.len()));
        self.engine_for(shape).seal(batch);
    }

    /// Opens every packet in place and sets its `ok`. A bad packet changes nothing for the others.
    pub fn open(&self, batch: &mut [Open<'_>]) {
        let shape = Shape::of(batch.iter().map(|packet| packet.message.len()));
        self.engine_for(shape).open(batch);
    }
}

fn well_formed(message: &[u8]) -> bool {
    (MESSAGE_LEN_MIN..=MESSAGE_LEN_MAX).contains(&message.len())
}
