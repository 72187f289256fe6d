//! Buffers that an io_uring may receive into, and the ring through which the kernel is told of them
//! (`IORING_REGISTER_PBUF_RING`): what [`Lender`](super::lender::Lender) lends.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use crate::packet::{BUF_LEN, Lent, PacketBuf, Pool};

/// A pool of buffers and the ring through which they are lent to the kernel. Neither is freed by
/// dropping this, only by [`Buffers::reclaim`].
pub(super) struct Buffers {
    pool: Pool,
    /// By number.
    pub(super) lent: Box<[Option<Lent>]>,
    /// How many of them the kernel has.
    pub(super) count: usize,
    entries: NonNull<BufRingEntry>,
    layout: Layout,
    mask: u16,
    tail: u16,
}

impl Buffers {
    /// Makes as many buffers and registers the ring under the group's number.
    ///
    /// # Errors
    /// The kernel refuses; nothing is left behind.
    pub(super) fn new(ring: &IoUring, group: u16, count: u16) -> io::Result<Buffers> {
        let slots = count.next_power_of_two();
        let bytes = usize::from(slots) * size_of::<BufRingEntry>();
        let layout = Layout::from_size_align(bytes, 4096).map_err(io::Error::other)?;
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(entries) = NonNull::new(memory.cast::<BufRingEntry>()) else {
            handle_alloc_error(layout)
        };
        let mut buffers = Buffers {
            pool: Pool::new(count),
            lent: (0..count).map(|_| None).collect(),
            count: 0,
            entries,
            layout,
            mask: slots - 1,
            tail: 0,
        };
        // SAFETY: the memory is page-aligned, `slots` entries long, and is freed only by `reclaim`.
        let registered = unsafe {
            ring.submitter()
                .register_buf_ring_with_flags(memory as u64, slots, group, 0)
        };
        if registered.is_err() {
            // SAFETY: the kernel has refused, so it knows of nothing.
            unsafe { buffers.reclaim() };
        }
        registered.map(|()| buffers)
    }

    /// Lends every free buffer to the kernel.
    pub(super) fn lend(&mut self) {
        let before = self.tail;
        while let Some(buf) = self.pool.take() {
            let lent = buf.lend();
            let slot = usize::from(self.tail & self.mask);
            // SAFETY: `slot` is below the number of entries.
            let entry = unsafe { self.entries.add(slot) };
            // SAFETY: the slot is ours until the tail passes it, and the entry's fields are plain
            // numbers; the ring has as many slots as there are buffers, so it never overruns.
            let entry = unsafe { &mut *entry.as_ptr() };
            entry.set_addr(lent.address().as_ptr() as u64);
            entry.set_len(u32::try_from(BUF_LEN).expect("small"));
            entry.set_bid(lent.index());
            let place = &mut self.lent[usize::from(lent.index())];
            debug_assert!(place.is_none(), "a buffer is one value");
            *place = Some(lent);
            self.tail = self.tail.wrapping_add(1);
            self.count += 1;
        }
        if self.tail != before {
            // SAFETY: `entries` is the start of the ring, so this is its tail field.
            let tail = unsafe { BufRingEntry::tail(self.entries.as_ptr()) };
            // SAFETY: the kernel reads the tail with acquire order; a 16-bit aligned field.
            let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
            tail.store(self.tail, Ordering::Release);
        }
    }

    /// Takes over a buffer that the kernel is done with.
    ///
    /// # Panics
    /// If it was not lent, or is shorter than `len`: then the kernel would have completed into memory
    /// that belongs to somebody else.
    ///
    /// # Safety
    /// As for [`Lent::returned`].
    pub(super) unsafe fn returned(&mut self, index: u16, len: usize) -> PacketBuf {
        let lent = self.lent[usize::from(index)].take();
        let lent = lent.expect("the kernel names what it was lent, once");
        self.count -= 1;
        // SAFETY: the caller's promise.
        unsafe { lent.returned(len) }
    }

    /// Frees what is lent, and the ring.
    ///
    /// # Safety
    /// The kernel will use neither any more, and nothing is done with this afterwards.
    pub(super) unsafe fn reclaim(&mut self) {
        for lent in &mut self.lent {
            if let Some(lent) = lent.take() {
                // SAFETY: the caller's promise.
                drop(unsafe { lent.returned(0) });
            }
        }
        // SAFETY: allocated in `new` with this layout; the caller promises that this is the end of it.
        unsafe { std::alloc::dealloc(self.entries.as_ptr().cast(), self.layout) };
    }
}
