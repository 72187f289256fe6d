//! Socket options, and sending and receiving with control messages.

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use arrayvec::ArrayVec;

use super::called;

/// Space for control messages in bytes: GRO size (24), TOS or traffic class (24), packet info (32
/// or 40), and room to spare; 32 is known to be too little.
pub(crate) const CONTROL_LEN: usize = 128;

/// Longest socket address of the two families, in bytes.
pub(crate) const NAME_LEN: usize = size_of::<libc::sockaddr_in6>();

/// Aligned space for control messages.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

pub(crate) fn socklen(len: usize) -> libc::socklen_t {
    libc::socklen_t::try_from(len).expect("small")
}

fn family(family: i32) -> libc::sa_family_t {
    libc::sa_family_t::try_from(family).expect("small")
}

/// Sets an option whose value is an `int`.
pub(crate) fn set_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: an int points to nothing.
    unsafe { set(fd, level, name, &value) }
}

/// Has receives tell the TOS or traffic class byte ([`Ancillary::tos`]), of the family of this address.
pub(crate) fn tell_tos(fd: BorrowedFd<'_>, family_of: SocketAddr) -> io::Result<()> {
    match family_of {
        SocketAddr::V4(_) => set_int(fd, libc::IPPROTO_IP, libc::IP_RECVTOS, 1),
        SocketAddr::V6(_) => set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1),
    }
}

/// Has receives tell where datagrams arrived ([`Ancillary::local`]).
pub(crate) fn tell_local(fd: BorrowedFd<'_>, family_of: SocketAddr) -> io::Result<()> {
    match family_of {
        SocketAddr::V4(_) => set_int(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
        SocketAddr::V6(_) => set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1),
    }
}

/// Sets an option.
///
/// # Safety
/// What the value points to is readable.
unsafe fn set<T>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    let (bytes, len) = (std::ptr::from_ref(value).cast(), socklen(size_of::<T>()));
    // SAFETY: the value is readable for its length during the call; the rest is the caller's promise.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, bytes, len) };
    called(result).map(drop)
}

/// Datagrams that a socket has dropped because its buffer was full; wraps at 2^32.
pub(crate) fn drops(fd: BorrowedFd<'_>) -> u32 {
    /// `SK_MEMINFO_DROPS` of `linux/sock_diag.h` is the last of so many numbers.
    const SK_MEMINFO_VARS: usize = 9;
    let mut numbers = [0u32; SK_MEMINFO_VARS];
    let mut len = socklen(size_of_val(&numbers));
    // SAFETY: `numbers` is writable for `len` bytes, and `len` for the length of the call.
    unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            numbers.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    // A kernel that does not know the option leaves the zeros.
    numbers[SK_MEMINFO_VARS - 1]
}

/// Attaches a classic BPF program that picks the member of a reuse-port group.
pub(crate) fn attach_reuseport_filter(
    fd: BorrowedFd<'_>,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    let fprog = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr().cast_mut(),
    };
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF);
    // SAFETY: it points to `program`, which the call copies.
    unsafe { set(fd, level, name, &fprog) }
}

/// A socket address in the kernel's form.
#[derive(Clone, Copy)]
pub(crate) struct Name {
    storage: libc::sockaddr_in6,
    len: libc::socklen_t,
}

impl Name {
    /// Converts; IPv6 scope ids travel along.
    pub(crate) fn new(addr: SocketAddr) -> Name {
        let zero = libc::sockaddr_in6 {
            sin6_family: 0,
            sin6_port: 0,
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
            sin6_scope_id: 0,
        };
        match addr {
            SocketAddr::V4(v4) => {
                let mut storage = zero;
                let sin = libc::sockaddr_in {
                    sin_family: family(libc::AF_INET),
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(v4.ip().octets()),
                    },
                    sin_zero: [0; 8],
                };
                // SAFETY: `sockaddr_in` (16 bytes, alignment 4) fits into `sockaddr_in6` (28, 4).
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(sin) };
                Name {
                    storage,
                    len: socklen(size_of::<libc::sockaddr_in>()),
                }
            }
            SocketAddr::V6(v6) => Name {
                storage: libc::sockaddr_in6 {
                    sin6_family: family(libc::AF_INET6),
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr {
                        s6_addr: v6.ip().octets(),
                    },
                    sin6_scope_id: v6.scope_id(),
                },
                len: socklen(NAME_LEN),
            },
        }
    }

    fn parts(&mut self) -> (*mut libc::c_void, libc::socklen_t) {
        ((&raw mut self.storage).cast(), self.len)
    }
}

