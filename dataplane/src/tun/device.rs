//! The TUN device: one queue per shard, opened by tun-rs and never read through it.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use tun_rs::{DeviceBuilder, SyncDevice};

use super::merging::{Kind, Kinds};
use crate::sys;

/// `TUN_F_*`: unfinished checksums.
const TUN_F_CSUM: u32 = 0x01;
/// `TUN_F_*`: TCP super-packets of both families.
const TUN_F_TSO: u32 = 0x02 | 0x04;
/// `TUN_F_*`: UDP super-packets of both families (Linux 6.2).
const TUN_F_USO: u32 = 0x20 | 0x40;

/// Which super-packets the kernel gives us, and takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TunOffloads {
    /// TCP segmentation, both families, with checksums left to us.
    pub(crate) tso: bool,
    /// UDP segmentation, both families.
    pub(crate) uso: bool,
}

impl TunOffloads {
    /// What to merge for it: it takes what it gives, as far as is known.
    pub(crate) fn kinds(self) -> Kinds {
        let taken = |kind: &Kind| match kind {
            Kind::Tcp4 | Kind::Tcp6 => self.tso,
            Kind::Udp4 | Kind::Udp6 => self.uso,
        };
        let taken = Kind::ALL.iter().copied().filter(taken);
        taken.fold(Kinds::NONE, Kinds::with)
    }
}

/// The device, from its opening until its queues go to the shards.
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) offloads: TunOffloads,
    pub(crate) queues: Vec<Queue>,
}

/// One queue: a descriptor whose every read is one packet behind a virtio-net header.
pub(crate) struct Queue(SyncDevice);

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Queue {
    /// Writes one packet or super-packet with its header. The error is the errno.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<(), i32> {
        sys::write(self.as_fd(), bytes).map(drop)
    }
}

impl Device {
    /// Another descriptor of the first queue.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.queues[0].as_fd().try_clone_to_owned()
    }

    /// Opens `queues` queues of the interface `name`, which is left down and without addresses.
    /// Offloads are asked for one kind after the other, and what the kernel refuses is left out.
    ///
    /// # Errors
    /// Whatever opening `/dev/net/tun` and attaching to the interface gives.
    pub(crate) fn open(name: &str, queues: usize, offloads: bool) -> io::Result<Device> {
        let first = DeviceBuilder::new()
            .name(name)
            .multi_queue(true)
            .offload(true)
            .inherit_enable_state()
            .build_sync()?;
        let name = first.name()?;
        let mut devices = vec![first];
        while devices.len() < queues {
            let next = devices[0].try_clone()?;
            devices.push(next);
        }
        let queues: Vec<Queue> = devices.into_iter().map(Queue).collect();
        for queue in &queues {
            queue.0.set_nonblocking(true)?;
        }
        // The mask belongs to the device, so setting it through one queue is enough.
        let offloads = probe(queues[0].as_fd(), offloads)?;
        tracing::debug!(
            name,
            queues = queues.len(),
            ?offloads,
            fd = queues[0].0.as_raw_fd(),
            "TUN device open"
        );
        Ok(Device {
            name,
            offloads,
            queues,
        })
    }
}

fn probe(fd: BorrowedFd<'_>, wanted: bool) -> io::Result<TunOffloads> {
    if wanted {
        for (uso, flags) in [(true, TUN_F_USO), (false, 0)] {
            let offloads = TunOffloads { tso: true, uso };
            match sys::set_tun_offload(fd, TUN_F_CSUM | TUN_F_TSO | flags) {
                Ok(()) => return Ok(offloads),
                Err(error) => tracing::info!(?offloads, %error, "the TUN device refuses offloads"),
            }
        }
    }
    sys::set_tun_offload(fd, 0)?;
    Ok(TunOffloads::default())
}
