//! Files that are ours alone: keys, caches, databases. Everything that writes or trusts one goes
//! through here.
//!
//! A file is replaced whole: written under a name nobody can guess that did not exist before (so no
//! link of anybody's is followed), synced, renamed, and the directory synced, so that after a power
//! cut there is the old text or the new one. One that is read is looked at first, by its open
//! descriptor: only a regular file, and of ours or root's. Whoever can write a file of ours could put
//! anything there, so that is refused. Who could read a secret may have done so, and only a person
//! can say whether the key has to go: refused too, as ssh does.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::geteuid;
use zeroize::Zeroizing;

/// Largest file read back, in bytes: a network map of 10,000 nodes is a few MB.
const LEN_MAX: u64 = 64 << 20;
/// Looks at a lock that another has.
const LOCK_PERIOD: Duration = Duration::from_millis(10);
/// What others than the owner may do, and what of it is writing.
const OTHERS: u32 = 0o077;
const OTHERS_WRITE: u32 = 0o022;

/// Who may read a file besides its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Nobody: it holds secrets.
    Nobody,
    /// It would do no harm.
    Anybody,
}

/// Reads a whole file of ours into memory that is wiped; `None` when there is none.
///
/// # Errors
/// It is no regular file, is another's, others may write it (or read it, where nobody may), is too
/// long, or cannot be read.
pub fn read(path: &Path, readers: Readers) -> anyhow::Result<Option<Zeroizing<Vec<u8>>>> {
    let cannot = || format!("cannot read {}", path.display());
    // Without waiting: a pipe that nobody writes to would be waited for at its opening.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(cannot),
    };
    check(path, &file, readers)?;
    // The whole length at once: a growing buffer would leave copies of secrets behind.
    let len = file.metadata().with_context(cannot)?.len();
    if len > LEN_MAX {
        bail!("{} is too long: {len} bytes", path.display());
    }
    let mut text = Zeroizing::new(Vec::with_capacity(usize::try_from(len)? + 1));
    file.take(LEN_MAX)
        .read_to_end(&mut text)
        .with_context(cannot)?;
    Ok(Some(text))
}

/// Replaces a file whole, with mode 0600: a reader sees the old or the new text, never a part.
///
/// # Errors
/// When the folder does not take the file, or something else than a file has its name.
pub fn write(path: &Path, text: &[u8]) -> anyhow::Result<()> {
    let folder = folder_of(path);
    let write = || -> io::Result<()> {
        // A link is replaced, not followed; a directory refuses by itself.
        let there = std::fs::symlink_metadata(path).map(|there| there.file_type());
        if there.is_ok_and(|there| !there.is_file() && !there.is_symlink()) {
            return Err(io::Error::other("what is there is no file"));
        }
        // Made anew (O_EXCL) with mode 0600, and gone with an error.
        let mut beside = tempfile::Builder::new()
            .prefix(".ringtail-")
            .suffix(".new")
            .tempfile_in(&folder)?;
        beside.write_all(text)?;
        beside.as_file().sync_all()?;
        beside.persist(path).map_err(|error| error.error)?;
        match File::open(&folder)?.sync_all() {
            // Some file systems cannot sync a directory. What is written is there all the same.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Reads an auth key that a person named. It may be a pipe, and it may be open to everybody if he wants it
/// so: the log says that.
///
/// # Errors
/// It cannot be read, or is no text.
pub fn read_auth_key(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    let text = std::fs::read_to_string(path).map(Zeroizing::new);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    if is_open_to_all(path) {
        tracing::warn!(file = %path.display(), "every user of this host can read this auth key, and join with it");
    }
    Ok(Zeroizing::new(text.trim().to_owned()))
}

fn is_open_to_all(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.mode() & 0o007 != 0)
}

/// Opens a file of ours for writing where it is, making it (0600) when it is missing. One that others
/// may read or write is closed to them, and the log says so.
///
/// # Errors
/// It is a link or no regular file, is another's, or cannot be opened.
pub fn open(path: &Path) -> anyhow::Result<File> {
    let cannot = || format!("cannot open {}", path.display());
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(O_NOFOLLOW | O_NONBLOCK)
        .open(path)
        .with_context(cannot)?;
    let mode = file.metadata().with_context(cannot)?.mode();
    if mode & OTHERS != 0 {
        check_kind_and_owner(path, &file)?;
        tracing::warn!(file = %path.display(), "it was open to others: now it is not");
        fchmod(&file, Mode::from_bits_truncate(mode & 0o700)).with_context(cannot)?;
    }
    check(path, &file, Readers::Nobody)?;
    Ok(file)
}

/// Locks a file of ours, for which it waits so long; `None` when another process still has it locked then. It is
/// looked at each 10 ms.
///
/// # Errors
/// The file is none of ours, or cannot be locked.
#[expect(
    clippy::disallowed_methods,
    reason = "a driver: it waits where nothing else runs"
)]
pub fn lock(path: &Path, wait: Duration) -> anyhow::Result<Option<Flock<File>>> {
    let mut file = open(path)?;
    let mut waited = Duration::ZERO;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(Some(locked)),
            Err((back, Errno::EWOULDBLOCK)) if waited < wait => file = back,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => {
                return Err(errno).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        std::thread::sleep(LOCK_PERIOD);
        waited += LOCK_PERIOD;
    }
}

