//! Whole frames that wait to be written, bounded in bytes; the oldest go first when it is full.
//!
//! Frames lie back to back in chunks, which is the form in which they are encrypted: a writer
//! takes a chunk and has up to four full TLS records without copying anything together. Frames
//! describe their own length, so dropping the oldest is moving an offset.

use std::collections::VecDeque;

use super::frame::{self, HEADER_LEN};

/// A chunk is closed once it has this many bytes: four full TLS records.
pub const CHUNK_LEN: usize = 64 << 10;

/// A run shorter than this is copied behind the last chunk instead of becoming one.
const COPY_LEN_MAX: usize = 8 << 10;

/// Empty chunks a queue keeps for reuse.
const SPARES_MAX: usize = 4;

/// Empty chunks kept for all the queues of a relay.
const SHARED_SPARES_MAX: usize = 64;

/// Frames and bytes that had to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Frames.
    pub frames: u64,
    /// Their bytes, headers included.
    pub bytes: u64,
}

impl std::ops::AddAssign for Dropped {
    fn add_assign(&mut self, other: Self) {
        self.frames += other.frames;
        self.bytes += other.bytes;
    }
}

/// Unused bytes in front of a chunk's frames. rustls copies plaintext five bytes into fresh,
/// page-aligned memory. With a source that is page-aligned too, the processor sees the copy run into
/// itself (the "rep movsb" page aliasing of AMD Zen): a third of a relay's CPU time. One cache line
/// of distance avoids it: 1.65 to 1.1 CPU seconds per GB.
const PAD_LEN: usize = 64;

/// Whole frames back to back.
#[derive(Clone, Debug, Default)]
pub struct Chunk {
    /// Padding, frames that were dropped, frames.
    bytes: Vec<u8>,
    /// Where the first frame begins.
    start: usize,
}

impl Chunk {
    /// The frames.
    pub fn frames(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Bytes of the frames.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Whether there is no frame.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The buffer to append whole frames to.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        if self.bytes.is_empty() {
            self.bytes.resize(PAD_LEN, 0);
            self.start = PAD_LEN;
        }
        &mut self.bytes
    }

    /// Bytes of memory it takes.
    pub fn held_bytes(&self) -> usize {
        self.bytes.capacity()
    }

    /// Gives back the memory that the frames do not need.
    fn fit(&mut self) {
        let mut bytes = Vec::with_capacity(PAD_LEN + self.len());
        bytes.resize(PAD_LEN, 0);
        bytes.extend_from_slice(self.frames());
        *self = Self {
            bytes,
            start: PAD_LEN,
        };
    }

    /// Keeps the first `len` bytes of the frames.
    pub fn truncate(&mut self, len: usize) {
        self.bytes.truncate(self.start + len);
    }

    /// Forgets the frames and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }

    /// Drops the first frame and gives back its length, header included.
    fn drop_first(&mut self) -> usize {
        let (_, body_len) = frame::header(self.frames()).expect("a chunk holds whole frames");
        let frame_len = HEADER_LEN + body_len as usize;
        self.start += frame_len;
        frame_len
    }
}

/// Empty chunks with memory, for many queues: none keeps its own while nothing waits in it.
#[derive(Debug, Default)]
pub struct Spares(Vec<Chunk>);

impl Spares {
    /// A chunk with room for a full one.
    pub fn take(&mut self) -> Chunk {
        self.0.pop().unwrap_or_else(|| Chunk {
            bytes: Vec::with_capacity(PAD_LEN + CHUNK_LEN),
            start: 0,
        })
    }

    /// Keeps a chunk's memory, if it is worth it and few are kept.
    pub fn put(&mut self, mut chunk: Chunk) {
        let fits = (CHUNK_LEN..=2 * CHUNK_LEN).contains(&chunk.held_bytes());
        if fits && self.0.len() < SHARED_SPARES_MAX {
            chunk.clear();
            self.0.push(chunk);
        }
    }
}

/// A bounded queue of whole frames.
#[derive(Debug)]
pub struct FrameQueue {
    chunks: VecDeque<Chunk>,
    bytes: usize,
    limit_bytes: usize,
    spares: Vec<Chunk>,
    spares_max: usize,
}

