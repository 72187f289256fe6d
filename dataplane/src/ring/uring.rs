//! The io_uring driver: one multishot read of the TUN queue and one multishot `recvmsg` per socket,
//! each into a ring of provided buffers.
//!
//! The kernel takes a buffer only when a packet is there, and posts a completion per packet while
//! the request stays armed. A request ends (no `F_MORE`) when no buffer was left: nothing is lost,
//! the data stays in its queue, and the request is armed again once buffers have come home. Any
//! other error makes the driver hold back before it arms again, because an error that repeats at
//! once would spin the loop.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, RecvMsgOut, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types::BufRingEntry};

use super::{Found, Sources, TUN_BUFFERS, TunRx, UDP_BUFFERS, UdpRx, means_gone};
use crate::packet::{BUF_LEN, Pool};
use crate::stats::{Counters, DropReason, Meter};
use crate::sys::socket::{CONTROL_LEN, NAME_LEN, is_final, parse_control, parse_name};
use crate::udp::Sockets;

/// Submissions in flight are one per request below.
const ENTRIES: u32 = 16;
/// Completions never exceed the buffers by more than a few.
const COMPLETIONS: u32 = 256;
/// Buffer groups.
const GROUP_TUN: u16 = 0;
const GROUP_UDP: u16 = 1;
/// Turns a request rests after an error other than a lack of buffers.
const REST_TURNS: u32 = 64;
/// Waits are cut to this while a request rests.
const REST_WAIT: Duration = Duration::from_millis(10);
/// And to this while all buffers of a request are with other shards: they come home without a
/// bell, and packets are waiting.
const STARVED_WAIT: Duration = Duration::from_micros(100);

/// The armed requests, by the low byte of `user_data`; the rest counts the generations of sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Tun,
    Udp4,
    Udp6,
    Wake,
}

const REQUESTS: [Request; 4] = [Request::Tun, Request::Udp4, Request::Udp6, Request::Wake];
const GENERATION_SHIFT: u32 = 8;
/// A cancellation of a request that the kernel holds finishes at once; this is for one that hangs.
const CANCEL_SECONDS: u64 = 1;
/// The same for a request that does nothing.
const ENTER_SECONDS: u64 = 1;
/// At the end, requests are waited for this often at most, so long each time.
const CLOSING_TURNS_MAX: usize = 100;
const CLOSING_WAIT: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug, Default)]
struct State {
    fd: Option<RawFd>,
    armed: bool,
    rest: u32,
    /// Completions of an older generation are of a socket that was given up.
    generation: u64,
}

impl State {
    fn user_data(&self, request: Request) -> u64 {
        request as u64 | self.generation << GENERATION_SHIFT
    }
}

pub(crate) struct Uring<'a> {
    ring: IoUring,
    tun: Buffers,
    udp: Buffers,
    states: [State; 4],
    /// Template of the multishot receives; only the two lengths matter. Boxed, because the kernel
    /// holds its address as long as a request is armed.
    header: Box<libc::msghdr>,
    /// Keeps the descriptors open.
    sources: Sources<'a>,
}

/// Whether the kernel knows what the driver asks for.
fn knows_requests(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    let asked = ring.submitter().register_probe(&mut probe);
    asked.map_err(|error| refused("io_uring_register", &error))?;
    for (code, name) in [
        (opcode::ReadMulti::CODE, "multishot read (Linux 6.7)"),
        (opcode::RecvMsgMulti::CODE, "recvmsg"),
        (opcode::PollAdd::CODE, "poll"),
    ] {
        if !probe.is_supported(code) {
            let why = format!("this kernel's io_uring has no {name}");
            return Err(io::Error::other(why));
        }
    }
    Ok(())
}

/// One request that does nothing, there and back in the two ways in which a turn enters the kernel.
fn enters(ring: &mut IoUring) -> io::Result<()> {
    let timeout = Timespec::new().sec(ENTER_SECONDS);
    for _ in 0..2 {
        push(ring, &opcode::Nop::new().build());
        let args = SubmitArgs::new().timespec(&timeout);
        let entered = ring
            .submit()
            .and_then(|_| ring.submitter().submit_with_args(1, &args));
        entered.map_err(|error| refused("io_uring_enter", &error))?;
        if ring.completion().next().is_none() {
            return Err(io::Error::other("io_uring_enter brings nothing back"));
        }
    }
    Ok(())
}

