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

/// Empty chunks kept for reuse.
const SPARES_MAX: usize = 4;

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

/// A bounded queue of whole frames.
#[derive(Debug)]
pub struct FrameQueue {
    chunks: VecDeque<Vec<u8>>,
    /// Where the first frame begins in the first chunk.
    head: usize,
    bytes: usize,
    limit_bytes: usize,
    spares: Vec<Vec<u8>>,
}

impl FrameQueue {
    /// An empty queue that holds at most `limit_bytes`, or a single larger frame.
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            chunks: VecDeque::new(),
            head: 0,
            bytes: 0,
            limit_bytes,
            spares: Vec::new(),
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
        let tail = self.tail();
        let before = tail.len();
        write(tail);
        let written = tail.len() - before;
        debug_assert_eq!(written, len, "the frame has the announced length");
        self.bytes += written;
        dropped
    }

    /// Appends a run of whole frames and leaves `run` empty, often with another buffer's memory.
    pub fn push_run(&mut self, run: &mut Vec<u8>) -> Dropped {
        let dropped = self.make_room(run.len());
        self.bytes += run.len();
        if run.len() <= COPY_LEN_MAX {
            self.tail().extend_from_slice(run);
            run.clear();
        } else {
            let spare = self.spares.pop().unwrap_or_default();
            self.chunks.push_back(std::mem::replace(run, spare));
        }
        dropped
    }

    /// Takes the oldest frames: a chunk of about [`CHUNK_LEN`] bytes, or less if no more wait.
    pub fn pop(&mut self) -> Option<Vec<u8>> {
        let mut chunk = self.chunks.pop_front()?;
        if self.head > 0 {
            chunk.drain(..self.head);
            self.head = 0;
        }
        self.bytes -= chunk.len();
        Some(chunk)
    }

    /// Gives a chunk's memory back for reuse.
    pub fn recycle(&mut self, mut chunk: Vec<u8>) {
        if self.spares.len() < SPARES_MAX && chunk.capacity() <= 4 * CHUNK_LEN {
            chunk.clear();
            self.spares.push(chunk);
        }
    }

    /// Forgets all frames.
    pub fn clear(&mut self) -> Dropped {
        self.make_room(usize::MAX)
    }

    fn tail(&mut self) -> &mut Vec<u8> {
        let full = self
            .chunks
            .back()
            .is_none_or(|last| last.len() >= CHUNK_LEN);
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
            let first = self.chunks.front().expect("bytes wait in some chunk");
            let (_, body_len) =
                frame::header(&first[self.head..]).expect("a chunk holds whole frames");
            let frame_len = HEADER_LEN + body_len as usize;
            self.head += frame_len;
            self.bytes -= frame_len;
            dropped.frames += 1;
            dropped.bytes += frame_len as u64;
            if self.head >= first.len() {
                self.head = 0;
                if let Some(chunk) = self.chunks.pop_front() {
                    self.recycle(chunk);
                }
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
        let first: Vec<u8> = chunk.chunks(20).map(|f| f[5]).collect();
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
    fn a_queue_agrees_with_a_list_of_frames() {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(11);
        let limit = 300_000;
        let mut queue = FrameQueue::new(limit);
        let mut model: VecDeque<Vec<u8>> = VecDeque::new();
        let mut run = Vec::new();
        for step in 0..20_000_u32 {
            if rng.random_range(0..10) < 7 {
                let mut pushed = Vec::new();
                for _ in 0..rng.random_range(1..30) {
                    let body = vec![step.to_be_bytes()[3]; rng.random_range(0..1500)];
                    let mut whole = Vec::new();
                    frame::put(&mut whole, FrameType::RECV_PACKET, &[&body]);
                    run.extend_from_slice(&whole);
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
                let mut rest = &chunk[..];
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