/// Makes a directory of ours (0700) with what is missing above it, or takes one that is there. Others
/// may look into that, but not write: whoever can, could put files of his own in the place of ours.
///
/// # Errors
/// It cannot be made, is no directory, or belongs to another than us and root.
pub fn make_dir(path: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the state directory {}", path.display()))?;
    let cannot = || format!("cannot look at the directory {}", path.display());
    let dir = File::open(path).with_context(cannot)?;
    let found = dir.metadata().with_context(cannot)?;
    check_owner(path, found.uid())?;
    if found.mode() & OTHERS_WRITE != 0 {
        tracing::warn!(directory = %path.display(), "others could write there: now they cannot");
        let mode = Mode::from_bits_truncate(found.mode() & !OTHERS_WRITE & 0o7777);
        fchmod(&dir, mode).with_context(cannot)?;
    }
    Ok(())
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        Some(_) | None => PathBuf::from("."),
    }
}

fn check(path: &Path, file: &File, readers: Readers) -> anyhow::Result<()> {
    check_kind_and_owner(path, file)?;
    let mode = file.metadata()?.mode();
    let (forbidden, what) = match readers {
        Readers::Nobody => (OTHERS, "holds secrets and is open to others"),
        Readers::Anybody => (OTHERS_WRITE, "can be written by others"),
    };
    if mode & forbidden != 0 {
        let shown = path.display();
        bail!("{shown} {what}; run: chmod 600 {shown}");
    }
    Ok(())
}

fn check_kind_and_owner(path: &Path, file: &File) -> anyhow::Result<()> {
    let found = file
        .metadata()
        .with_context(|| format!("cannot look at {}", path.display()))?;
    if !found.is_file() {
        bail!("{} is no regular file", path.display());
    }
    check_owner(path, found.uid())
}