/// What a refusal means, for people.
fn refused(call: &str, error: &io::Error) -> io::Error {
    io::Error::other(match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            format!("{call} is forbidden here (a sandbox, or kernel.io_uring_disabled)")
        }
        Some(libc::ENOSYS) => format!("this kernel, or a sandbox, has no {call}"),
        Some(libc::ENOMEM) => {
            format!("{call}: the limit on locked memory (RLIMIT_MEMLOCK) leaves no room")
        }
        _ => format!("{call}: {error}"),
    })
}

fn build() -> io::Result<IoUring> {
    // One thread submits and reaps, so completions need no interrupts: its own enter runs them.
    let mut builder = IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(COMPLETIONS);
    builder
        .build(ENTRIES)
        .or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => {
                let mut builder = IoUring::builder();
                builder.setup_cqsize(COMPLETIONS).build(ENTRIES)
            }
            _ => Err(error),
        })
}

impl<'a> Uring<'a> {
    /// Makes all that the driver needs and tries it, since limits and sandboxes may refuse any part.
    pub(super) fn new(sources: Sources<'a>) -> io::Result<Uring<'a>> {
        let mut ring = build().map_err(|error| refused("io_uring_setup", &error))?;
        knows_requests(&ring)?;
        let lends = |error| refused("a ring of buffers", &error);
        let tun = Buffers::new(&ring, GROUP_TUN, TUN_BUFFERS).map_err(lends)?;
        let udp = Buffers::new(&ring, GROUP_UDP, UDP_BUFFERS).map_err(lends)?;
        enters(&mut ring)?;
        // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
        let mut header: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        header.msg_namelen = libc::socklen_t::try_from(NAME_LEN).map_err(io::Error::other)?;
        header.msg_controllen = CONTROL_LEN as _;
        let mut states = [State::default(); 4];
        states[Request::Tun as usize].fd = Some(sources.tun.as_raw_fd());
        states[Request::Udp4 as usize].fd = Some(sources.udp.v4.as_raw_fd());
        states[Request::Udp6 as usize].fd = sources.udp.v6.as_ref().map(AsRawFd::as_raw_fd);
        states[Request::Wake as usize].fd = Some(sources.wake.as_raw_fd());
        Ok(Uring {
            ring,
            tun,
            udp,
            states,
            header,
            sources,
        })
    }

    /// Receives from other sockets. A request holds its socket, and with it the port, for as long
    /// as it is armed: those of the old ones are cancelled. What they have received already is
    /// handed out by the next turn.
    pub(super) fn rebind(&mut self, udp: Arc<Sockets>) {
        let fds = [
            (Request::Udp4, Some(udp.v4.as_raw_fd())),
            (Request::Udp6, udp.v6.as_ref().map(AsRawFd::as_raw_fd)),
        ];
        for (request, fd) in fds {
            let state = &mut self.states[request as usize];
            if state.armed {
                let wanted = CancelBuilder::user_data(state.user_data(request));
                let timeout = Timespec::new().sec(CANCEL_SECONDS);
                let result = self
                    .ring
                    .submitter()
                    .register_sync_cancel(Some(timeout), wanted);
                // One that has just ended by itself is not found.
                if let Err(error) = result {
                    tracing::debug!(%error, "an old receive cannot be cancelled");
                }
            }
            *state = State {
                fd,
                generation: state.generation + 1,
                ..State::default()
            };
        }
        self.sources.udp = udp;
    }

    pub(super) fn turn(
        &mut self,
        wait: Option<Duration>,
        tun: &mut Vec<TunRx>,
        udp: &mut Vec<UdpRx>,
        counters: &mut Counters,
    ) -> io::Result<Found> {
        self.tun.lend();
        self.udp.lend();
        let limit = self.arm();
        self.enter([wait, limit].into_iter().flatten().min())?;
        self.reap(tun, udp, counters)
    }

    /// Arms what is not armed. Gives the longest wait until it should be tried again with what had
    /// to be left out.
    fn arm(&mut self) -> Option<Duration> {
        let mut limit: Option<Duration> = None;
        let mut leave_out = |wait: Duration| limit = Some(limit.map_or(wait, |l| l.min(wait)));
        for request in REQUESTS {
            let state = &mut self.states[request as usize];
            let Some(fd) = state.fd else { continue };
            if state.armed {
                continue;
            }
            if state.rest > 0 {
                state.rest -= 1;
                leave_out(REST_WAIT);
                continue;
            }
            let starved = match request {
                Request::Tun => self.tun.lent == 0,
                Request::Udp4 | Request::Udp6 => self.udp.lent == 0,
                Request::Wake => false,
            };
            if starved {
                leave_out(STARVED_WAIT);
                continue;
            }
            let fd = Fd(fd);
            let entry = match request {
                // Length 0 takes each buffer's own length; offset -1 means "no position".
                Request::Tun => opcode::ReadMulti::new(fd, 0, GROUP_TUN)
                    .offset(u64::MAX)
                    .build(),
                Request::Udp4 | Request::Udp6 => {
                    opcode::RecvMsgMulti::new(fd, &raw const *self.header, GROUP_UDP).build()
                }
                Request::Wake => opcode::PollAdd::new(fd, libc::POLLIN as u32)
                    .multi(true)
                    .build(),
            };
            let entry = entry.user_data(state.user_data(request));
            state.armed = push(&mut self.ring, &entry);
        }
        limit
    }

    /// Submits, runs deferred work, and waits for a completion if told to.
    fn enter(&mut self, wait: Option<Duration>) -> io::Result<()> {
        let result = match wait {
            None => self.ring.submit_and_wait(1),
            Some(Duration::ZERO) => self.ring.submit(),
            Some(wait) => {
                let timespec = Timespec::from(wait);
                let args = SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match result.map_err(|e| (e.raw_os_error(), e)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN), _)) => {
                Ok(())
            }
            Err((_, error)) => Err(error),
        }
    }

