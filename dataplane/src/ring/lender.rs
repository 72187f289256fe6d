//! An io_uring and the memory it may write into, as one value: whoever has the [`Lender`] has both, so
//! no request can outlive what it names, and no buffer has a second holder.
//!
//! Buffers go out in [`Lender::lend`], as [`Lent`] values that stay here, and come back by
//! [`Lender::completions`]: a completion that names a buffer brings it along, owned. At the end all
//! requests are cancelled. Only when the kernel has answered every one of them is memory freed;
//! otherwise it is left to it.
//!
//! All unsafe code of the io_uring driver is here and in [`provided`](super::provided).

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{CompletionQueue, IoUring, Probe, cqueue, opcode, squeue};

use super::provided::Buffers;
use super::{TUN_BUFFERS, UDP_BUFFERS};
#[cfg(test)]
use crate::packet::BUF_LEN;
use crate::packet::PacketBuf;
use crate::sys::socket::{CONTROL_LEN, NAME_LEN};

/// Submissions in flight are one per request of the driver.
const ENTRIES: u32 = 16;
/// Completions never exceed the buffers by more than a few.
const COMPLETIONS: u32 = 256;
/// A cancellation of a request that the kernel holds finishes at once; this is for one that hangs.
const CANCEL_SECONDS: u64 = 1;
/// A request that does nothing is waited for this often at most, so long each time.
const ENTER_TRIES_MAX: usize = 3;
const ENTER_WAIT: Duration = Duration::from_secs(1);
/// At the end, requests are waited for this often at most, so long each time.
const CLOSING_TURNS_MAX: usize = 100;
const CLOSING_WAIT: Duration = Duration::from_millis(1);
/// Bits of `user_data` below the tag: what a request receives into.
const SOURCE_BITS: u32 = 2;

/// What a request is about, and with that the buffers it receives into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Reads of a TUN queue.
    Tun,
    /// Datagrams, each behind what [`RecvMsgOut`](io_uring::types::RecvMsgOut) parses.
    Udp,
    /// Readability; nothing is received.
    Bell,
}

impl Source {
    const ALL: [Source; 3] = [Source::Tun, Source::Udp, Source::Bell];

    fn user_data(self, tag: u64) -> u64 {
        tag << SOURCE_BITS | self as u64
    }
}

/// What the kernel says of a request.
#[derive(Debug)]
pub(super) struct Completion {
    /// As given to [`Lender::arm`].
    pub(super) tag: u64,
    /// Bytes or other news, or the errno.
    pub(super) result: Result<usize, i32>,
    /// The request stays armed.
    pub(super) more: bool,
    /// What was received into; its window is what has been written.
    pub(super) buffer: Option<PacketBuf>,
    /// With this the kernel has no buffer left to receive into.
    pub(super) starved: bool,
}

/// Template of the multishot receives; only the two lengths matter.
struct Template(libc::msghdr);

// SAFETY: its pointers are null, and nobody writes to it.
unsafe impl Sync for Template {}

#[expect(clippy::cast_possible_truncation, reason = "28 bytes")]
static TEMPLATE: Template = {
    // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_namelen = NAME_LEN as _;
    header.msg_controllen = CONTROL_LEN as _;
    Template(header)
};

/// The lengths that a completed datagram is laid out by.
pub(super) fn layout_of_datagrams() -> &'static libc::msghdr {
    &TEMPLATE.0
}

/// See the module.
pub(super) struct Lender {
    ring: IoUring,
    /// For [`Source::Tun`] and [`Source::Udp`], in that order, which are also the kernel's numbers.
    groups: [Buffers; 2],
    /// Requests that have been pushed and not yet completed for good.
    in_flight: usize,
    #[cfg(test)]
    pub(super) faults: Faults,
}

/// What tests have the kernel do that it does too seldom by itself.
#[cfg(test)]
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// What the next system calls give, for nothing: an errno, or that nothing was submitted.
    pub(super) calls: std::collections::VecDeque<Option<i32>>,
    /// The errno with which requests end that are cancelled.
    pub(super) end: Option<i32>,
    /// The errno of the next completion that has a buffer, which it brings all the same.
    pub(super) spoilt: Option<i32>,
    /// Requests are armed for one completion, which is how some kernels end them.
    pub(super) single: bool,
}

