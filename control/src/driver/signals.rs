//! What the operating system tells a running program to do.
//!
//! SIGTERM and SIGINT end it tidily. SIGHUP means "read your files again", as to every daemon, also
//! where there is none to read: whoever closes a terminal or sends it to all daemons of a host must
//! not take the network away. SIGUSR1 and SIGUSR2, whose default is to kill, mean nothing.
//!
//! They are blocked first of all, before there is anything that must not be left behind, such as a
//! socket's file. Threads inherit that, so a signal waits, however early it comes, until somebody
//! looks.

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::unix::AsyncFd;

use super::runtime;

/// The signals that mean something to us, if only that they do not kill.
const SIGNALS: [Signal; 5] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// End; by the signal of this name.
    End(&'static str),
    /// Read files again.
    ReadAgain,
}

/// Signals that nobody listens for yet.
#[derive(Debug)]
pub struct Blocked(SignalFd);

impl Blocked {
    /// Blocks the signals in the calling thread and in those it starts from now on: there must be no
    /// others yet. Children start without (`std::process` sees to it).
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn new() -> anyhow::Result<Self> {
        let set: SigSet = SIGNALS.into_iter().collect();
        set.thread_block().context("cannot block signals")?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let fd = SignalFd::with_flags(&set, flags).context("cannot listen for signals")?;
        Ok(Self(fd))
    }

    /// Listens, inside a runtime.
    ///
    /// # Errors
    /// The runtime cannot watch another descriptor.
    pub fn listen(self) -> anyhow::Result<Signals> {
        Ok(Signals(runtime::watch_descriptor(self.0)?))
    }
}

/// Signals that somebody listens for.
#[derive(Debug)]
pub struct Signals(AsyncFd<SignalFd>);

impl Signals {
    /// The next wish. Dropping the future loses none.
    ///
    /// # Errors
    /// The descriptor cannot be read.
    pub async fn next(&self) -> anyhow::Result<Told> {
        loop {
            let mut ready = self.0.readable().await?;
            let Some(found) = self.0.get_ref().read_signal()? else {
                ready.clear_ready();
                continue;
            };
            let signal = Signal::try_from(i32::try_from(found.ssi_signo)?)?;
            if matches!(signal, Signal::SIGTERM | Signal::SIGINT) {
                return Ok(Told::End(signal.as_str()));
            }
            if signal == Signal::SIGHUP {
                return Ok(Told::ReadAgain);
            }
            tracing::info!("{signal} means nothing here");
        }
    }

    /// The next wish to end, for a program that has nothing to read again.
    ///
    /// # Errors
    /// As for [`Signals::next`].
    pub async fn end(&self) -> anyhow::Result<&'static str> {
        loop {
            match self.next().await? {
                Told::End(signal) => return Ok(signal),
                Told::ReadAgain => tracing::info!("SIGHUP: there is nothing to read again"),
            }
        }
    }
}
