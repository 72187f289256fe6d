//! Safe functions over the system calls the drivers need: sockets and control messages, TUN
//! ioctls, event descriptors, CPU affinity, the clocks of processor time; and over what a processor
//! need not have.
//!
//! All unsafe code of the drivers except io_uring's shared memory is in this folder.
//!
//! Rooms: `socket` options, sending and receiving; `file` the TUN descriptor; `netlink` questions about
//! routing; `bpf` instructions of a filter; `event` and `poll` waking and waiting; `clock`; `cpu`
//! affinity; `sum` sums of words, for checksums; `refuse` a kernel that refuses, for tests.

pub(crate) mod bpf;
mod clock;
mod cpu;
mod event;
mod file;
pub(crate) mod netlink;
pub(crate) mod poll;
#[cfg(test)]
pub(crate) mod refuse;
pub(crate) mod socket;
mod sum;

use std::io;

pub(crate) use clock::{cycles, thread_time};
pub use clock::{now, slept, steady_wall, steady_wall_at_least};
pub(crate) use cpu::{allowed_cpus, pin_to};
pub(crate) use event::EventFd;
pub(crate) use file::{has_failed, read, set_tun_offload, write};
pub(crate) use sum::sum_of;
#[cfg(test)]
pub(crate) use sum::sum_words;

/// What a system call gave; the error it has left if that is -1.
fn called(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
