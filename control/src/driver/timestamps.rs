//! The time that handshakes may have carried, kept over restarts.
//!
//! A peer takes no initiation whose timestamp is not newer than the last it saw of us. Where the
//! machine comes up with its clock behind (no battery, a restored image), every one of ours would be
//! refused until the clock is right. So a file says how far our wall clock may have come, in whole
//! seconds and ahead of it, and the next run's begins there ([`ringtail_dataplane::steady_wall`]).
//!
//! The file is written ahead so that it need not be for every handshake: by [`LEAD_MIN`] at first, by
//! more the longer the process runs, since whatever it is ahead when the process is killed, the
//! next run begins ahead. A process that ends by itself leaves its time as it is.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::clock::now;
use super::files::{self, Readers};
use ringtail_dataplane::{steady_wall, steady_wall_at_least};

/// The file is ahead of our wall clock by this, and by the time the process has run, at most by
/// [`LEAD_MAX`].
const LEAD_MIN: Duration = Duration::from_secs(4);
const LEAD_MAX: Duration = Duration::from_secs(300);
/// After a failure it is written again so much later.
const RETRY: Duration = Duration::from_secs(10);
/// A clock that is behind by more than what the file may be ahead is worth a word.
const BEHIND: Duration = LEAD_MAX.saturating_mul(2);
/// Seconds since 1970 that no clock of ours reaches, the year 2500: the file is damaged.
const SECS_MAX: u64 = 16_725_225_600;

/// The file, and when it is to be written again.
#[derive(Debug)]
pub(super) struct Timestamps {
    path: PathBuf,
    started: Instant,
    due: Instant,
    failing: bool,
}

impl Timestamps {
    /// Takes up the time of the run before, and says how far this run may come. To be called before
    /// any handshake.
    pub(super) fn open(path: PathBuf) -> Self {
        let mut timestamps = Self::take_up(path);
        timestamps.renew();
        timestamps
    }

    /// The same where that is worth nothing unless the file can be written.
    ///
    /// # Errors
    /// When it cannot.
    pub(super) fn open_writable(path: PathBuf) -> anyhow::Result<Self> {
        let mut timestamps = Self::take_up(path);
        timestamps.try_renew()?;
        Ok(timestamps)
    }

    fn take_up(path: PathBuf) -> Self {
        let system = steady_wall();
        if let Some(known) = read(&path) {
            steady_wall_at_least(known);
            if system + BEHIND < known {
                tracing::warn!(
                    behind = ?known - system,
                    "the clock is behind the time of the last run: handshakes go on from there"
                );
            }
        }
        Self {
            path,
            started: now(),
            due: now(),
            failing: false,
        }
    }

    /// When [`Self::renew`] is wanted.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Writes the file anew. What goes wrong is logged once: handshakes matter more.
    pub(super) fn renew(&mut self) {
        let failed = self.try_renew().err();
        if let (Some(error), false) = (&failed, self.failing) {
            tracing::warn!(
                error = format!("{error:#}"),
                "after a restart with the clock behind, handshakes may be refused"
            );
        }
        self.failing = failed.is_some();
    }

    fn try_renew(&mut self) -> anyhow::Result<()> {
        let now = now();
        let lead = (LEAD_MIN + (now - self.started)).min(LEAD_MAX);
        let written = self.write(lead);
        self.due = now + if written.is_ok() { lead / 2 } else { RETRY };
        written
    }

    /// Leaves the time for the next run. Where that fails, what is there is only further ahead.
    pub(super) fn close(self) {
        if let Err(error) = self.write(Duration::ZERO) {
            tracing::debug!(error = format!("{error:#}"), "the time stays ahead");
        }
    }

    fn write(&self, lead: Duration) -> anyhow::Result<()> {
        let text = format!("{}\n", (steady_wall() + lead).as_secs() + 1);
        files::write(&self.path, text.as_bytes())
    }
}

/// The time in the file since 1970; nothing if there is none, it is damaged, or others may have set it:
/// a time far ahead would have every later handshake refused.
fn read(path: &Path) -> Option<Duration> {
    let text = files::read(path, Readers::Anybody).unwrap_or_else(|error| {
        tracing::warn!(
            error = format!("{error:#}"),
            "the time of the last run is left aside"
        );
        None
    })?;
    let text = String::from_utf8_lossy(&text);
    let secs = text.trim().parse().ok().filter(|secs| *secs < SECS_MAX);
    if secs.is_none() {
        tracing::warn!(file = %path.display(), "no time can be read from it: left aside");
    }
    secs.map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn stored(path: &Path) -> Duration {
        read(path).unwrap()
    }

    #[test]
    fn the_next_run_begins_behind_everything_that_this_one_may_have_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("timestamp");
        let before = steady_wall();
        let mut timestamps = Timestamps::open(path.clone());
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let ahead = stored(&path);
        assert!(
            ahead > before + LEAD_MIN && ahead < steady_wall() + LEAD_MIN + Duration::from_secs(2)
        );
        assert!(timestamps.due() <= now() + LEAD_MIN);
        // After an hour.
        timestamps.started = now()
            .checked_sub(Duration::from_secs(3600))
            .unwrap_or_else(now);
        timestamps.renew();
        assert!(stored(&path) > ahead);
        timestamps.close();
        assert!(stored(&path) <= steady_wall() + Duration::from_secs(1));
    }

    #[test]
    fn a_damaged_file_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("timestamp");
        for text in ["", "yesterday", "-5", "99999999999999999999", "16725225600"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read(&path), None, "{text}");
        }
        std::fs::write(&path, "1700000000\n").unwrap();
        assert_eq!(read(&path), Some(Duration::from_secs(1_700_000_000)));
    }
}
