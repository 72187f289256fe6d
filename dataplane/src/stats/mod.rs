#![forbid(unsafe_code)]
//! Per-shard counters and drop reasons, read by snapshot.
//!
//! A shard counts in a plain [`Counters`] of its own and publishes it whole once per turn; whoever
//! wants to know reads the last published block. Counting costs an add, publishing about one store
//! per number, and no reader can slow a shard down.
//!
//! Rooms: `drops` names the reasons, `named` is the form of such enumerations, `seqlock` the block that
//! a shard publishes, `model` that block under loom.

mod drops;
#[cfg(test)]
mod model;
mod named;
mod seqlock;

/// The atomics of [`seqlock`].
mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering, fence};
}

use std::sync::Arc;

use crate::named;
pub use drops::DropReason;
pub use named::Counts;
use seqlock::SeqBlock;

/// Classes of the batch-size histogram: 1, 2, 3-4, 5-8, … 65-128, more.
pub const BATCH_CLASSES: usize = 9;

named! {
    /// Where a shard's cycles go.
    #[repr(u8)]
    pub enum Room {
        /// Receiving, which the kernel does while a shard waits for it, the reads of the TUN among it.
        Ring = "ring",
        /// Commands, lanes, timers: everything between the rooms.
        Shard = "shard",
        /// Looking at what was read from the TUN, and writes to it.
        Tun = "tun",
        /// Destination to peer.
        Route = "route",
        /// Encryption.
        Seal = "seal",
        /// UDP sends.
        Udp = "udp",
        /// First bytes.
        Classify = "classify",
        /// Decryption.
        Open = "open",
        /// Sender's allowed IPs and rules.
        Filter = "filter",
        /// Merging.
        Coalesce = "coalesce",
        /// Off the core: asleep in the ring most of all.
        Wait = "wait",
    }
}

named! {
    /// A plain counter of a shard.
    #[repr(u8)]
    pub enum Meter {
        /// Turns of the shard's loop.
        Turns = "turns",
        /// Reads from the TUN queue: packets and super-packets.
        TunReads = "tun_reads",
        /// Inner packets read, super-packets counted by their segments.
        TunPacketsIn = "tun_packets_in",
        /// Inner bytes read, headers included, super-packets as read.
        TunBytesIn = "tun_bytes_in",
        /// Writes to the TUN queue.
        TunWrites = "tun_writes",
        /// Super-packets that the TUN refused, written again as single packets.
        TunRefused = "tun_refused",
        /// Inner packets written, super-packets counted by their segments.
        TunPacketsOut = "tun_packets_out",
        /// Inner bytes written, super-packets as written.
        TunBytesOut = "tun_bytes_out",
        /// Receives from the UDP sockets: datagrams and GRO trains.
        UdpReceives = "udp_receives",
        /// Datagrams received, trains counted by their parts.
        UdpPacketsIn = "udp_packets_in",
        /// UDP payload bytes received.
        UdpBytesIn = "udp_bytes_in",
        /// Sends to the UDP sockets: datagrams and GSO batches.
        UdpSends = "udp_sends",
        /// Datagrams sent, batches counted by their parts.
        UdpPacketsOut = "udp_packets_out",
        /// UDP payload bytes sent.
        UdpBytesOut = "udp_bytes_out",
        /// Sealed datagrams given to the relay client.
        RelayPacketsOut = "relay_packets_out",
        /// Sealed bytes given to the relay client.
        RelayBytesOut = "relay_bytes_out",
        /// Sealed datagrams that came by relay.
        RelayPacketsIn = "relay_packets_in",
        /// Sealed bytes that came by relay.
        RelayBytesIn = "relay_bytes_in",
        /// Packets handed to the shard that owns them.
        HandedOver = "handed_over",
        /// Datagrams sealed and sent here for peers of other shards.
        SealedForOthers = "sealed_for_others",
        /// Pings by TSMP that were answered; what else came by TSMP is no more than counted as a drop.
        PingsAnswered = "pings_answered",
        /// Remembered flows that made room for newer ones.
        FlowsEvicted = "flows_evicted",
        /// CE marks of the underlay passed on to inner packets.
        CongestionMarks = "congestion_marks",
        /// Peers looked at because others came, changed or went: a few for each of those.
        PeersVisited = "peers_visited",
        /// Times a multishot receive ran out of buffers (nothing is lost).
        NoBuffers = "no_buffers",
    }
}

/// A shard's counters: plain integers, owned by the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    words: [u64; WORDS],
}

impl Default for Counters {
    fn default() -> Self {
        Counters { words: [0; WORDS] }
    }
}

const METERS: usize = Meter::ALL.len();
const DROPS_AT: usize = METERS;
const CYCLES_AT: usize = DROPS_AT + DropReason::ALL.len();
const BATCH_IN_AT: usize = CYCLES_AT + Room::ALL.len();
const BATCH_OUT_AT: usize = BATCH_IN_AT + BATCH_CLASSES;
const WORDS: usize = BATCH_OUT_AT + BATCH_CLASSES;