/// Room for a name that the kernel writes.
fn name_room(name: &mut [u8; NAME_LEN]) -> (*mut libc::c_void, libc::socklen_t) {
    (name.as_mut_ptr().cast(), socklen(NAME_LEN))
}

/// Reads a socket address as the kernel wrote it; `None` for other families or short ones.
pub(crate) fn parse_name(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*bytes.first_chunk::<2>()?));
    let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk::<2>()?);
    match family {
        libc::AF_INET => {
            let octets = *bytes.get(4..)?.first_chunk::<4>()?;
            Some(SocketAddr::from((octets, port)))
        }
        libc::AF_INET6 => {
            let octets = *bytes.get(8..)?.first_chunk::<16>()?;
            let scope = u32::from_ne_bytes(*bytes.get(24..)?.first_chunk::<4>()?);
            let ip = Ipv6Addr::from(octets);
            Some(SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope)))
        }
        _ => None,
    }
}

/// Where a datagram arrived: what an answer leaves from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Local {
    /// The address it was sent to.
    pub(crate) addr: IpAddr,
    /// The interface it came in by.
    pub(crate) interface: u32,
}

impl Local {
    /// The interface that a send must name: link-local addresses mean nothing without. Elsewhere
    /// routing, which knows the source address, picks the interface: forcing one would send what
    /// has no route there to the wrong link.
    fn forced_interface(self) -> u32 {
        match self.addr {
            IpAddr::V6(addr) if addr.is_unicast_link_local() => self.interface,
            IpAddr::V4(_) | IpAddr::V6(_) => 0,
        }
    }
}

/// What control messages say of a received datagram or GRO batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ancillary {
    /// Bytes of every datagram but the last; 0 if the payload is one datagram.
    pub(crate) stride: u16,
    /// TOS or traffic class byte.
    pub(crate) tos: u8,
    /// Where it arrived, if the socket was told to say so.
    pub(crate) local: Option<Local>,
}

impl Ancillary {
    /// Bytes of every datagram but the last, of a payload of so many; never 0.
    pub(crate) fn stride_of(&self, len: usize) -> usize {
        let one = self.stride == 0;
        if one { len.max(1) } else { self.stride.into() }
    }
}

/// `struct in_pktinfo`: the interface (native order), the address to answer from, the address it
/// was sent to. They differ for broadcasts, which nobody can answer from.
fn parse_info4(data: &[u8]) -> Option<Local> {
    let interface = u32::from_ne_bytes(*data.first_chunk::<4>()?);
    let octets = *data.get(4..)?.first_chunk::<4>()?;
    Some(Local {
        addr: Ipv4Addr::from(octets).into(),
        interface,
    })
}

/// `struct in6_pktinfo`: the address it was sent to, the interface (native order).
fn parse_info6(data: &[u8]) -> Option<Local> {
    let octets = *data.first_chunk::<16>()?;
    let interface = u32::from_ne_bytes(*data.get(16..)?.first_chunk::<4>()?);
    Some(Local {
        addr: Ipv6Addr::from(octets).into(),
        interface,
    })
}

/// Reads control messages: `struct cmsghdr` of 16 bytes, then data, each aligned to 8 bytes.
pub(crate) fn parse_control(mut control: &[u8]) -> Ancillary {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let mut found = Ancillary::default();
    while let Some(header) = control.first_chunk::<HEADER>() {
        let word = |at: usize| {
            i32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let mut len = [0u8; size_of::<usize>()];
        len.copy_from_slice(&header[..size_of::<usize>()]);
        let len = usize::from_ne_bytes(len);
        let (level, kind) = (word(HEADER - 8), word(HEADER - 4));
        let Some(data) = control.get(HEADER..len) else {
            break;
        };
        let int = data.first_chunk::<4>().map(|b| i32::from_ne_bytes(*b));
        match (level, kind) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                found.stride = int.and_then(|size| u16::try_from(size).ok()).unwrap_or(0);
            }
            // IP_TOS arrives as one byte, the traffic class as an int.
            (libc::IPPROTO_IP, libc::IP_TOS) => found.tos = data.first().copied().unwrap_or(0),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                found.tos = int.and_then(|class| u8::try_from(class).ok()).unwrap_or(0);
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => found.local = parse_info4(data),
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => found.local = parse_info6(data),
            _ => {}
        }
        let step = len.next_multiple_of(size_of::<usize>());
        let Some(rest) = control.get(step..) else {
            break;
        };
        control = rest;
    }
    found
}

