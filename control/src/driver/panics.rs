//! Panics as something to wait for.
//!
//! A panic is a broken invariant of ours. The runtime keeps one in a task to itself, and what the task
//! did, such as answering a socket or following the interface, nobody does any more. So whoever runs a
//! node or a device waits for the first panic of any thread or task, and ends.

use std::panic::PanicHookInfo;
use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;

/// The first panic of the process, if there is one.
#[derive(Clone, Default)]
pub struct Panics(Arc<First>);

#[derive(Default)]
struct First {
    words: OnceLock<String>,
    there: Notify,
}

impl Panics {
    /// Watches from now on. What panics says so on standard error as before.
    pub fn watch() -> Self {
        let panics = Self::default();
        let (seen, before) = (panics.clone(), std::panic::take_hook());
        std::panic::set_hook(Box::new(move |info| {
            before(info);
            seen.note(info);
        }));
        panics
    }

    fn note(&self, info: &PanicHookInfo<'_>) {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("a thread");
        // Place and message, on one line: it will be the last one.
        let what = info.to_string().replace('\n', " ");
        // A later one may be a consequence.
        let _ = self.0.words.set(format!("{thread} {what}"));
        self.0.there.notify_one();
    }

    /// Waits for the first panic, and gives its words. For one who waits.
    pub async fn first(&self) -> &str {
        loop {
            if let Some(words) = self.0.words.get() {
                return words;
            }
            self.0.there.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(flavor = "local")]
    async fn a_panic_in_a_task_or_a_thread_is_noticed() {
        for in_thread in [false, true] {
            let panics = Panics::watch();
            let none = tokio::time::timeout(Duration::from_millis(20), panics.first());
            assert!(none.await.is_err(), "there was none");
            if in_thread {
                std::thread::spawn(|| panic!("told by {}", "a test"));
            } else {
                tokio::task::spawn_local(async { panic!("told by {}", "a test") });
            }
            let words = tokio::time::timeout(Duration::from_secs(10), panics.first());
            let words = words.await.unwrap();
            assert!(words.contains("panics.rs") && words.ends_with("told by a test"));
        }
    }
}