impl Counters {
    /// Adds to a counter.
    #[inline]
    pub fn add(&mut self, meter: Meter, n: u64) {
        self.words[meter as usize] += n;
    }

    /// What they are now.
    #[cfg(test)]
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot { words: self.words }
    }

    /// Counts one dropped packet.
    #[inline]
    pub fn drop_one(&mut self, reason: DropReason) {
        self.drop_many(reason, 1);
    }

    /// Counts dropped packets.
    #[inline]
    pub fn drop_many(&mut self, reason: DropReason, n: u64) {
        self.words[DROPS_AT + reason as usize] += n;
    }

    /// Charges processor cycles (time-stamp counter ticks) to a room.
    #[inline]
    pub fn charge(&mut self, room: Room, cycles: u64) {
        let slot = &mut self.words[CYCLES_AT + room as usize];
        *slot = slot.wrapping_add(cycles);
    }

    /// Charges cycles that were a room's to another, but not more than it has had since it had `since`.
    /// Returns what it has now.
    pub(crate) fn recharge(&mut self, from: Room, to: Room, since: u64, cycles: u64) -> u64 {
        let had = self.words[CYCLES_AT + from as usize];
        let moved = cycles.min(had.wrapping_sub(since));
        self.charge(to, moved);
        self.charge(from, moved.wrapping_neg());
        had.wrapping_sub(moved)
    }

    /// Counts one batch from the TUN (outbound) of `len` packets; an empty one does not count.
    #[inline]
    pub fn batch_outbound(&mut self, len: usize) {
        self.batch(BATCH_OUT_AT, len);
    }

    /// Counts one batch from the underlay (inbound) of `len` packets; an empty one does not count.
    #[inline]
    pub fn batch_inbound(&mut self, len: usize) {
        self.batch(BATCH_IN_AT, len);
    }

    #[inline]
    fn batch(&mut self, at: usize, len: usize) {
        if len > 0 {
            self.words[at + batch_class(len)] += 1;
        }
    }
}

/// The histogram class of a batch: class c holds lengths up to 2^c, the last one all the rest.
fn batch_class(len: usize) -> usize {
    // Powers of two up to and including len.
    let class = (usize::BITS - (len.max(1) - 1).leading_zeros()) as usize;
    class.min(BATCH_CLASSES - 1)
}

/// The shared end of one shard's counters: the shard publishes, others read.
#[derive(Clone)]
pub struct Published(Arc<SeqBlock<WORDS>>);

impl Default for Published {
    fn default() -> Self {
        Published(Arc::new(SeqBlock::new()))
    }
}

impl Published {
    /// Attempts of a reader before it takes what there is: writers need a fraction of a microsecond.
    const READ_ATTEMPTS_MAX: usize = 10_000;

    /// Makes the counters visible. Only the owning shard calls this.
    pub fn publish(&self, counters: &Counters) {
        self.0.publish(&counters.words);
    }

    /// The counters as last published.
    pub fn read(&self) -> Snapshot {
        for _ in 0..Self::READ_ATTEMPTS_MAX {
            if let Some(words) = self.0.try_read() {
                return Snapshot { words };
            }
            std::hint::spin_loop();
        }
        // The writer was preempted in mid-publication; numbers that are each right, if not of one
        // moment, are better than none.
        Snapshot {
            words: self.0.read_torn(),
        }
    }
}

/// Counters of one shard, or of several added up, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    words: [u64; WORDS],
}

impl Default for Snapshot {
    fn default() -> Self {
        Snapshot { words: [0; WORDS] }
    }
}

impl Snapshot {
    /// A counter.
    pub fn get(&self, meter: Meter) -> u64 {
        self.words[meter as usize]
    }