/// Appends one control message and returns the space used so far.
fn push_control(control: &mut Control, used: usize, level: i32, kind: i32, data: &[u8]) -> usize {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let len = HEADER + data.len();
    let at = &mut control.0[used..used + len];
    at[..size_of::<usize>()].copy_from_slice(&len.to_ne_bytes());
    at[HEADER - 8..HEADER - 4].copy_from_slice(&level.to_ne_bytes());
    at[HEADER - 4..HEADER].copy_from_slice(&kind.to_ne_bytes());
    at[HEADER..].copy_from_slice(data);
    used + len.next_multiple_of(size_of::<usize>())
}

/// How a send leaves, besides its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leave {
    /// Where to.
    pub(crate) to: SocketAddr,
    /// Where from, unless routing is to choose; ignored if it is of the other family.
    pub(crate) local: Option<Local>,
    /// TOS or traffic class byte.
    pub(crate) tos: u8,
}

impl Leave {
    /// To `to`, from where routing says, with TOS 0.
    pub(crate) fn to(to: SocketAddr) -> Leave {
        Leave {
            to,
            local: None,
            tos: 0,
        }
    }
}

/// Control messages of a send: the segment size if the payload is more than one datagram, the TOS
/// byte if it is not 0, the source if one is wanted.
fn send_control(leave: &Leave, stride: Option<u16>) -> (Control, usize) {
    let Leave { to, local, tos } = *leave;
    let mut control = Control([0; CONTROL_LEN]);
    let mut used = 0;
    if let Some(stride) = stride {
        let data = stride.to_ne_bytes();
        used = push_control(&mut control, used, libc::SOL_UDP, libc::UDP_SEGMENT, &data);
    }
    if tos != 0 {
        let (level, kind) = match to.ip() {
            IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
            IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        };
        let data = i32::from(tos).to_ne_bytes();
        used = push_control(&mut control, used, level, kind, &data);
    }
    if let Some(local) = local {
        let interface = local.forced_interface().to_ne_bytes();
        match (to.ip(), local.addr) {
            (IpAddr::V4(_), IpAddr::V4(addr)) => {
                // The source goes into the second field; the third only means something on arrival.
                let mut info = [0; 12];
                info[..4].copy_from_slice(&interface);
                info[4..8].copy_from_slice(&addr.octets());
                let (level, kind) = (libc::IPPROTO_IP, libc::IP_PKTINFO);
                used = push_control(&mut control, used, level, kind, &info);
            }
            (IpAddr::V6(_), IpAddr::V6(addr)) => {
                let mut info = [0; 20];
                info[..16].copy_from_slice(&addr.octets());
                info[16..].copy_from_slice(&interface);
                let (level, kind) = (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO);
                used = push_control(&mut control, used, level, kind, &info);
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {}
        }
    }
    (control, used)
}

/// Sends `bytes` without waiting, as datagrams of `stride` bytes (the last may be shorter) or,
/// without a stride, as one. The error is the errno.
pub(crate) fn send(
    fd: BorrowedFd<'_>,
    leave: &Leave,
    bytes: &[u8],
    stride: Option<u16>,
) -> Result<(), i32> {
    let mut name = Name::new(leave.to);
    let (mut control, used) = send_control(leave, stride);
    let mut iov = vector(bytes);
    let message = message(name.parts(), &mut iov, &mut control, used);
    loop {
        // SAFETY: name, vector, control and payload outlive the call, which only reads them.
        let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT) };
        if sent >= 0 {
            return Ok(());
        }
        match errno() {
            libc::EINTR => {}
            error => return Err(error),
        }
    }
}

/// Datagrams one [`send_each`] call hands to the kernel at a time.
const EACH_MAX: usize = 64;

