//! The data plane's threads: none of them ends by itself without a word.
//!
//! A shard that is gone leaves its sockets in the reuse-port group, so that what the kernel steers to
//! them is lost, and its sessions with nobody. There is no going on without it: whoever runs the data
//! plane is told ([`Event::Failed`]), and is to end, and be started anew.
//!
//! [`Event::Failed`]: crate::Event::Failed

#![forbid(unsafe_code)]

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::hub::Hub;

/// Starts a thread. A body that fails or panics is told of through the hub; one that returns `Ok` was
/// asked to end, or has told of its failure in another way.
///
/// # Errors
/// The system has no more threads.
pub(crate) fn spawn(
    hub: &Arc<Hub>,
    name: &str,
    body: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (hub, thread) = (Arc::clone(hub), name.to_owned());
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        // What the body leaves behind is not looked at again, but for the hub, whose queues are whole
        // at any time.
        let why = match catch_unwind(AssertUnwindSafe(body)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("it panicked: {}", words(&*panic)),
        };
        tracing::error!(thread, why, "a thread of the data plane failed");
        hub.outbox.failed(format!("{thread}: {why}"));
    })
}

/// What a panic says.
fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no words")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Event;

    fn hub() -> Arc<Hub> {
        Arc::new(Hub::new(crate::sys::now(), 1).unwrap())
    }

    #[test]
    fn a_thread_that_fails_or_panics_is_told_of_though_the_queue_of_events_is_full() {
        type Body = fn() -> io::Result<()>;
        let bodies: [(Body, &str); 3] = [
            (|| Err(io::Error::other("no ring")), "rt-x: no ring"),
            (|| panic!("at {}", 7), "rt-x: it panicked: at 7"),
            (|| panic!("plainly"), "rt-x: it panicked: plainly"),
        ];
        for (body, words) in bodies {
            let hub = hub();
            while hub.outbox.events_lost() == 0 {
                hub.outbox.event(Event::TunGone);
            }
            spawn(&hub, "rt-x", body).unwrap().join().unwrap();
            let first = hub.outbox.poll_event();
            assert_eq!(first, Some(Event::Failed(words.to_owned())));
            assert_eq!(hub.outbox.poll_event(), Some(Event::TunGone));
        }
    }

    #[test]
    fn a_thread_that_was_asked_to_end_is_not_told_of() {
        let hub = hub();
        spawn(&hub, "rt-x", || Ok(())).unwrap().join().unwrap();
        assert_eq!(hub.outbox.poll_event(), None);
    }
}
