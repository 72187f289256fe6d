//! Receive buffers: owned, `Send`, and homing.
//!
//! A shard's driver lends the buffers of its pool to the kernel. A completed receive turns one into
//! a [`PacketBuf`], which may travel to any thread and goes back to its pool by a lock-free queue
//! wherever it is dropped; the driver collects returned buffers and lends them again.
//!
//! Each buffer is 17 pages: the largest TUN read is 10 + 65535 bytes, and a multishot `recvmsg`
//! puts its header, the source address and control messages before up to 65507 bytes of payload. A
//! shorter buffer would silently truncate a TUN read.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

/// Bytes of one buffer.
pub(crate) const BUF_LEN: usize = 17 * 4096;

/// What a pool and its travelling buffers share.
#[derive(Debug)]
struct Slab {
    base: NonNull<u8>,
    layout: Layout,
    returned: ArrayQueue<u16>,
}

// SAFETY: the memory behind `base` is only touched through a `PacketBuf` or, while lent, by the
// kernel, and `Pool` hands each buffer to one holder at a time; the queue is `Sync` itself.
unsafe impl Send for Slab {}
// SAFETY: as for `Send`; `Slab` has no methods that reach a buffer's bytes through `&self`.
unsafe impl Sync for Slab {}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated in `Pool::new` with this layout; the last holder is gone.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// The buffers of one driver source, seen from the driver.
#[derive(Debug)]
pub(crate) struct Pool {
    slab: Arc<Slab>,
    /// True while the buffer is the driver's: free, or lent to the kernel.
    ours: Box<[bool]>,
    free: Vec<u16>,
}

impl Pool {
    /// Allocates `count` buffers, all free.
    pub(crate) fn new(count: u16) -> Pool {
        assert!(count > 0, "a pool without buffers receives nothing");
        let layout = Layout::from_size_align(usize::from(count) * BUF_LEN, 4096)
            .expect("a few megabytes are a valid layout");
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else {
            handle_alloc_error(layout)
        };
        Pool {
            slab: Arc::new(Slab {
                base,
                layout,
                returned: ArrayQueue::new(usize::from(count)),
            }),
            ours: vec![true; usize::from(count)].into(),
            free: (0..count).rev().collect(),
        }
    }

    /// Takes a free buffer's index for lending; prefers the one used last, whose cache lines are
    /// warm. `None` while all are away.
    pub(crate) fn take_free(&mut self) -> Option<u16> {
        if self.free.is_empty() {
            while let Some(index) = self.slab.returned.pop() {
                self.ours[usize::from(index)] = true;
                self.free.push(index);
            }
        }
        self.free.pop()
    }

    /// Address of a buffer, for lending it to the kernel.
    pub(crate) fn address(&self, index: u16) -> NonNull<u8> {
        let offset = usize::from(index) * BUF_LEN;
        assert!(offset < self.slab.layout.size(), "an index of this pool");
        // SAFETY: the offset is inside the allocation.
        unsafe { self.slab.base.add(offset) }
    }

    /// Turns a lent buffer that a receive has filled with `len` bytes into an owned one.
    ///
    /// # Panics
    /// If the buffer is not the driver's, or `len` is longer than a buffer: then the kernel would
    /// have completed into memory that belongs to somebody else.
    pub(crate) fn claim(&mut self, index: u16, len: usize) -> PacketBuf {
        assert!(len <= BUF_LEN, "the kernel keeps to the buffer's length");
        let ours = &mut self.ours[usize::from(index)];
        assert!(*ours, "a buffer has one holder");
        *ours = false;
        PacketBuf {
            data: self.address(index),
            slab: Arc::clone(&self.slab),
            index,
            start: 0,
            len: u32::try_from(len).expect("checked above"),
        }
    }
}

/// An owned receive buffer: a window of bytes that goes home when dropped.
#[derive(Debug)]
pub(crate) struct PacketBuf {
    data: NonNull<u8>,
    slab: Arc<Slab>,
    index: u16,
    start: u32,
    len: u32,
}

// SAFETY: a `PacketBuf` is the only way to its bytes, and its slab is `Sync`.
unsafe impl Send for PacketBuf {}

impl PacketBuf {
    /// Narrows the window to `len` bytes that start `skip` bytes into it.
    ///
    /// # Panics
    /// If that is not inside the window.
    pub(crate) fn narrow(&mut self, skip: usize, len: usize) {
        assert!(skip + len <= self.len as usize, "inside the window");
        self.start += u32::try_from(skip).expect("below the window's length");
        self.len = u32::try_from(len).expect("below the window's length");
    }

    /// The bytes of the window.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `start` is inside the buffer (an invariant of `narrow`).
        let first = unsafe { self.data.add(self.start as usize) };
        // SAFETY: `start + len` is at most `BUF_LEN`; the memory was zeroed at allocation and is
        // not lent while this exists.
        unsafe { std::slice::from_raw_parts(first.as_ptr(), self.len as usize) }
    }

    /// The bytes of the window, to change.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`.
        let first = unsafe { self.data.add(self.start as usize) };
        // SAFETY: as in `bytes`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(first.as_ptr(), self.len as usize) }
    }
}

impl Drop for PacketBuf {
    fn drop(&mut self) {
        // The queue has room for every buffer of the pool, so a push cannot fail.
        let pushed = self.slab.returned.push(self.index);
        debug_assert!(pushed.is_ok(), "room for every buffer");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_home_from_another_thread() {
        let mut pool = Pool::new(2);
        let first = pool.take_free().unwrap();
        let second = pool.take_free().unwrap();
        assert!(pool.take_free().is_none());
        let mut buf = pool.claim(first, 100);
        buf.bytes_mut().fill(7);
        buf.narrow(10, 20);
        let sum =
            std::thread::spawn(move || buf.bytes().iter().map(|b| u32::from(*b)).sum::<u32>());
        assert_eq!(sum.join().unwrap(), 140);
        assert_eq!(pool.take_free(), Some(first));
        drop(pool.claim(second, 1));
        assert_eq!(pool.take_free(), Some(second));
    }

    #[test]
    fn a_buffer_may_outlive_its_pool() {
        let mut pool = Pool::new(1);
        let index = pool.take_free().unwrap();
        let buf = pool.claim(index, BUF_LEN);
        drop(pool);
        assert_eq!(buf.bytes().len(), BUF_LEN);
    }

    #[test]
    #[should_panic(expected = "one holder")]
    fn a_buffer_is_not_claimed_twice() {
        let mut pool = Pool::new(1);
        let index = pool.take_free().unwrap();
        let _first = pool.claim(index, 1);
        let _second = pool.claim(index, 1);
    }

    #[test]
    #[should_panic(expected = "inside the window")]
    fn a_window_only_narrows() {
        let mut pool = Pool::new(1);
        let index = pool.take_free().unwrap();
        pool.claim(index, 10).narrow(5, 6);
    }
}