/// Sends `bytes` as single datagrams of `stride` bytes each, many per system call. Returns how many
/// left, and the errno of the first that did not, after which nothing more is tried.
pub(crate) fn send_each(
    fd: BorrowedFd<'_>,
    leave: &Leave,
    bytes: &[u8],
    stride: u16,
) -> (usize, Option<i32>) {
    let mut name = Name::new(leave.to);
    let (mut control, used) = send_control(leave, None);
    let mut sent = 0;
    let stride = usize::from(stride.max(1));
    for chunk in bytes.chunks(stride * EACH_MAX) {
        let mut iovs: ArrayVec<libc::iovec, EACH_MAX> = chunk.chunks(stride).map(vector).collect();
        let mut messages: ArrayVec<libc::mmsghdr, EACH_MAX> = iovs
            .iter_mut()
            .map(|iov| one_of_many(message(name.parts(), iov, &mut control, used)))
            .collect();
        // SAFETY: name, vectors, control and payload outlive the call.
        let (left, error) = unsafe { send_messages(fd, &mut messages) };
        sent += left;
        if error.is_some() {
            return (sent, error);
        }
    }
    (sent, None)
}

/// Sends messages without waiting, as many per system call as the kernel takes. Returns how many left,
/// and the errno of the first that did not.
///
/// # Safety
/// What the messages point to is readable until the call returns.
unsafe fn send_messages(
    fd: BorrowedFd<'_>,
    messages: &mut [libc::mmsghdr],
) -> (usize, Option<i32>) {
    let mut done = 0;
    while done < messages.len() {
        let todo = libc::c_uint::try_from(messages.len() - done).expect("at most EACH_MAX");
        let first = messages[done..].as_mut_ptr();
        // SAFETY: so many messages are there, of which the call only writes `msg_len`; the rest is
        // the caller's promise.
        let n = unsafe { libc::sendmmsg(fd.as_raw_fd(), first, todo, libc::MSG_DONTWAIT) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            Err(_) => match errno() {
                libc::EINTR => {}
                error => return (done, Some(error)),
            },
        }
    }
    (done, None)
}

/// Sends single datagrams of equal lengths to many addresses, many per system call and without waiting.
/// What cannot be sent to one address is passed over; a full queue ends it. Returns how many left.
pub(crate) fn send_many<const LEN: usize>(
    fd: BorrowedFd<'_>,
    datagrams: &[(Leave, [u8; LEN])],
) -> usize {
    let mut sent = 0;
    for chunk in datagrams.chunks(EACH_MAX) {
        let mut parts: ArrayVec<_, EACH_MAX> = chunk
            .iter()
            .map(|(leave, datagram)| {
                let (control, used) = send_control(leave, None);
                (Name::new(leave.to), vector(datagram), control, used)
            })
            .collect();
        let mut messages: ArrayVec<libc::mmsghdr, EACH_MAX> = parts
            .iter_mut()
            .map(|(name, iov, control, used)| {
                one_of_many(message(name.parts(), iov, control, *used))
            })
            .collect();
        let mut rest = messages.as_mut_slice();
        while !rest.is_empty() {
            // SAFETY: the parts and the datagrams outlive the call.
            let (left, error) = unsafe { send_messages(fd, rest) };
            sent += left;
            let passed_over = match error {
                Some(libc::EAGAIN | libc::ENOBUFS) => return sent,
                Some(_) => 1,
                None => 0,
            };
            rest = &mut rest[left + passed_over..];
        }
    }
    sent
}

/// What a message is to hold.
fn vector(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

/// Where one is to be received.
fn vector_mut(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

fn one_of_many(message: libc::msghdr) -> libc::mmsghdr {
    libc::mmsghdr {
        msg_hdr: message,
        msg_len: 0,
    }
}

/// A message to send, or room for one that is received, with so much of the control messages' space.
fn message(
    (name, name_len): (*mut libc::c_void, libc::socklen_t),
    iov: &mut libc::iovec,
    control: &mut Control,
    used: usize,
) -> libc::msghdr {
    // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = name;
    message.msg_namelen = name_len;
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    if used > 0 {
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = used as _;
    }
    message
}

/// One received datagram or GRO batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Bytes of payload.
    pub(crate) len: usize,
    /// Who sent it.
    pub(crate) from: SocketAddr,
    /// What control messages said.
    pub(crate) ancillary: Ancillary,
    /// The buffer was too short.
    pub(crate) truncated: bool,
}

/// Receives into `bytes` without waiting; `None` if there is nothing.
pub(crate) fn receive(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<Option<Received>> {
    let mut name = [0u8; NAME_LEN];
    let mut control = Control([0; CONTROL_LEN]);
    let mut iov = vector_mut(bytes);
    let mut message = message(name_room(&mut name), &mut iov, &mut control, CONTROL_LEN);
    // SAFETY: name, vector, payload and control are writable and outlive the call.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let Ok(len) = usize::try_from(len) else {
        let error = io::Error::last_os_error();
        let nothing = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR));
        return if nothing { Ok(None) } else { Err(error) };
    };
    let from = parse_name(&name).ok_or(io::ErrorKind::InvalidData)?;
    let filled = message.msg_controllen.min(CONTROL_LEN);
    Ok(Some(Received {
        len,
        from,
        ancillary: parse_control(&control.0[..filled]),
        truncated: message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
    }))
}

