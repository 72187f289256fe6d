//! How many descriptors this process may have open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit to what the administrator allows, as servers do: the lower one is for programs
/// that cannot count further than 1024.
pub fn raise_limit() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    if soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "the limit of open files stays");
    }
}

/// How many more may be opened.
pub fn left() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    usize::try_from(limit)
        .unwrap_or(usize::MAX)
        .saturating_sub(open)
}

/// Whether accepting failed for want of descriptors or of the memory behind them, and not because of
/// the connection that was to be accepted.
pub fn are_short(error: &std::io::Error) -> bool {
    use nix::errno::Errno;
    let short = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
    error
        .raw_os_error()
        .is_some_and(|code| short.contains(&Errno::from_raw(code)))
}