    /// Packets dropped for a reason.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.words[DROPS_AT + reason as usize]
    }

    /// Packets dropped for any reason.
    pub fn drops_total(&self) -> u64 {
        self.words[DROPS_AT..CYCLES_AT].iter().sum()
    }

    /// Time-stamp counter ticks spent in a room.
    pub fn cycles(&self, room: Room) -> u64 {
        self.words[CYCLES_AT + room as usize]
    }

    /// Batches from the underlay by size class (1, 2, up to 4, up to 8, …).
    pub fn batches_inbound(&self) -> &[u64] {
        &self.words[BATCH_IN_AT..BATCH_IN_AT + BATCH_CLASSES]
    }

    /// Batches from the TUN by size class (1, 2, up to 4, up to 8, …).
    pub fn batches_outbound(&self) -> &[u64] {
        &self.words[BATCH_OUT_AT..BATCH_OUT_AT + BATCH_CLASSES]
    }

    /// Adds another shard's counters.
    pub fn merge(&mut self, other: &Snapshot) {
        for (sum, word) in self.words.iter_mut().zip(&other.words) {
            *sum = sum.wrapping_add(*word);
        }
    }

    /// The sum over shards.
    pub fn sum<'a>(shards: impl IntoIterator<Item = &'a Snapshot>) -> Snapshot {
        let mut sum = Snapshot::default();
        for shard in shards {
            sum.merge(shard);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_what_is_read_after_publication() {
        let mut counters = Counters::default();
        let published = Published::default();
        counters.add(Meter::TunReads, 3);
        counters.drop_one(DropReason::NoRoute);
        counters.drop_many(DropReason::TunWriteFailed, 5);
        counters.charge(Room::Seal, 1000);
        counters.charge(Room::Coalesce, 7);
        assert_eq!(published.read(), Snapshot::default());
        published.publish(&counters);
        let snapshot = published.read();
        assert_eq!(snapshot.get(Meter::TunReads), 3);
        assert_eq!(snapshot.get(Meter::UdpSends), 0);
        assert_eq!(snapshot.drops(DropReason::NoRoute), 1);
        assert_eq!(snapshot.drops(DropReason::TunWriteFailed), 5);
        assert_eq!(snapshot.drops_total(), 6);
        assert_eq!(snapshot.cycles(Room::Seal), 1000);
        assert_eq!(snapshot.cycles(Room::Coalesce), 7);
        let sum = Snapshot::sum([&snapshot, &snapshot, &Snapshot::default()]);
        assert_eq!(sum.get(Meter::TunReads), 6);
        assert_eq!(sum.drops_total(), 12);
    }

    #[test]
    fn waiting_is_taken_from_what_was_charged_since() {
        let mut counters = Counters::default();
        counters.charge(Room::Ring, 100);
        let left = counters.recharge(Room::Ring, Room::Wait, 0, 70);
        assert_eq!(left, 30);
        counters.charge(Room::Ring, 10);
        assert_eq!(counters.recharge(Room::Ring, Room::Wait, left, 25), 30);
        let cycles = |room| counters.snapshot().cycles(room);
        assert_eq!((cycles(Room::Ring), cycles(Room::Wait)), (30, 80));
    }

    #[test]
    fn batch_sizes_fall_into_powers_of_two() {
        for (len, class) in [
            (1, 0),
            (2, 1),
            (3, 2),
            (4, 2),
            (5, 3),
            (8, 3),
            (9, 4),
            (64, 6),
            (65, 7),
            (128, 7),
            (129, 8),
            (100_000, 8),
        ] {
            let mut counters = Counters::default();
            counters.batch_inbound(len);
            counters.batch_outbound(0);
            let snapshot = counters.snapshot();
            let mut want = [0; BATCH_CLASSES];
            want[class] = 1;
            assert_eq!(snapshot.batches_inbound(), want, "length {len}");
            assert_eq!(snapshot.batches_outbound(), [0; BATCH_CLASSES]);
        }
    }

    #[test]
    fn every_number_has_its_own_place_and_name() {
        let mut counters = Counters::default();
        Meter::ALL.iter().for_each(|meter| counters.add(*meter, 1));
        DropReason::ALL
            .iter()
            .for_each(|reason| counters.drop_one(*reason));
        Room::ALL.iter().for_each(|room| counters.charge(*room, 1));
        assert!(counters.words[..BATCH_IN_AT].iter().all(|word| *word == 1));
        for (index, meter) in Meter::ALL.iter().enumerate() {
            assert_eq!(*meter as usize, index);
        }
        for (index, room) in Room::ALL.iter().enumerate() {
            assert_eq!(*room as usize, index);
        }
        let mut names: Vec<&str> = Meter::ALL.iter().map(|meter| meter.name()).collect();
        names.extend(Room::ALL.iter().map(|room| room.name()));
        let count = names.len();
        names.sort();
        names.dedup();
        // "shard", "tun" and the like are rooms only.
        assert_eq!(names.len(), count);
    }

    /// Two related numbers, published by one thread almost as fast as it can, read by another until it
    /// has seen them change a few times.
    #[test]
    fn a_reader_never_sees_half_a_publication() {
        let published = Published::default();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut counters = Counters::default();
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    counters.add(Meter::Turns, 1);
                    counters.charge(Room::Coalesce, 2);
                    published.publish(&counters);
                    // Between two publications a reader can succeed.
                    (0..50).for_each(|_| std::hint::spin_loop());
                }
            });
            let (mut last, mut different) = (0, 0);
            while different < 20 {
                if let Some(words) = published.0.try_read() {
                    let snapshot = Snapshot { words };
                    let turns = snapshot.get(Meter::Turns);
                    assert_eq!(snapshot.cycles(Room::Coalesce), turns * 2);
                    assert!(turns >= last);
                    different += u32::from(turns > last);
                    last = turns;
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
