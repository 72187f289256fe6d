//! What the operating system tells a running program to do.
//!
//! SIGTERM and SIGINT end it tidily. SIGHUP means "read your files again", as to every daemon, also
//! where there is none to read: whoever closes a terminal or sends it to all daemons of a host must
//! not take the network away. SIGUSR1 and SIGUSR2, whose default is to kill, mean nothing.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Listens from its making on: a signal that comes before [`Signals::next`] is not lost.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    user: [Signal; 2],
}

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// End; by the signal of this name.
    End(&'static str),
    /// Read files again.
    ReadAgain,
}

impl Signals {
    /// Takes the signals over from their defaults.
    ///
    /// # Errors
    /// The operating system refuses.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            user: [
                signal(SignalKind::user_defined1())?,
                signal(SignalKind::user_defined2())?,
            ],
        })
    }

    /// The next wish. Dropping the future loses none.
    pub async fn next(&mut self) -> Told {
        let [user1, user2] = &mut self.user;
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return Told::End("SIGTERM"),
                _ = self.interrupt.recv() => return Told::End("SIGINT"),
                _ = self.hang_up.recv() => return Told::ReadAgain,
                _ = user1.recv() => tracing::info!("SIGUSR1 means nothing here"),
                _ = user2.recv() => tracing::info!("SIGUSR2 means nothing here"),
            }
        }
    }

    /// The next wish to end, for a program that has nothing to read again.
    pub async fn end(&mut self) -> &'static str {
        loop {
            match self.next().await {
                Told::End(signal) => return signal,
                Told::ReadAgain => tracing::info!("SIGHUP: there is nothing to read again"),
            }
        }
    }
}