impl FrameQueue {
    /// An empty queue that holds at most `limit_bytes`, or a single larger frame.
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            chunks: VecDeque::new(),
            bytes: 0,
            limit_bytes,
            spares: Vec::new(),
            spares_max: SPARES_MAX,
        }
    }

    /// The same, and it keeps no memory beside that of the frames.
    pub fn lean(limit_bytes: usize) -> Self {
        Self {
            spares_max: 0,
            ..Self::new(limit_bytes)
        }
    }

    /// Bytes that wait.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Appends one frame of `len` bytes, which `write` appends to the buffer it gets. Gives back
    /// what had to go to make room.
    pub fn push(&mut self, len: usize, write: impl FnOnce(&mut Vec<u8>)) -> Dropped {
        let dropped = self.make_room(len);
        let tail = self.tail(len);
        let before = tail.len();
        write(tail.buffer());
        let written = tail.len() - before;
        debug_assert_eq!(written, len, "the frame has the announced length");
        self.bytes += written;
        dropped
    }

    /// Appends a run of whole frames and leaves `run` empty: with its memory, or without when that is
    /// what the queue holds now. It does not take memory of which the frames fill less than half.
    pub fn push_run(&mut self, run: &mut Chunk) -> Dropped {
        let len = run.len();
        let dropped = self.make_room(len);
        self.bytes += len;
        if len <= COPY_LEN_MAX || run.held_bytes() > 2 * len {
            self.tail(len).buffer().extend_from_slice(run.frames());
            run.clear();
        } else {
            self.chunks.push_back(std::mem::take(run));
        }
        dropped
    }

    /// Bytes of memory that the frames take.
    pub fn held_bytes(&self) -> usize {
        self.chunks.iter().map(Chunk::held_bytes).sum()
    }

    /// Drops the oldest frames until what waits takes no more than `most` bytes of memory.
    pub fn shed(&mut self, most: usize) -> Dropped {
        let mut dropped = Dropped::default();
        let mut held = self.held_bytes();
        while held > most {
            let Some(first) = self.chunks.front_mut() else {
                break;
            };
            let before = first.held_bytes();
            let keep = before.saturating_sub(held - most);
            while !first.is_empty() && PAD_LEN + first.len() > keep {
                let frame_len = first.drop_first();
                self.bytes -= frame_len;
                dropped.frames += 1;
                dropped.bytes += frame_len as u64;
            }
            held -= before;
            if first.is_empty() {
                self.chunks.pop_front();
            } else {
                first.fit();
                held += first.held_bytes();
            }
        }
        dropped
    }

    /// Takes the oldest frames: a chunk of at most [`CHUNK_LEN`] bytes (or one larger frame).
    pub fn pop(&mut self) -> Option<Chunk> {
        let chunk = self.chunks.pop_front()?;
        self.bytes -= chunk.len();
        Some(chunk)
    }

    /// Gives a chunk's memory back for reuse.
    pub fn recycle(&mut self, mut chunk: Chunk) {
        if self.spares.len() < self.spares_max && chunk.bytes.capacity() <= 4 * CHUNK_LEN {
            chunk.clear();
            self.spares.push(chunk);
        }
    }

    /// Forgets all frames.
    pub fn clear(&mut self) -> Dropped {
        self.make_room(usize::MAX)
    }

    /// The chunk that takes another `len` bytes. None gets longer than [`CHUNK_LEN`], so that it
    /// is full records and nothing else.
    fn tail(&mut self, len: usize) -> &mut Chunk {
        let full = self
            .chunks
            .back()
            .is_none_or(|last| last.len() + len > CHUNK_LEN);
        if full {
            self.chunks.push_back(self.spares.pop().unwrap_or_default());
        }
        self.chunks
            .back_mut()
            .expect("a chunk was just pushed if there was none")
    }

    fn make_room(&mut self, len: usize) -> Dropped {
        let mut dropped = Dropped::default();
        while self.bytes > 0 && self.bytes.saturating_add(len) > self.limit_bytes {
            let first = self.chunks.front_mut().expect("bytes wait in some chunk");
            let frame_len = first.drop_first();
            self.bytes -= frame_len;
            dropped.frames += 1;
            dropped.bytes += frame_len as u64;
            if first.is_empty()
                && let Some(chunk) = self.chunks.pop_front()
            {
                self.recycle(chunk);
            }
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derp::frame::FrameType;
    use rand::{RngExt as _, SeedableRng as _};

    fn push(queue: &mut FrameQueue, body: &[u8]) -> Dropped {
        queue.push(HEADER_LEN + body.len(), |out| {
            frame::put(out, FrameType::RECV_PACKET, &[body]);
        })
    }

    #[test]
    fn frames_come_out_in_order_and_the_oldest_go_first() {
        let mut queue = FrameQueue::new(100);
        for i in 0..10 {
            push(&mut queue, &[i; 15]);
        }
        // Five frames of 20 bytes fit.
        let chunk = queue.pop().unwrap();
        let first: Vec<u8> = chunk.frames().chunks(20).map(|f| f[5]).collect();
        assert_eq!(first, [5, 6, 7, 8, 9]);
        assert!(queue.is_empty() && queue.pop().is_none());
    }

    #[test]
    fn a_frame_larger_than_the_limit_is_alone_in_the_queue() {
        let mut queue = FrameQueue::new(100);
        push(&mut queue, &[1; 15]);
        let dropped = push(&mut queue, &[2; 500]);
        assert_eq!(
            dropped,
            Dropped {
                frames: 1,
                bytes: 20
            }
        );
        assert_eq!(queue.pop().unwrap().len(), 505);
    }

    #[test]
    fn a_queue_holds_little_more_than_its_frames_and_sheds_to_any_size() {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(3);
        let mut spares = Spares::default();
        for frame_len in [0, 40, 1400, 9000, 33_000] {
            let mut queue = FrameQueue::lean(1 << 20);
            let mut frames = 0;
            for _ in 0..500 {
                // A run of any length, in memory for a full one.
                let mut run = spares.take();
                for _ in 0..rng.random_range(1..40) {
                    if run.len() + HEADER_LEN + frame_len <= CHUNK_LEN {
                        frame::put(run.buffer(), FrameType::RECV_PACKET, &[&vec![7; frame_len]]);
                        frames += 1;
                    }
                }
                frames -= queue.push_run(&mut run).frames;
                spares.put(run);
                let (held, bytes) = (queue.held_bytes(), queue.len_bytes());
                assert!(held <= 2 * bytes + 2 * CHUNK_LEN, "{held} for {bytes}");
                if rng.random_range(0..10) == 0 {
                    let most = rng.random_range(0..held);
                    let before = queue.len_bytes() as u64;
                    let dropped = queue.shed(most);
                    frames -= dropped.frames;
                    assert!(queue.held_bytes() <= most);
                    assert_eq!(before - dropped.bytes, queue.len_bytes() as u64);
                }
            }
            let mut left = 0;
            while let Some(chunk) = queue.pop() {
                let mut rest = chunk.frames();
                while let Some((_, len)) = frame::header(rest) {
                    assert_eq!(len as usize, frame_len);
                    rest = &rest[HEADER_LEN + frame_len..];
                    left += 1;
                }
                spares.put(chunk);
            }
            assert_eq!(left, frames);
            assert_eq!(queue.held_bytes(), 0);
        }
        assert!(spares.0.len() <= SHARED_SPARES_MAX);
    }

    #[test]
    fn a_queue_agrees_with_a_list_of_frames() {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(11);
        let limit = 300_000;
        let mut queue = FrameQueue::new(limit);
        let mut model: VecDeque<Vec<u8>> = VecDeque::new();
        let mut run = Chunk::default();
        for step in 0..20_000_u32 {
            if rng.random_range(0..10) < 7 {
                let mut pushed = Vec::new();
                for _ in 0..rng.random_range(1..30) {
                    let body = vec![step.to_be_bytes()[3]; rng.random_range(0..1500)];
                    let mut whole = Vec::new();
                    frame::put(&mut whole, FrameType::RECV_PACKET, &[&body]);
                    run.buffer().extend_from_slice(&whole);
                    pushed.push(whole);
                }
                let dropped = queue.push_run(&mut run);
                assert!(run.is_empty());
                let new: usize = pushed.iter().map(Vec::len).sum();
                let mut gone = Dropped::default();
                while !model.is_empty() && model.iter().map(Vec::len).sum::<usize>() + new > limit {
                    gone.bytes += model.pop_front().unwrap().len() as u64;
                    gone.frames += 1;
                }
                assert_eq!(dropped, gone);
                model.extend(pushed);
            } else if let Some(chunk) = queue.pop() {
                assert!(chunk.len() <= CHUNK_LEN);
                let mut rest = chunk.frames();
                while !rest.is_empty() {
                    let want = model.pop_front().unwrap();
                    let (got, tail) = rest.split_at(want.len());
                    assert_eq!(got, want);
                    rest = tail;
                }
                queue.recycle(chunk);
            }
            assert_eq!(queue.len_bytes(), model.iter().map(Vec::len).sum::<usize>());
        }
    }
}