/// True for errors of a receive that no later one will be without: the descriptor is closed, or
/// something else now. Nothing that others send may look like it.
pub(crate) fn is_final(errno: i32) -> bool {
    matches!(errno, libc::EBADF | libc::ENOTSOCK)
}

/// True for errors of a send that naming another source, or none, may cure: the address is no
/// longer ours, or its interface is gone.
pub(crate) fn source_refused(errno: i32) -> bool {
    matches!(
        errno,
        libc::EINVAL
            | libc::EADDRNOTAVAIL
            | libc::ENETUNREACH
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::ENODEV
    )
}

/// Room for up to `COUNT` datagrams of up to `LEN` bytes, for [`receive_many`].
pub(crate) struct Many<const COUNT: usize, const LEN: usize> {
    names: [[u8; NAME_LEN]; COUNT],
    bytes: [[u8; LEN]; COUNT],
    controls: [Control; COUNT],
    /// Bytes of payload and of control messages.
    lens: [(usize, usize); COUNT],
    count: usize,
}

impl<const COUNT: usize, const LEN: usize> Many<COUNT, LEN> {
    pub(crate) fn new() -> Box<Many<COUNT, LEN>> {
        Box::new(Many {
            names: [[0; NAME_LEN]; COUNT],
            bytes: [[0; LEN]; COUNT],
            controls: [Control([0; CONTROL_LEN]); COUNT],
            lens: [(0, 0); COUNT],
            count: 0,
        })
    }

    /// What the last call received: from whom, where it arrived if the socket says so, and the
    /// datagram, cut to `LEN`.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (SocketAddr, Option<Local>, &[u8])> {
        (0..self.count).filter_map(|i| {
            let (len, control) = self.lens[i];
            let local = parse_control(&self.controls[i].0[..control]).local;
            Some((parse_name(&self.names[i])?, local, &self.bytes[i][..len]))
        })
    }
}

/// Receives what waits on a socket, up to the room there is, with one system call and without
/// waiting. Returns how many datagrams came.
///
/// # Errors
/// Those that are [final](is_final).
pub(crate) fn receive_many<const COUNT: usize, const LEN: usize>(
    fd: BorrowedFd<'_>,
    many: &mut Many<COUNT, LEN>,
) -> io::Result<usize> {
    let Many {
        names,
        bytes,
        controls,
        lens,
        count,
    } = many;
    let mut iovs: ArrayVec<libc::iovec, COUNT> =
        bytes.iter_mut().map(|bytes| vector_mut(bytes)).collect();
    let mut messages: ArrayVec<libc::mmsghdr, COUNT> = iovs
        .iter_mut()
        .zip(names)
        .zip(controls)
        .map(|((iov, name), control)| {
            one_of_many(message(name_room(name), iov, control, CONTROL_LEN))
        })
        .collect();
    let room = libc::c_uint::try_from(COUNT).map_err(io::Error::other)?;
    let (first, flags) = (messages.as_mut_ptr(), libc::MSG_DONTWAIT);
    let no_timeout = std::ptr::null_mut();
    // SAFETY: there are `COUNT` messages; names, vectors, buffers and controls are writable and
    // outlive the call.
    let received = unsafe { libc::recvmmsg(fd.as_raw_fd(), first, room, flags, no_timeout) };
    if received < 0 && is_final(errno()) {
        *count = 0;
        return Err(io::Error::last_os_error());
    }
    // Another error is one the socket has kept for us, or there is nothing.
    *count = usize::try_from(received).unwrap_or(0);
    for (lens, message) in lens.iter_mut().zip(&messages).take(*count) {
        let len = usize::try_from(message.msg_len).unwrap_or(LEN);
        let control = message.msg_hdr.msg_controllen;
        *lens = (len.min(LEN), control.min(CONTROL_LEN));
    }
    Ok(*count)
}

