//! What a data plane is started with, and why a start can fail.

#![forbid(unsafe_code)]

use std::io;

use zeroize::Zeroizing;

use crate::named;

/// Everything that is fixed for the life of a data plane.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "a key")]
pub struct Config {
    /// Name of the TUN interface, at most 15 bytes; `%d` is replaced by a number.
    pub tun_name: String,
    /// Largest inner packet in bytes: sealing pads no further. The caller sets the interface's MTU.
    pub mtu: u16,
    /// Shards, each with a thread, a TUN queue and UDP sockets: 1 to [`SHARDS_MAX`].
    pub shards: usize,
    /// Pin shard `i` to the `i`-th CPU of the inherited affinity mask.
    pub pin: bool,
    /// How shards wait for and receive packets.
    pub driver: DriverChoice,
    /// Which offloads to use where the kernel has them.
    pub offloads: Offloads,
    /// UDP port of both families; 0 for any free one.
    pub listen_port: u16,
    /// `SO_MARK` on every underlay socket, unless 0.
    pub fwmark: u32,
    /// Own WireGuard private key (Curve25519, 32 bytes); without one nothing handshakes.
    pub private_key: Option<Zeroizing<[u8; 32]>>,
    /// Device mode: a peer's endpoint is the source of its newest authentic datagram, and answers
    /// leave from the local address that it was sent to. Otherwise [`PathDecision`]s alone say
    /// where to send. There are no discovery sockets then.
    ///
    /// [`PathDecision`]: crate::PathDecision
    pub roam: bool,
    /// Which implementation of the WireGuard transport seals and opens.
    pub engine: Engine,
}

/// Shards a data plane has at most: the owner is named by eight bits of the receiver index.
pub const SHARDS_MAX: usize = 64;

/// One shard's part of what all shards of a node may have together, and what each has at least: so that
/// what a node may keep does not grow with its cores.
pub(crate) const fn share(of_node: usize, shards: usize, at_least: usize) -> usize {
    let part = of_node / if shards == 0 { 1 } else { shards };
    if part < at_least { at_least } else { part }
}

/// How many shards where nobody says: one for each usable core, up to [`SHARDS_MAX`].
#[must_use]
pub fn shards_by_default() -> usize {
    usable_cores().min(SHARDS_MAX)
}

/// Whether shards are pinned where nobody says: on more than two usable cores. On fewer they share
/// them with everything else, and a shard whose core is taken must be able to leave it: beside a
/// flood that fills one of two cores, a pinned tunnel carries less than half of what a free one does
/// (`bench/flood.sh`).
#[must_use]
pub fn pinned_by_default() -> bool {
    usable_cores() > 2
}

fn usable_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Inner MTU a data plane accepts at least: what IPv4 demands of every host.
pub const MTU_MIN: u16 = 576;

/// Inner MTU a data plane accepts at most: what a UDP datagram over IPv4 holds, less what sealing adds.
/// A larger packet can never leave.
pub const MTU_MAX: u16 = 65_507 - 32;

/// Which driver to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DriverChoice {
    /// io_uring where the kernel allows it and has what we need (6.7), else epoll.
    #[default]
    Auto,
    /// io_uring, or fail.
    IoUring,
    /// epoll, whatever the kernel has.
    Epoll,
}

named! {
    /// Which driver is in use.
    pub enum DriverKind {
        /// Multishot receives into provided buffers.
        IoUring = "io_uring",
        /// Readiness, then reads until nothing is left.
        Epoll = "epoll",
    }
}

/// Offloads by edge. All are probed at start and switched off, with one log line, where the kernel
/// refuses them; `false` does not even try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// TSO and USO super-packets from the TUN, and merging into such for writes to it.
    pub tun: bool,
    /// `UDP_SEGMENT`: many datagrams in one send.
    pub gso: bool,
    /// `UDP_GRO`: many datagrams in one receive.
    pub gro: bool,
}

impl Default for Offloads {
    fn default() -> Offloads {
        Offloads {
            tun: true,
            gso: true,
            gro: true,
        }
    }
}

/// Implementation of the WireGuard transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// Our own: batches through a multi-packet AEAD, counters that many threads may take from.
    #[default]
    Ringtail,
    /// boringtun 0.7's `Tunn`: one peer is one shard's work in both directions. Only with the feature
    /// `boringtun`.
    Boringtun,
}

/// Why a data plane could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A value in [`Config`] is out of range.
    #[error("configuration: {0}")]
    Config(&'static str),
    /// The TUN device could not be opened.
    #[error(
        "cannot open the TUN device {name}: {source} ({hint})",
        hint = tun_hint(name, source)
    )]
    Tun {
        /// Interface asked for.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The UDP sockets could not be opened or set up.
    #[error("cannot open UDP port {port}: {source}")]
    Udp {
        /// Port asked for; 0 was "any".
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// io_uring was demanded and is not usable.
    #[error("io_uring is not usable here: {0}")]
    IoUring(String),
    /// A thread, an eventfd or an epoll instance could not be made.
    #[error("cannot start the shards: {0}")]
    Threads(#[source] io::Error),
}

/// What may help where a TUN device cannot be opened.
fn tun_hint(name: &str, source: &io::Error) -> String {
    let by_hand = format!("ip tuntap add {name} mode tun multi_queue");
    match source.raw_os_error() {
        // The kernel's answer to other flags than the interface was made with.
        Some(libc::EINVAL) => format!("if it is there already, it has to be made by `{by_hand}`"),
        Some(libc::EPERM) => {
            format!("that needs CAP_NET_ADMIN, unless somebody made it for us: {by_hand}")
        }
        Some(_) | None => "is /dev/net/tun there?".into(),
    }
}
