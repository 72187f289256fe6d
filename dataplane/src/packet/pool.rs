//! Receive buffers: owned, `Send`, and homing.
//!
//! A buffer is one value at any moment, and who has that value has the memory. At home it is a number
//! in its pool. [`Pool::take`] makes it a [`PacketBuf`], whose holder alone reads and writes its bytes;
//! it may travel to any thread and goes home by a lock-free queue wherever it is dropped.
//! [`PacketBuf::lend`] makes it a [`Lent`], which has an address and no bytes: that is for the kernel,
//! and only the kernel's completion makes it a `PacketBuf` again. A `Lent` that is dropped without one
//! keeps its memory for ever: somebody may still write there.
//!
//! Each buffer is 17 pages: the largest TUN read is 10 + 65535 bytes, and a multishot `recvmsg`
//! puts its header, the source address and control messages before up to 65507 bytes of payload. A
//! shorter buffer would silently truncate a TUN read.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

/// Bytes of one buffer.
pub(crate) const BUF_LEN: usize = WHOLE as usize;
/// The same as a window's length.
const WHOLE: u32 = 17 * 4096;

/// What a pool and its travelling buffers share.
#[derive(Debug)]
struct Slab {
    base: NonNull<u8>,
    layout: Layout,
    returned: ArrayQueue<u16>,
}

// SAFETY: the memory behind `base` is only touched through a `PacketBuf` or, while lent, by the
// kernel, and each buffer is one value at a time; the queue is `Sync` itself.
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
    /// At home. A number is here, or in `returned`, or a `PacketBuf` or `Lent` has it.
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
            free: (0..count).rev().collect(),
        }
    }

    /// Takes a free buffer, all of it; prefers the one used last, whose cache lines are warm. `None`
    /// while all are away.
    pub(crate) fn take(&mut self) -> Option<PacketBuf> {
        if self.free.is_empty() {
            while let Some(index) = self.slab.returned.pop() {
                self.free.push(index);
            }
        }
        let index = self.free.pop()?;
        // SAFETY: the index is below the pool's count, so this is inside the allocation.
        let data = unsafe { self.slab.base.add(usize::from(index) * BUF_LEN) };
        Some(PacketBuf {
            data,
            slab: Arc::clone(&self.slab),
            index,
            start: 0,
            len: WHOLE,
        })
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

/// A buffer that the kernel may write into at any time: nobody else has a way to its bytes.
#[derive(Debug)]
pub(crate) struct Lent(ManuallyDrop<PacketBuf>);

impl Lent {
    /// Its number in its pool, by which a completion names it.
    pub(crate) fn index(&self) -> u16 {
        self.0.index
    }

    /// Where its [`BUF_LEN`] bytes are.
    pub(crate) fn address(&self) -> NonNull<u8> {
        self.0.data
    }

    /// The buffer, with the first `len` bytes as its window.
    ///
    /// # Panics
    /// If `len` is longer than a buffer.
    ///
    /// # Safety
    /// The kernel will not write there any more: it has said that this buffer is done, has taken back
    /// whatever could, or was never told of it.
    pub(crate) unsafe fn returned(self, len: usize) -> PacketBuf {
        let mut buf = ManuallyDrop::into_inner(self.0);
        (buf.start, buf.len) = (0, WHOLE);
        buf.narrow(0, len);
        buf
    }
}

impl PacketBuf {
    /// Gives the buffer away, for the kernel to write into all of it.
    pub(crate) fn lend(self) -> Lent {
        Lent(ManuallyDrop::new(self))
    }

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
        let mut first = pool.take().unwrap();
        let second = pool.take().unwrap();
        assert!(pool.take().is_none());
        let numbers = (first.index, second.index);
        first.narrow(0, 100);
        first.bytes_mut().fill(7);
        first.narrow(10, 20);
        let sum =
            std::thread::spawn(move || first.bytes().iter().map(|b| u32::from(*b)).sum::<u32>());
        assert_eq!(sum.join().unwrap(), 140);
        assert_eq!(pool.take().unwrap().index, numbers.0);
        drop(second);
        // The one above has come home before.
        let both = [pool.take().unwrap(), pool.take().unwrap()];
        assert_eq!(both.map(|buf| buf.index), [numbers.1, numbers.0]);
    }

    #[test]
    fn a_buffer_may_outlive_its_pool() {
        let mut pool = Pool::new(1);
        let buf = pool.take().unwrap();
        drop(pool);
        assert_eq!(buf.bytes().len(), BUF_LEN);
    }

    #[test]
    fn no_two_values_have_the_same_memory() {
        let mut pool = Pool::new(3);
        let lent = pool.take().unwrap().lend();
        let mut seen = vec![lent.address()];
        let others: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        seen.extend(others.iter().map(|buf| buf.data));
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 3);
        drop(others);
        let others: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(others.len(), 2, "all but the lent one");
        // SAFETY: no kernel was told of it.
        let buf = unsafe { lent.returned(5) };
        assert_eq!(buf.bytes().len(), 5);
        drop(buf);
        assert_eq!(pool.take().map(|buf| buf.bytes().len()), Some(BUF_LEN));
    }

    /// Where a method of the type itself existed, it would be taken, and this would not compile.
    #[test]
    fn what_is_lent_has_no_bytes_and_no_copies() {
        struct None;
        trait Without {
            fn bytes(&self) -> None {
                None
            }
            fn bytes_mut(&mut self) -> None {
                None
            }
            fn clone(&self) -> None {
                None
            }
        }
        impl Without for Lent {}
        let mut lent = Pool::new(1).take().unwrap().lend();
        let (None, None, None) = (lent.bytes(), lent.bytes_mut(), lent.clone());
        // SAFETY: no kernel was told of it.
        drop(unsafe { lent.returned(0) });
    }

    /// Nobody says that the kernel is done with it: its memory stays for good. (Miri calls that a leak,
    /// so this keeps one holder to free it.)
    #[test]
    fn what_is_lent_and_forgotten_is_never_used_again() {
        let mut pool = Pool::new(2);
        let slab = Arc::clone(&pool.slab);
        let _forgotten = pool.take().unwrap().lend();
        let others: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(others.len(), 1);
        drop(others);
        drop(pool);
        assert_eq!(
            Arc::strong_count(&slab),
            2,
            "the forgotten one holds the memory"
        );
        // SAFETY: takes over the count that the forgotten one has left behind.
        unsafe { Arc::decrement_strong_count(Arc::as_ptr(&slab)) };
    }

    #[test]
    #[should_panic(expected = "inside the window")]
    fn a_completion_is_no_longer_than_its_buffer() {
        let lent = Pool::new(1).take().unwrap().lend();
        // SAFETY: no kernel was told of it.
        drop(unsafe { lent.returned(BUF_LEN + 1) });
    }

    #[test]
    #[should_panic(expected = "inside the window")]
    fn a_window_only_narrows() {
        let mut buf = Pool::new(1).take().unwrap();
        buf.narrow(0, 10);
        buf.narrow(5, 6);
    }
}