    fn reap(
        &mut self,
        tun: &mut Vec<TunRx>,
        udp: &mut Vec<UdpRx>,
        counters: &mut Counters,
    ) -> io::Result<Found> {
        let mut found = Found::default();
        let mut failed = None;
        for completion in self.ring.completion() {
            let [kind, ..] = completion.user_data().to_le_bytes();
            let Some(request) = REQUESTS.get(usize::from(kind)).copied() else {
                continue;
            };
            let state = &mut self.states[request as usize];
            let mut given_up = State::default();
            let current = completion.user_data() == state.user_data(request);
            let state = if current { state } else { &mut given_up };
            if !cqueue::more(completion.flags()) {
                state.armed = false;
            }
            let Ok(len) = usize::try_from(completion.result()) else {
                match (request, -completion.result()) {
                    (_, libc::ENOBUFS) => counters.add(Meter::NoBuffers, 1),
                    (Request::Tun, errno) if means_gone(errno) => {
                        state.fd = None;
                        found.tun_gone = true;
                    }
                    // Of a socket that was given up it means nothing.
                    (_, errno) if is_final(errno) && current => {
                        failed = Some(io::Error::from_raw_os_error(errno));
                    }
                    (Request::Tun, _) => {
                        counters.drop_one(DropReason::TunReadFailed);
                        state.rest = REST_TURNS;
                    }
                    _ => state.rest = REST_TURNS,
                }
                continue;
            };
            let buffer = cqueue::buffer_select(completion.flags());
            match (request, buffer) {
                (Request::Wake, _) => found.woken = true,
                // A TUN has no end.
                (Request::Tun, _) if len == 0 => {
                    failed = Some(io::ErrorKind::UnexpectedEof.into());
                }
                (Request::Tun, Some(index)) => tun.push(TunRx {
                    buf: self.tun.claim(index, len),
                }),
                (Request::Udp4 | Request::Udp6, Some(index)) => {
                    match datagrams(&mut self.udp, index, len, &self.header) {
                        Some(rx) => udp.push(rx),
                        None => counters.drop_one(DropReason::UdpTruncated),
                    }
                }
                // A completion without a buffer carries nothing.
                (Request::Tun | Request::Udp4 | Request::Udp6, None) => {}
            }
        }
        failed.map_or(Ok(found), Err)
    }
}