#[cfg(test)]
impl Faults {
    fn instead_of(&mut self, result: Result<usize, i32>, buffer: bool) -> Result<usize, i32> {
        match (result, self.end, self.spoilt) {
            (Err(libc::ECANCELED), Some(errno), _) => Err(errno),
            (Ok(_), _, Some(errno)) if buffer => {
                self.spoilt = None;
                Err(errno)
            }
            (other, _, _) => other,
        }
    }
}

impl Lender {
    /// Makes all that there is and tries it, since limits and sandboxes may refuse any part.
    pub(super) fn new() -> io::Result<Lender> {
        let ring = build().map_err(|error| refused("io_uring_setup", &error))?;
        knows_requests(&ring)?;
        let lends = |error| refused("a ring of buffers", &error);
        let tun = Buffers::new(&ring, Source::Tun as u16, TUN_BUFFERS).map_err(lends)?;
        let udp = Buffers::new(&ring, Source::Udp as u16, UDP_BUFFERS).map_err(lends)?;
        let mut lender = Lender {
            ring,
            groups: [tun, udp],
            in_flight: 0,
            #[cfg(test)]
            faults: Faults::default(),
        };
        lender.try_entering()?;
        Ok(lender)
    }

    /// One request that does nothing, there and back in the two ways in which a turn enters the kernel.
    fn try_entering(&mut self) -> io::Result<()> {
        for _ in 0..2 {
            self.push(opcode::Nop::new().build(), Source::Bell, 0);
            // A signal may end a wait.
            let mut tries = 0..ENTER_TRIES_MAX;
            while self.completions().next().is_none() {
                if tries.next().is_none() {
                    return Err(io::Error::other("io_uring_enter brings nothing back"));
                }
                self.enter(Some(Duration::ZERO))
                    .and_then(|()| self.enter(Some(ENTER_WAIT)))
                    .map_err(|error| refused("io_uring_enter", &error))?;
            }
        }
        Ok(())
    }

    /// Lends every free buffer to the kernel.
    pub(super) fn lend(&mut self) {
        self.groups.iter_mut().for_each(Buffers::lend);
    }

    /// Whether the kernel has no buffer to receive into.
    pub(super) fn is_starved(&self, source: Source) -> bool {
        self.groups
            .get(source as usize)
            .is_some_and(|buffers| buffers.count == 0)
    }

    /// Arms a multishot request under a tag (below 2^62); false if the queue is full.
    pub(super) fn arm(&mut self, source: Source, fd: RawFd, tag: u64) -> bool {
        let (fd, group) = (Fd(fd), source as u16);
        let entry = match source {
            // Length 0 takes each buffer's own length; offset -1 means "no position".
            Source::Tun => opcode::ReadMulti::new(fd, 0, group)
                .offset(u64::MAX)
                .build(),
            Source::Udp => opcode::RecvMsgMulti::new(fd, &raw const TEMPLATE.0, group).build(),
            Source::Bell => opcode::PollAdd::new(fd, libc::POLLIN as u32)
                .multi(true)
                .build(),
        };
        #[cfg(test)]
        let entry = match source {
            Source::Tun if self.faults.single => {
                let len = u32::try_from(BUF_LEN).expect("small");
                opcode::Read::new(fd, std::ptr::null_mut(), len)
                    .buf_group(group)
                    .build()
                    .flags(squeue::Flags::BUFFER_SELECT)
            }
            Source::Bell if self.faults.single => {
                opcode::PollAdd::new(fd, libc::POLLIN as u32).build()
            }
            Source::Tun | Source::Udp | Source::Bell => entry,
        };
        self.push(entry, source, tag)
    }

    /// Queues a request of this file, all of which are built above.
    fn push(&mut self, entry: squeue::Entry, source: Source, tag: u64) -> bool {
        let entry = entry.user_data(source.user_data(tag));
        let mut queue = self.ring.submission();
        // SAFETY: what the kernel writes into is lent, and stays so until it has completed the request
        // for good; the template lives for ever; no other memory is named.
        let pushed = unsafe { queue.push(&entry) }.is_ok();
        self.in_flight += usize::from(pushed);
        pushed
    }

    /// Ends a request; its completions that are there already, and its last one, are still to come.
    ///
    /// # Errors
    /// There is none, because it has just ended by itself, or it hangs.
    pub(super) fn cancel(&self, source: Source, tag: u64) -> io::Result<()> {
        self.cancel_all(CancelBuilder::user_data(source.user_data(tag)))
    }

