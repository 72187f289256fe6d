//! Reads and writes of the TUN descriptor, its one ioctl, and whether it has failed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::called;
use super::socket::errno;

/// `TUNSETOFFLOAD`: `_IOW('T', 208, unsigned int)`.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;

/// Reads once. The error is the errno.
pub(crate) fn read(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<usize, i32> {
    // SAFETY: `bytes` is writable for its length during the call.
    let n = unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
    usize::try_from(n).map_err(|_| errno())
}

/// Writes once. The error is the errno.
pub(crate) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, i32> {
    // SAFETY: `bytes` is readable for its length during the call.
    let n = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(n).map_err(|_| errno())
}

/// Whether nothing can be read or written any more (`POLLERR`).
pub(crate) fn has_failed(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: `poll` is one valid entry for the length of the call.
    let found = unsafe { libc::poll(&raw mut poll, 1, 0) };
    found == 1 && poll.revents & libc::POLLERR != 0
}

/// Tells the kernel which unfinished packets it may give us through a TUN device (`TUN_F_*`).
pub(crate) fn set_tun_offload(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: the ioctl takes its argument by value.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    called(result).map(drop)
}