impl Drop for Uring<'_> {
    /// Takes the buffers back from the kernel before their memory goes, and waits until no request
    /// holds a descriptor any more. The closing of the ring would leave that to a thread of the
    /// kernel: TUN queue and ports would outlive the driver, and even the process, for a moment.
    fn drop(&mut self) {
        let timeout = Timespec::new().sec(CANCEL_SECONDS);
        // Nothing armed is fine; another error leaves it to the closing of the ring.
        drop(
            self.ring
                .submitter()
                .register_sync_cancel(Some(timeout), CancelBuilder::any()),
        );
        // What was cancelled lets go in deferred work, which only entering runs.
        for _ in 0..CLOSING_TURNS_MAX {
            let entered = self.enter(Some(CLOSING_WAIT));
            let _found = self.reap(&mut Vec::new(), &mut Vec::new(), &mut Counters::default());
            if entered.is_err() || self.states.iter().all(|state| !state.armed) {
                break;
            }
        }
        for group in [GROUP_TUN, GROUP_UDP] {
            drop(self.ring.submitter().unregister_buf_ring(group));
        }
    }
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) -> bool {
    let mut queue = ring.submission();
    // SAFETY: descriptors and the message header live as long as the driver, provided buffers as
    // long as the ring; no other memory is named.
    unsafe { queue.push(entry) }.is_ok()
}

/// Turns a completed multishot receive into a batch: the buffer holds a 16-byte header, the source
/// address, control messages and the payload, the first three at their full reserved lengths.
fn datagrams(udp: &mut Buffers, index: u16, len: usize, header: &libc::msghdr) -> Option<UdpRx> {
    let mut buf = udp.claim(index, len);
    let (from, ancillary, payload_len) = {
        let out = RecvMsgOut::parse(buf.bytes(), header).ok()?;
        if out.is_payload_truncated() || out.is_control_data_truncated() {
            return None;
        }
        (
            parse_name(out.name_data())?,
            parse_control(out.control_data()),
            out.payload_data().len(),
        )
    };
    buf.narrow(len - payload_len, payload_len);
    Some(UdpRx {
        buf,
        from,
        stride: ancillary.stride,
        tos: ancillary.tos,
        local: ancillary.local,
    })
}

/// A pool of buffers and the ring through which they are lent to the kernel.
struct Buffers {
    pool: Pool,
    entries: NonNull<BufRingEntry>,
    layout: Layout,
    mask: u16,
    tail: u16,
    /// Buffers the kernel holds.
    lent: u16,
}

impl Buffers {
    fn new(ring: &IoUring, group: u16, count: u16) -> io::Result<Buffers> {
        let slots = count.next_power_of_two();
        let bytes = usize::from(slots) * size_of::<BufRingEntry>();
        let layout = Layout::from_size_align(bytes, 4096).map_err(io::Error::other)?;
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(entries) = NonNull::new(memory.cast::<BufRingEntry>()) else {
            handle_alloc_error(layout)
        };
        let buffers = Buffers {
            pool: Pool::new(count),
            entries,
            layout,
            mask: slots - 1,
            tail: 0,
            lent: 0,
        };
        // SAFETY: the memory is page-aligned, `slots` entries long, and is freed only in `drop`,
        // after the ring (or its registration) is gone: `Uring` unregisters first, and a ring
        // that never became one has no request that would use it.
        unsafe {
            ring.submitter()
                .register_buf_ring_with_flags(memory as u64, slots, group, 0)
        }?;
        Ok(buffers)
    }

    /// Lends every free buffer to the kernel.
    fn lend(&mut self) {
        let before = self.tail;
        while let Some(index) = self.pool.take_free() {
            let slot = usize::from(self.tail & self.mask);
            // SAFETY: `slot` is below the number of entries.
            let entry = unsafe { self.entries.add(slot) };
            // SAFETY: the slot is ours until the tail passes it, and the entry's fields are plain
            // numbers; the ring has as many slots as there are buffers, so it never overruns.
            let entry = unsafe { &mut *entry.as_ptr() };
            entry.set_addr(self.pool.address(index).as_ptr() as u64);
            entry.set_len(u32::try_from(BUF_LEN).expect("small"));
            entry.set_bid(index);
            self.tail = self.tail.wrapping_add(1);
            self.lent += 1;
        }
        if self.tail != before {
            // SAFETY: `entries` is the start of the ring, so this is its tail field.
            let tail = unsafe { BufRingEntry::tail(self.entries.as_ptr()) };
            // SAFETY: the kernel reads the tail with acquire order; a 16-bit aligned field.
            let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
            tail.store(self.tail, Ordering::Release);
        }
    }

    /// Takes over a buffer the kernel has filled.
    fn claim(&mut self, index: u16, len: usize) -> crate::packet::PacketBuf {
        self.lent -= 1;
        self.pool.claim(index, len)
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; no ring uses it any more.
        unsafe { dealloc(self.entries.as_ptr().cast(), self.layout) };
    }
}
