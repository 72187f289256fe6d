//! resolvconf(8), by its command: Debian's, or openresolv.
//!
//! Ours is one record among those of the interfaces. openresolv is told that it is the only one that
//! counts; Debian's puts a record whose name begins with `tun` before those of network cards, and keeps
//! the others behind it.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::config::AuthKey;
use crate::dns::host::Flavour;

const NAME: &str = "resolvconf";
/// Where it is looked for besides `PATH`.
const FOLDERS: &str = "/sbin:/usr/sbin:/bin:/usr/bin";
/// It may take so long; its hooks tell daemons.
const RUN_WAIT: Duration = Duration::from_secs(5);
const RUN_POLL: Duration = Duration::from_millis(10);

/// The name of our record; both kinds take it.
pub(super) fn record(tun: &str) -> String {
    format!("tun-{tun}.ringtail")
}

/// Which one can be run, if any.
pub(super) fn flavour() -> Option<Flavour> {
    let program = program()?;
    // systemd's own stand-in: there is systemd-resolved to be asked.
    if std::fs::canonicalize(&program).is_ok_and(|path| path.ends_with("resolvectl")) {
        return None;
    }
    let told = run(&["--version"], "");
    // Old ones of Debian do not know the option.
    let debian = told.map_or(true, |told| told.starts_with("Debian"));
    Some(if debian {
        Flavour::Debian
    } else {
        Flavour::Openresolv
    })
}

/// Adds or replaces our record.
///
/// # Errors
/// It cannot be run, or fails.
pub(super) fn set(flavour: Flavour, record: &str, text: &str) -> io::Result<()> {
    let arguments: &[&str] = match flavour {
        Flavour::Debian => &["-a", record],
        Flavour::Openresolv => &["-m", "0", "-x", "-a", record],
    };
    run(arguments, text).map(drop)
}

/// Removes our record.
///
/// # Errors
/// It cannot be run, or fails.
pub(super) fn remove(record: &str) -> io::Result<()> {
    match flavour() {
        Some(Flavour::Debian) => run(&["-d", record], "").map(drop),
        // Without it is no error then.
        Some(Flavour::Openresolv) => run(&["-f", "-d", record], "").map(drop),
        None => Ok(()),
    }
}

/// All records, ours among them.
pub(super) fn records() -> String {
    run(&["-l"], "").unwrap_or_default()
}

fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(&path).chain(std::env::split_paths(FOLDERS));
    folders.find_map(|folder| Some(folder.join(NAME)).filter(|program| program.is_file()))
}

/// Runs it with `input` and gives what it says.
#[expect(
    clippy::disallowed_methods,
    reason = "a driver: the thread of the resolver has nothing else to do meanwhile"
)]
fn run(arguments: &[&str], input: &str) -> io::Result<String> {
    let program = program().ok_or(io::ErrorKind::NotFound)?;
    // Files in the place of pipes: however much it says, and whoever of its children keeps them open, nobody waits.
    let mut said = tempfile::tempfile()?;
    let mut given = tempfile::tempfile()?;
    given.write_all(input.as_bytes())?;
    io::Seek::rewind(&mut given)?;
    let mut child = Command::new(program)
        .env_remove(AuthKey::VARIABLE)
        .args(arguments)
        .stdin(given)
        .stdout(said.try_clone()?)
        .stderr(Stdio::null())
        .spawn()?;
    let mut waited = Duration::ZERO;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if waited > RUN_WAIT {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::other(format!("{NAME} does not end")));
        }
        std::thread::sleep(RUN_POLL);
        waited += RUN_POLL;
    };
    if !status.success() {
        let shown = arguments.join(" ");
        return Err(io::Error::other(format!("{NAME} {shown} failed: {status}")));
    }
    io::Seek::rewind(&mut said)?;
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(said, 1 << 20), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