    fn cancel_all(&self, which: CancelBuilder) -> io::Result<()> {
        let timeout = Timespec::new().sec(CANCEL_SECONDS);
        self.ring
            .submitter()
            .register_sync_cancel(Some(timeout), which)
    }

    /// Submits, runs deferred work, and waits for a completion if told to (`None`: until one comes).
    ///
    /// # Errors
    /// The kernel refuses; not because of a signal, of time that is up or of a queue that is full.
    pub(super) fn enter(&mut self, wait: Option<Duration>) -> io::Result<()> {
        match self.call(wait).map_err(|e| (e.raw_os_error(), e)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN), _)) => {
                Ok(())
            }
            Err((_, error)) => Err(error),
        }
    }

    /// Makes the system call.
    fn call(&mut self, wait: Option<Duration>) -> io::Result<usize> {
        #[cfg(test)]
        if let Some(fault) = self.faults.calls.pop_front() {
            return fault.map_or(Ok(0), |errno| Err(io::Error::from_raw_os_error(errno)));
        }
        match wait {
            None => self.ring.submit_and_wait(1),
            Some(Duration::ZERO) => self.ring.submit(),
            Some(wait) => {
                let timespec = Timespec::from(wait);
                let args = SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(1, &args)
            }
        }
    }

    /// Takes what has been completed, in order.
    pub(super) fn completions(&mut self) -> Completions<'_> {
        Completions {
            queue: self.ring.completion(),
            groups: &mut self.groups,
            in_flight: &mut self.in_flight,
            #[cfg(test)]
            faults: &mut self.faults,
        }
    }

    /// Ends all requests; true once the kernel has answered every one, and has given up the buffers.
    fn close(&mut self) -> bool {
        // What was never submitted cannot be cancelled; nothing armed is fine.
        let submitted = self.enter(Some(Duration::ZERO)).is_ok();
        drop(self.cancel_all(CancelBuilder::any()));
        // What was cancelled lets go in deferred work, which only entering runs.
        for _ in 0..CLOSING_TURNS_MAX {
            self.completions().for_each(drop);
            if self.in_flight == 0 || !submitted || self.enter(Some(CLOSING_WAIT)).is_err() {
                break;
            }
        }
        let submitter = self.ring.submitter();
        let unregistered = [Source::Tun, Source::Udp]
            .map(|source| submitter.unregister_buf_ring(source as u16).is_ok());
        self.in_flight == 0 && unregistered == [true; 2]
    }
}

impl Drop for Lender {
    /// Takes the buffers back from the kernel before their memory goes, and waits until no request
    /// holds a descriptor any more. The closing of the ring would leave that to a thread of the
    /// kernel: TUN queue and ports would outlive the driver, and even the process, for a moment. What
    /// the kernel does not give back, it keeps.
    fn drop(&mut self) {
        if !self.close() {
            tracing::warn!("the kernel does not end all requests: their buffers are left to it");
            return;
        }
        for buffers in &mut self.groups {
            // SAFETY: no request is in flight, and the kernel has given up the ring of buffers.
            unsafe { buffers.reclaim() };
        }
    }
}

/// See [`Lender::completions`].
pub(super) struct Completions<'a> {
    queue: CompletionQueue<'a>,
    groups: &'a mut [Buffers; 2],
    in_flight: &'a mut usize,
    #[cfg(test)]
    faults: &'a mut Faults,
}

