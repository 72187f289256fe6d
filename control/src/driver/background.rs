//! Going to the background: this program starts itself again and waits for the child's word.
//!
//! A process with threads or rings cannot fork, and needs not: the parent has neither yet when it
//! calls [`start`]. The child's standard output is the pipe back: `ready`, or what went wrong. The
//! child calls [`Child::detach`] before anything else and [`Child::ready`] when whoever waits for
//! the parent may go on.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// Tells the child what it is.
const CHILD_VARIABLE: &str = "RINGTAIL_BACKGROUND_CHILD";
/// The child's word.
const READY: &str = "ready\n";
/// Longest complaint of a child in bytes.
const COMPLAINT_LEN_MAX: u64 = 64 << 10;

/// What only the child has.
pub struct Child(());

/// Starts this program again with the same arguments, in a session of its own, and returns once it
/// is ready.
///
/// # Errors
/// The child's complaint, if it ends before it is ready.
pub fn start(log: Stdio) -> anyhow::Result<()> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "ringtail".into());
    let program = std::env::current_exe().context("cannot find my own program")?;
    let mut child = Command::new(program)
        .arg0(name)
        .args(arguments)
        .env(CHILD_VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the background process")?;
    let stdout = child.stdout.take().context("the child has no output")?;
    let mut words = BufReader::new(stdout.take(COMPLAINT_LEN_MAX));
    let mut said = String::new();
    words.read_line(&mut said)?;
    if said == READY {
        return Ok(());
    }
    words.read_to_string(&mut said)?;
    let status = child.wait()?;
    let complaint = said.trim_end();
    if complaint.is_empty() {
        bail!("the background process ended at its start ({status}); -f shows more");
    }
    bail!("{complaint}")
}

impl Child {
    /// This process as a child, if it is one.
    pub fn this() -> Option<Self> {
        std::env::var_os(CHILD_VARIABLE).map(|_| Self(()))
    }

    /// Leaves the terminal and the working directory of whoever called.
    ///
    /// # Errors
    /// The system refuses.
    pub fn detach(&self) -> anyhow::Result<()> {
        rustix::process::setsid().context("cannot start a session")?;
        std::env::set_current_dir("/")?;
        Ok(())
    }

    /// Lets the parent end with success.
    ///
    /// # Errors
    /// The parent is gone.
    pub fn ready(self) -> anyhow::Result<()> {
        self.say(READY)
    }

    /// Lets the parent end with this complaint.
    ///
    /// # Errors
    /// The parent is gone.
    pub fn failed(self, error: &anyhow::Error) -> anyhow::Result<()> {
        self.say(&format!("{error:#}\n"))
    }

    fn say(self, text: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()?;
        let null = std::fs::File::options().write(true).open("/dev/null")?;
        nix::unistd::dup2_stdout(null)?;
        Ok(())
    }
}