fn check_owner(path: &Path, owner: u32) -> anyhow::Result<()> {
    let ours = geteuid().as_raw();
    if owner != ours && owner != 0 {
        let shown = path.display();
        bail!("{shown} belongs to another user ({owner}); run: chown {ours} {shown}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let name = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn error<T>(result: anyhow::Result<T>) -> String {
        format!("{:#}", result.err().unwrap())
    }

    #[test]
    fn a_link_under_any_name_beside_a_file_is_never_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("keys.json"), dir.path().join("victim"));
        std::fs::write(&victim, "theirs").unwrap();
        // The name an earlier version wrote under, which everybody could guess, and the file's own.
        let guessed = dir
            .path()
            .join(format!("keys.json.new{}", std::process::id()));
        symlink(&victim, &guessed).unwrap();
        symlink(&victim, &path).unwrap();
        write(&path, b"secret").unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"theirs");
        assert_eq!(std::fs::read(&path).unwrap(), b"secret");
        assert_eq!(mode(&path), 0o600);
        std::fs::remove_file(&guessed).unwrap();
        assert_eq!(
            names(dir.path()),
            ["keys.json", "victim"],
            "nothing is left over"
        );
    }

    #[test]
    fn what_cannot_be_replaced_stays_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("timestamp");
        std::fs::create_dir(&path).unwrap();
        let refused = error(write(&path, b"1"));
        assert!(
            refused.contains("timestamp: what is there is no file"),
            "{refused}"
        );
        assert_eq!(names(dir.path()), ["timestamp"]);
        assert!(write(&dir.path().join("missing/file"), b"1").is_err());
    }

    #[test]
    fn a_mode_that_was_too_open_is_mended_by_the_next_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("home.json");
        write(&path, b"1").unwrap();
        chmod(&path, 0o666);
        write(&path, b"2").unwrap();
        assert_eq!(mode(&path), 0o600);
        // A name without a folder is in the working directory, which is not looked for in vain.
        assert_eq!(folder_of(Path::new("auth-key")), Path::new("."));
    }

    #[test]
    fn only_files_that_others_cannot_have_written_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("netmap.json");
        assert!(read(&path, Readers::Nobody).unwrap().is_none());
        write(&path, b"map").unwrap();
        for (mode, secret, cache) in [
            (0o600, true, true),
            (0o400, true, true),
            (0o640, false, true),
            (0o604, false, true),
            (0o644, false, true),
            (0o620, false, false),
            (0o602, false, false),
        ] {
            chmod(&path, mode);
            for (readers, taken) in [(Readers::Nobody, secret), (Readers::Anybody, cache)] {
                let text = read(&path, readers);
                assert_eq!(text.is_ok(), taken, "{mode:o}");
                if let Ok(text) = text {
                    assert_eq!(text.unwrap().as_slice(), b"map");
                } else {
                    assert!(error(read(&path, readers)).contains("chmod 600"));
                }
            }
        }
    }

    #[test]
    fn an_auth_key_is_read_wherever_it_is_and_one_for_all_to_see_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth-key");
        std::fs::write(&path, "rtkey-1\n").unwrap();
        for (mode, open) in [(0o600, false), (0o640, false), (0o644, true), (0o602, true)] {
            chmod(&path, mode);
            assert_eq!(is_open_to_all(&path), open, "{mode:o}");
            assert_eq!(read_auth_key(&path).unwrap().as_str(), "rtkey-1");
        }
        assert!(!is_open_to_all(Path::new("/dev/null")));
        assert!(read_auth_key(&dir.path().join("missing")).is_err());
    }

    #[test]
    fn what_is_no_file_is_named_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::from_bits_truncate(0o600)).unwrap();
        assert!(error(read(&pipe, Readers::Nobody)).contains("no regular file"));
        assert!(error(read(dir.path(), Readers::Anybody)).contains("no regular file"));
        assert!(open(&pipe).is_err());
        assert!(error(write(&pipe, b"1")).contains("no file"));
    }

    #[test]
    fn a_file_is_opened_in_place_for_us_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("coord.db"), dir.path().join("link"));
        open(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        std::fs::write(&path, "rows").unwrap();
        chmod(&path, 0o664);
        open(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(std::fs::read(&path).unwrap(), b"rows");
        symlink(&path, &link).unwrap();
        assert!(open(&link).is_err());
    }

    #[test]
    fn a_directory_that_others_could_write_to_is_closed_to_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/state");
        make_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        chmod(&path, 0o777);
        make_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o755);
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(make_dir(&file).is_err());
    }

    #[test]
    fn what_belongs_to_another_user_is_not_ours() {
        if !geteuid().is_root() {
            println!("skipped: only root can give files away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        write(&path, b"key").unwrap();
        let theirs = Some(nix::unistd::Uid::from_raw(4242));
        nix::unistd::chown(&path, theirs, None).unwrap();
        for readers in [Readers::Nobody, Readers::Anybody] {
            assert!(error(read(&path, readers)).contains("another user (4242)"));
        }
        assert!(error(open(&path)).contains("chown 0"));
        nix::unistd::chown(dir.path(), theirs, None).unwrap();
        assert!(error(make_dir(dir.path())).contains("another user"));
    }
}