impl Iterator for Completions<'_> {
    type Item = Completion;

    fn next(&mut self) -> Option<Completion> {
        let entry = self.queue.next()?;
        let more = cqueue::more(entry.flags());
        if !more {
            *self.in_flight -= 1;
        }
        let source = entry.user_data() & ((1 << SOURCE_BITS) - 1);
        let source = Source::ALL.iter().find(|known| **known as u64 == source);
        let result = usize::try_from(entry.result()).map_err(|_| -entry.result());
        #[cfg(test)]
        let result = self
            .faults
            .instead_of(result, cqueue::buffer_select(entry.flags()).is_some());
        let mut group = source.and_then(|source| self.groups.get_mut(*source as usize));
        let buffer = match (cqueue::buffer_select(entry.flags()), &mut group) {
            (Some(index), Some(group)) => {
                let len = *result.as_ref().unwrap_or(&0);
                // SAFETY: the kernel has said, in an entry that is taken from the queue once, that it
                // is done with the buffer.
                Some(unsafe { group.returned(index, len) })
            }
            (None, _) | (_, None) => None,
        };
        Some(Completion {
            tag: entry.user_data() >> SOURCE_BITS,
            result,
            more,
            buffer,
            starved: group.is_some_and(|group| group.count == 0),
        })
    }
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

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::packet::Lent;

    const SENT: usize = 3;

    /// A lender that receives from a socket, and what has come from there.
    fn receiving() -> (Lender, UdpSocket, Vec<PacketBuf>) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut lender = Lender::new().expect("io_uring is there");
        lender.lend();
        assert!(lender.arm(Source::Udp, socket.as_raw_fd(), 7));
        for _ in 0..SENT {
            socket
                .send_to(b"hello", socket.local_addr().unwrap())
                .unwrap();
        }
        let mut received = Vec::new();
        while received.len() < SENT {
            lender.enter(Some(Duration::from_secs(5))).unwrap();
            for completion in lender.completions() {
                assert_eq!(completion.tag, 7);
                assert!(completion.more && completion.result.is_ok());
                received.push(completion.buffer.expect("each has its buffer"));
            }
        }
        (lender, socket, received)
    }

    fn numbers(lent: &[Option<Lent>]) -> Vec<u16> {
        lent.iter().flatten().map(Lent::index).collect()
    }

    #[test]
    fn what_arrives_is_lent_no_more_until_it_is_dropped() {
        let (mut lender, socket, received) = receiving();
        lender.lend();
        let udp = Source::Udp as usize;
        assert_eq!(lender.groups[udp].count, usize::from(UDP_BUFFERS) - SENT);
        let lent = numbers(&lender.groups[udp].lent);
        assert_eq!(lent.len(), lender.groups[udp].count);
        for buf in &received {
            assert!(buf.bytes().ends_with(b"hello"));
            let start = buf.bytes().as_ptr();
            let of_the_kernel = lender.groups[udp].lent.iter().flatten();
            assert!(
                of_the_kernel
                    .clone()
                    .all(|lent| lent.address().as_ptr().cast_const() != start)
            );
        }
        drop(received);
        lender.lend();
        assert_eq!(lender.groups[udp].count, usize::from(UDP_BUFFERS));
        drop(socket);
    }

    #[test]
    fn what_has_arrived_outlives_the_ring() {
        let (lender, _socket, received) = receiving();
        drop(lender);
        assert!(received.iter().all(|buf| buf.bytes().ends_with(b"hello")));
    }

    #[test]
    fn the_kernel_gives_back_everything_at_the_end() {
        let (mut lender, socket, _received) = receiving();
        assert!(
            lender.arm(Source::Bell, socket.as_raw_fd(), 8),
            "not submitted yet"
        );
        assert_eq!(lender.in_flight, 2);
        assert!(lender.close());
        // And what it does not give back stays: as above, with an answer outstanding.
        let (mut lender, _socket, _received) = receiving();
        lender.in_flight += 1;
        assert!(!lender.close());
    }

    #[test]
    fn a_signal_at_the_start_is_no_refusal_and_a_kernel_that_never_answers_is() {
        let mut lender = Lender::new().expect("io_uring is there");
        let mut try_with = |errno, times| {
            lender.faults.calls = [Some(errno)].repeat(times).into();
            let result = lender.try_entering();
            lender.faults.calls.clear();
            result.map_err(|error| error.to_string())
        };
        assert_eq!(try_with(libc::EINTR, 3), Ok(()));
        let forbidden = try_with(libc::EPERM, 1).expect_err("a sandbox");
        assert!(forbidden.contains("forbidden"), "{forbidden}");
        let silent = try_with(libc::EBUSY, 99).expect_err("nothing comes");
        assert!(silent.contains("nothing back"), "{silent}");
    }

    #[test]
    #[should_panic(expected = "once")]
    fn no_buffer_is_taken_over_twice() {
        let mut lender = Lender::new().expect("io_uring is there");
        let udp = &mut lender.groups[Source::Udp as usize];
        udp.lend();
        // SAFETY: no request is armed, so the kernel writes nowhere.
        let _first = unsafe { udp.returned(0, 1) };
        // SAFETY: as above.
        let _second = unsafe { udp.returned(0, 1) };
    }
}