/// The calling thread's last error number.
pub(crate) fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Descriptors [`wait_readable`] takes at most.
const WAIT_MAX: usize = 12;

/// Waits until one of `fds` (the first twelve) is readable, or `timeout_ms` has passed (-1: no limit).
///
/// # Errors
/// The system refuses to wait, or one of them is no descriptor.
pub(crate) fn wait_readable(fds: &[RawFd], timeout_ms: i32) -> io::Result<()> {
    let mut polls = [libc::pollfd {
        fd: -1,
        events: libc::POLLIN,
        revents: 0,
    }; WAIT_MAX];
    for (poll, fd) in polls.iter_mut().zip(fds) {
        poll.fd = *fd;
    }
    // SAFETY: `polls` is a valid array for the length of the call; entries with fd -1 are skipped.
    let found = unsafe { libc::poll(polls.as_mut_ptr(), WAIT_MAX as libc::nfds_t, timeout_ms) };
    if found < 0 {
        let error = io::Error::last_os_error();
        let interrupted = error.kind() == io::ErrorKind::Interrupted;
        return if interrupted { Ok(()) } else { Err(error) };
    }
    if polls.iter().any(|poll| poll.revents & libc::POLLNVAL != 0) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    fn pair(ip: &str) -> (UdpSocket, UdpSocket) {
        let a = UdpSocket::bind((ip, 0)).unwrap();
        let b = UdpSocket::bind((ip, 0)).unwrap();
        (a, b)
    }

    fn receive_soon(socket: &UdpSocket, bytes: &mut [u8]) -> Received {
        wait_readable(&[socket.as_raw_fd()], 2000).unwrap();
        receive(socket.as_fd(), bytes)
            .unwrap()
            .expect("sent on loopback")
    }

    #[test]
    fn replies_to_many_leave_together_and_one_that_cannot_holds_up_nobody() {
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver
            .set_read_timeout(Some(std::time::Duration::from_secs(2)))
            .unwrap();
        let to = receiver.local_addr().unwrap();
        let nowhere = "255.255.255.255:9".parse().unwrap();
        let datagrams: Vec<_> = (0..150u8)
            .map(|n| (Leave::to(if n % 10 == 3 { nowhere } else { to }), [n; 64]))
            .collect();
        assert_eq!(send_many(sender.as_fd(), &datagrams), 135);
        for n in (0..150).filter(|n| n % 10 != 3) {
            let mut bytes = [0; 100];
            assert_eq!(receiver.recv(&mut bytes).unwrap(), 64);
            assert_eq!(bytes[0], n);
        }
    }

    #[test]
    fn tos_and_source_travel_in_both_families() {
        for ip in ["127.0.0.1", "::1"] {
            let (a, b) = pair(ip);
            let to = b.local_addr().unwrap();
            tell_tos(b.as_fd(), to).unwrap();
            let leave = Leave {
                tos: 2,
                ..Leave::to(to)
            };
            send(a.as_fd(), &leave, b"hello", None).unwrap();
            let mut bytes = [0; 100];
            let got = receive_soon(&b, &mut bytes);
            assert_eq!(&bytes[..got.len], b"hello");
            assert_eq!(got.ancillary.stride_of(got.len), 5);
            assert_eq!(got.ancillary.stride_of(0), 1);
            assert_eq!(got.from, a.local_addr().unwrap());
            assert_eq!(got.ancillary.tos, 2, "{ip}");
            assert!(!got.truncated);
            assert!(receive(b.as_fd(), &mut bytes).unwrap().is_none());
        }
    }

    #[test]
    fn a_segmented_send_arrives_as_one_batch_with_its_stride() {
        let (a, b) = pair("127.0.0.1");
        set_int(b.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1).unwrap();
        let payload: Vec<u8> = (0..250u8).collect();
        let leave = Leave::to(b.local_addr().unwrap());
        send(a.as_fd(), &leave, &payload, Some(100)).unwrap();
        let mut bytes = [0; 1000];
        let got = receive_soon(&b, &mut bytes);
        assert_eq!((got.len, got.ancillary.stride), (250, 100));
        assert_eq!(got.ancillary.stride_of(got.len), 100);
        assert_eq!(bytes[..250], payload);
    }

    #[test]
    fn single_sends_arrive_singly_and_in_order() {
        let (a, b) = pair("127.0.0.1");
        let payload = vec![9u8; 100 * 70 + 30];
        let (sent, error) = send_each(
            a.as_fd(),
            &Leave::to(b.local_addr().unwrap()),
            &payload,
            100,
        );
        assert_eq!((sent, error), (71, None));
        let mut bytes = [0; 1000];
        for i in 0..71 {
            let got = receive_soon(&b, &mut bytes);
            assert_eq!(got.len, if i == 70 { 30 } else { 100 });
        }
    }

    #[test]
    fn many_are_received_at_once_with_their_senders() {
        for ip in ["127.0.0.1", "::1"] {
            let (a, b) = pair(ip);
            let c = UdpSocket::bind((ip, 0)).unwrap();
            let to = b.local_addr().unwrap();
            tell_local(b.as_fd(), to).unwrap();
            let mut many = Many::<4, 10>::new();
            assert_eq!(receive_many(b.as_fd(), &mut many).unwrap(), 0);
            let sent: [(&UdpSocket, &[u8]); 6] = [
                (&a, b"one"),
                (&c, b"two"),
                (&a, b""),
                (&c, b"longer than ten"),
                (&a, b"five"),
                (&c, b"six"),
            ];
            for (socket, bytes) in sent {
                send(socket.as_fd(), &Leave::to(to), bytes, None).unwrap();
            }
            let mut got = Vec::new();
            while got.len() < 6 {
                wait_readable(&[b.as_raw_fd()], 2000).unwrap();
                let count = receive_many(b.as_fd(), &mut many).unwrap();
                assert!((1..=4).contains(&count), "{count}");
                for (from, local, bytes) in many.iter() {
                    assert_eq!(local.unwrap().addr, to.ip());
                    got.push((from, bytes.to_vec()));
                }
            }
            for ((socket, bytes), (from, seen)) in sent.iter().zip(&got) {
                assert_eq!(socket.local_addr().unwrap(), *from);
                assert_eq!(&bytes[..bytes.len().min(10)], seen);
            }
        }
    }

    #[test]
    fn a_refused_send_tells_its_errno() {
        let a = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = a.local_addr().unwrap();
        let payload = vec![0u8; 129 * 10];
        assert_eq!(
            send(a.as_fd(), &Leave::to(to), &payload, Some(10)),
            Err(libc::EINVAL)
        );
        assert_eq!(
            send(a.as_fd(), &Leave::to(to), &vec![0; 65508], None),
            Err(libc::EMSGSIZE)
        );
    }

    #[test]
    fn an_answer_leaves_from_where_the_question_arrived() {
        for (any, local, other) in [
            ("0.0.0.0:0", "127.0.0.7", "127.0.0.1:0"),
            ("[::]:0", "::1", "[::1]:0"),
        ] {
            let server = UdpSocket::bind(any).unwrap();
            let at = server.local_addr().unwrap();
            tell_local(server.as_fd(), at).unwrap();
            let client = UdpSocket::bind(other).unwrap();
            let port = at.port();
            let local: IpAddr = local.parse().unwrap();
            client.send_to(b"?", (local, port)).unwrap();
            let mut bytes = [0; 10];
            let question = receive_soon(&server, &mut bytes);
            let arrived = question.ancillary.local.unwrap();
            assert_eq!(arrived.addr, local);
            assert!(arrived.interface > 0, "loopback has a number");
            let leave = Leave {
                local: Some(arrived),
                ..Leave::to(question.from)
            };
            send(server.as_fd(), &leave, b"!", None).unwrap();
            let answer = receive_soon(&client, &mut bytes);
            assert_eq!(answer.from, SocketAddr::new(local, port));
        }
    }

    #[test]
    fn a_source_that_is_not_ours_is_refused() {
        let a = UdpSocket::bind("0.0.0.0:0").unwrap();
        let leave = Leave {
            local: Some(Local {
                addr: "192.0.2.77".parse().unwrap(),
                interface: 1,
            }),
            ..Leave::to("127.0.0.1:9".parse().unwrap())
        };
        let error = send(a.as_fd(), &leave, b"!", None).unwrap_err();
        assert!(source_refused(error), "{error}");
    }

    #[test]
    fn broken_control_messages_are_ignored() {
        for len in [0usize, 1, 15, 17, usize::MAX] {
            let mut control = [0u8; 24];
            control[..8].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(parse_control(&control), Ancillary::default());
        }
        assert_eq!(parse_name(&[2]), None);
        assert_eq!(parse_name(&[10, 0, 1, 1]), None);
    }
}
