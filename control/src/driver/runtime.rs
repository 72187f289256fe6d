//! The control thread's runtime: tokio-uring, or tokio's own where io_uring is forbidden or of no use.
//!
//! tokio's sockets and timers work inside tokio-uring's runtime, so nothing above this file needs
//! to know which of the two runs; who owns a stream asks [`Kind`] for the transport to use.

use std::future::Future;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::Context as _;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Which runtime is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// tokio-uring: streams may use owned-buffer reads and writes.
    Uring,
    /// tokio's current-thread runtime.
    Tokio,
}

/// Runs the future to its end on this thread, on tokio's runtime; tasks spawned locally run beside it.
///
/// # Errors
/// When the runtime does not start, or the future fails.
pub fn block_on<F>(make: impl FnOnce(Kind) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the control thread's runtime")?;
    tokio::task::LocalSet::new().block_on(&runtime, make(Kind::Tokio))
}

/// The same on tokio-uring's, if that starts: where io_uring has been tried already and works, for a
/// sandbox may let a ring be made and not be used.
///
/// # Errors
/// As for [`block_on`].
pub fn block_on_uring<F>(make: impl FnOnce(Kind) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    match tokio_uring::Runtime::new(&tokio_uring::builder()) {
        // tokio-uring's runtime brings its own LocalSet.
        Ok(runtime) => runtime.block_on(make(Kind::Uring)),
        Err(error) => {
            tracing::debug!(%error, "io_uring is not to be had here: the control thread uses epoll");
            block_on(make)
        }
    }
}

/// Waits for a descriptor of ours to be readable.
#[expect(
    deprecated,
    reason = "the caveat is about types that lend their descriptor; ours own it"
)]
pub(super) fn watch_descriptor<T: AsFd + AsRawFd + 'static>(fd: T) -> std::io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_tasks_and_timers_run_on_both() {
        async fn run() -> anyhow::Result<()> {
            let task = tokio::task::spawn_local(async {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                7
            });
            anyhow::ensure!(task.await? == 7);
            Ok(())
        }
        block_on(|_| run()).unwrap();
        block_on_uring(|_| run()).unwrap();
    }
}
