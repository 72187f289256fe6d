//! The values under `/proc/sys/net` that say which interfaces forward.

use std::io;
use std::path::Path;

use crate::hostnet::WayBack;

const ROOT: &str = "/proc/sys";

/// The value that has an interface forward, by its path under `/proc/sys`.
pub(super) fn path(name: &str, v6: bool) -> String {
    if v6 {
        format!("net/ipv6/conf/{name}/force_forwarding")
    } else {
        format!("net/ipv4/conf/{name}/forwarding")
    }
}

/// The command that sets it.
pub(super) fn command(name: &str, v6: bool) -> String {
    // sysctl(8) takes slashes for separators too, and a name of an interface may have dots.
    format!("sysctl -w {}=1", path(name, v6))
}

/// Whether all interfaces forward, also those that come later.
pub(super) fn all(v6: bool) -> bool {
    let family = if v6 { "ipv6" } else { "ipv4" };
    is_on(&format!("net/{family}/conf/all/forwarding")).unwrap_or(false)
}

/// Whether every interface has got its value by one write, and whoever wrote that means ours too. In IPv6 that is not
/// the value that has all interfaces forward.
pub(super) fn spread(v6: bool) -> bool {
    is_on(&path("all", v6)).unwrap_or(false)
}

/// Whether what comes in by an interface is forwarded.
///
/// # Errors
/// There is no such interface, or the kernel has no value for it alone (IPv6 before Linux 6.17).
pub(super) fn forwards(name: &str, v6: bool) -> io::Result<bool> {
    Ok(v6 && all(v6) || is_on(&path(name, v6))?)
}

fn is_on(path: &str) -> io::Result<bool> {
    let text = std::fs::read_to_string(Path::new(ROOT).join(path))?;
    Ok(text.trim() != "0")
}

/// The most that one of these interfaces asks of the senders of IPv4 packets: the larger of its value and that of all
/// counts.
pub(super) fn way_back<'a>(names: impl Iterator<Item = &'a str>) -> WayBack {
    let value = |name: &str| {
        let path = format!("{ROOT}/net/ipv4/conf/{name}/rp_filter");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0_u8)
    };
    let all = value("all");
    let asks = |name| match all.max(value(name)) {
        0 => WayBack::Unasked,
        1 => WayBack::Same,
        _ => WayBack::Any,
    };
    names.map(asks).max().unwrap_or_default()
}

/// Switches an interface.
///
/// # Errors
/// `/proc/sys` is read-only, as in containers, or we have no right to.
pub(super) fn switch(path: &str, on: bool) -> io::Result<()> {
    std::fs::write(Path::new(ROOT).join(path), if on { "1" } else { "0" })
}

/// Whether an interface has IPv6.
pub(super) fn has_ipv6(name: &str) -> bool {
    is_on(&format!("net/ipv6/conf/{name}/disable_ipv6")).is_ok_and(|disabled| !disabled)
}
