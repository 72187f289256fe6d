//! Network namespaces: entering one by name, and running a program inside one.

use anyhow::{Context, bail};
use std::os::fd::AsRawFd;
use std::process::Command;

/// Moves the calling thread into the named network namespace (as made by `ip netns add`).
///
/// # Errors
/// When the namespace does not exist or the caller is not root.
pub(crate) fn enter(name: &str) -> anyhow::Result<()> {
    let path = format!("/run/netns/{name}");
    let file = std::fs::File::open(&path).with_context(|| format!("no namespace {path}"))?;
    // SAFETY: setns reads no memory of ours; the descriptor is open for the whole call.
    let done = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    if done != 0 {
        bail!(
            "cannot enter namespace {name}: {}",
            std::io::Error::last_os_error()
        );
    }
    Ok(())
}

/// A command that runs `program` in a namespace (here, when there is none), pinned to one CPU when
/// one is given.
pub(crate) fn command(ns: Option<&str>, cpu: Option<u32>, program: &str) -> Command {
    let mut words: Vec<String> = Vec::new();
    if let Some(ns) = ns {
        words.extend(["ip", "netns", "exec", ns].map(String::from));
    }
    if let Some(cpu) = cpu {
        words.extend(["taskset".into(), "-c".into(), cpu.to_string()]);
    }
    words.push(program.into());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_wrapped_by_namespace_and_cpu_in_that_order() {
        let made = command(Some("rt_a"), Some(1), "iperf3");
        assert_eq!(made.get_program(), "ip");
        let args: Vec<_> = made.get_args().collect();
        assert_eq!(
            args,
            ["netns", "exec", "rt_a", "taskset", "-c", "1", "iperf3"]
        );
        assert_eq!(command(None, None, "iperf3").get_program(), "iperf3");
    }
}
