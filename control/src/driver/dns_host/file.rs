//! `/etc/resolv.conf` itself, where no program keeps it.
//!
//! Ours takes the place of what is there in one step (the two names are exchanged), so that at no time
//! there is none, and what was there waits beside it under another name as it is: file or link, with owner, mode
//! and inode. To go back is one rename. Where the name cannot be moved because something is mounted on it
//! (containers, `ip netns exec` with an `/etc/netns`), or the folder takes no file, a regular file is
//! written in place, from a copy in the state directory it is written back.
//!
//! The first line of our text names the TUN it is for: by it we know our own again, whatever else has
//! happened. What bears no such line is somebody else's, is never overwritten, and is what comes back.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};

use crate::dns::host::written_for;
use crate::driver::files::{self, Readers};

/// The file that programs read.
pub(super) const RESOLV_CONF: &str = "/etc/resolv.conf";
/// What a name of ours ends in while what was there waits under it.
const ASIDE: &str = ".before-ringtail";
/// The name that our text is written under, in the same folder, before it takes the place of what is there.
/// Always the same: what a killed one leaves there is found.
const NEW: &str = ".resolv.conf-ringtail";
/// Where `ip netns` keeps its networks, and how many of them are looked at.
const NETNS_DIR: &str = "/run/netns";
const NETNS_MAX: usize = 4096;
/// Tries to be the only ringtail at work there, and the time between them.
const LOCK_TRIES: u32 = 50;
const LOCK_PERIOD: Duration = Duration::from_millis(20);
/// Bytes read of it at most.
const LEN_MAX: u64 = 1 << 20;

/// One `resolv.conf`, and whose text we would write there.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Its name.
    pub(super) conf: PathBuf,
    /// Where the text of what cannot be moved is kept.
    pub(super) copy: PathBuf,
    /// The TUN that our text is for.
    pub(super) tun: String,
}

/// What stands under the name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum There {
    /// Nothing.
    Nothing,
    /// What we wrote.
    Ours(String),
    /// What another ringtail wrote for this TUN.
    Another(String),
    /// Somebody else's text, a link's target; empty if it leads nowhere or cannot be read.
    Theirs(Vec<u8>),
}

impl Place {
    /// Looks.
    pub(super) fn look(&self) -> There {
        match std::fs::symlink_metadata(&self.conf) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => There::Nothing,
            Err(_) => There::Theirs(Vec::new()),
            Ok(_) => {
                let bytes = read(&self.conf);
                let text = String::from_utf8_lossy(&bytes);
                match written_for(&text) {
                    Some(tun) if tun == self.tun => There::Ours(text.into_owned()),
                    Some(tun) => There::Another(tun.to_owned()),
                    None => There::Theirs(bytes),
                }
            }
        }
    }

    /// What is there without us, and where the link leads if it is one.
    pub(super) fn theirs(&self) -> (Option<Vec<u8>>, PathBuf) {
        let link = |path: &Path| std::fs::read_link(path).unwrap_or_default();
        match self.look() {
            There::Nothing => (None, PathBuf::new()),
            There::Theirs(bytes) => (Some(bytes), link(&self.conf)),
            There::Ours(_) | There::Another(_) => {
                let aside = self.aside();
                if std::fs::symlink_metadata(&aside).is_ok() {
                    // A relative link leads to the same place: it is in the same folder.
                    return (Some(read(&aside)), link(&aside));
                }
                let copy = files::read(&self.copy, Readers::Nobody).ok().flatten();
                (copy.map(|copy| copy.to_vec()), PathBuf::new())
            }
        }
    }

    /// Makes `text`, which bears our line, what is there.
    ///
    /// # Errors
    /// It cannot be written: says why. What was there is there as it was.
    pub(super) fn put(&self, text: &str) -> io::Result<()> {
        let _lock = self.lock()?;
        match self.look() {
            There::Ours(there) if there == text => Ok(()),
            There::Ours(_) if self.copy.exists() && !self.aside().exists() => {
                write_in_place(&self.conf, text.as_bytes())
            }
            There::Ours(_) => {
                let new = self.write_beside(text)?;
                std::fs::rename(&new, &self.conf).inspect_err(|_| discard(&new))
            }
            There::Nothing => {
                let new = self.write_beside(text)?;
                let moved = rename(&new, &self.conf, RenameFlags::RENAME_NOREPLACE);
                moved.inspect_err(|_| discard(&new))
            }
            There::Another(tun) => Err(io::Error::other(format!(
                "the ringtail of {tun} has written it"
            ))),
            There::Theirs(bytes) => {
                self.forget();
                let Err(error) = self.exchange(text) else {
                    return Ok(());
                };
                // A link would be written through, into somebody else's file.
                let plain =
                    std::fs::symlink_metadata(&self.conf).is_ok_and(|there| there.is_file());
                if !plain {
                    return Err(error);
                }
                files::write(&self.copy, &bytes).map_err(|e| io::Error::other(format!("{e:#}")))?;
                write_in_place(&self.conf, text.as_bytes()).inspect_err(|_| {
                    // What was written before the error is ours: the copy is all there is of theirs.
                    if !matches!(self.look(), There::Ours(_)) {
                        discard(&self.copy);
                    }
                })
            }
        }
    }

    /// Puts back what was there before us, if ours is what is there now; whatever else is there stays.
    ///
    /// # Errors
    /// Ours is still there.
    pub(super) fn restore(&self) -> io::Result<()> {
        let _lock = self.lock()?;
        let aside = self.aside();
        match self.look() {
            There::Theirs(_) => {}
            // What waits aside is what that one puts back.
            There::Another(_) => {
                self.forget_copy();
                return Ok(());
            }
            There::Nothing | There::Ours(_) if std::fs::symlink_metadata(&aside).is_ok() => {
                return std::fs::rename(&aside, &self.conf);
            }
            There::Nothing => {}
            There::Ours(_) => {
                let copy = files::read(&self.copy, Readers::Nobody);
                match copy.map_err(|error| io::Error::other(format!("{error:#}")))? {
                    Some(copy) => write_in_place(&self.conf, &copy)?,
                    None => std::fs::remove_file(&self.conf)?,
                }
            }
        }
        self.forget();
        Ok(())
    }

    /// Keeps others of our kind from doing what we do at the same time, two of whom would lose what was there, and
    /// removes what a killed one has left.
    #[expect(
        clippy::disallowed_methods,
        reason = "a driver: who waits here has nothing else to do"
    )]
    fn lock(&self) -> io::Result<Flock<File>> {
        let folder = self.conf.parent().unwrap_or_else(|| Path::new("/"));
        let mut folder = File::open(folder)?;
        for _ in 0..LOCK_TRIES {
            match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => {
                    // Of one that was killed: nobody else is at work.
                    let left = self.new_file();
                    if std::fs::symlink_metadata(&left).is_ok() {
                        discard(&left);
                    }
                    return Ok(locked);
                }
                Err((back, Errno::EWOULDBLOCK)) => folder = back,
                Err((_, errno)) => return Err(errno.into()),
            }
            std::thread::sleep(LOCK_PERIOD);
        }
        Err(io::Error::other("another program has the folder locked"))
    }

    /// Where what was there waits.
    pub(super) fn aside(&self) -> PathBuf {
        let mut name = self.conf.clone().into_os_string();
        name.push(ASIDE);
        name.into()
    }

    /// Removes what is kept of a file that is no more the one to put back.
    fn forget(&self) {
        let aside = self.aside();
        if std::fs::symlink_metadata(&aside).is_ok() {
            discard(&aside);
        }
        self.forget_copy();
    }

    fn forget_copy(&self) {
        if self.copy.exists() {
            discard(&self.copy);
        }
    }

    /// Exchanges what is there for `text`, and keeps it aside.
    fn exchange(&self, text: &str) -> io::Result<()> {
        let there = std::fs::symlink_metadata(&self.conf)?.file_type();
        if !there.is_file() && !there.is_symlink() {
            return Err(io::Error::other("it is no file"));
        }
        let aside = self.aside();
        let new = self.write_beside(text)?;
        // From here on the file aside is ours until the exchange makes it theirs: a crash in between leaves
        // theirs where it is.
        let placed = std::fs::rename(&new, &aside).inspect_err(|_| discard(&new));
        placed.and_then(|()| {
            let exchanged = rename(&aside, &self.conf, RenameFlags::RENAME_EXCHANGE);
            exchanged.inspect_err(|_| discard(&aside))
        })
    }

    /// A new file with `text` in the same folder, which everybody may read.
    fn write_beside(&self, text: &str) -> io::Result<PathBuf> {
        let path = self.new_file();
        let mut new = File::create_new(&path)?;
        let written = new.write_all(text.as_bytes()).and_then(|()| {
            new.set_permissions(std::fs::Permissions::from_mode(0o644))?;
            new.sync_all()
        });
        written.inspect_err(|_| discard(&path))?;
        Ok(path)
    }

    fn new_file(&self) -> PathBuf {
        self.conf.with_file_name(NEW)
    }
}

/// Whether `path` belongs to another network than ours: we are in a namespace of the network that shares the host's
/// files, as `ip netns exec` makes them. What we are in here is nothing there.
pub(super) fn is_of_another_network(path: &Path) -> bool {
    is_of_the_first_process(path) || is_in_named_network() && !is_mounted(path)
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// Whether the first process has the same there, and another network. Only root may look, and not everywhere.
fn is_of_the_first_process(path: &Path) -> bool {
    let network = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let (ours, first) = (network("self"), network("1"));
    if ours.is_none() || first.is_none() || ours == first {
        return false;
    }
    let outside = Path::new("/proc/1/root").join(path.strip_prefix("/").unwrap_or(path));
    match inode(path) {
        Some(inside) => inode(&outside) == Some(inside),
        // A file that is not there yet is in a folder that is.
        None => path.parent().and_then(inode) == outside.parent().and_then(inode),
    }
}

/// Whether our network is one that `ip netns` has given a name.
fn is_in_named_network() -> bool {
    let ours = inode(Path::new("/proc/self/ns/net"));
    let named = std::fs::read_dir(NETNS_DIR).into_iter().flatten().flatten();
    let mut named = named.take(NETNS_MAX).map(|entry| inode(&entry.path()));
    ours.is_some() && named.any(|found| found == ours)
}

/// Whether something is mounted on it or on its folder: then it may be ours alone.
fn is_mounted(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    points.any(|point| Path::new(point) == path || path.parent() == Some(Path::new(point)))
}

/// What is there, as far as it can be read: a link that leads nowhere is empty.
pub(super) fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Without waiting: a pipe would be waited for at its opening.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path);
    if let Ok(file) = opened
        && file.metadata().is_ok_and(|found| found.is_file())
    {
        // What was read before an error is thrown away with it.
        if file.take(LEN_MAX).read_to_end(&mut bytes).is_err() {
            bytes.clear();
        }
    }
    bytes
}

/// Writes over a regular file where it is. Who reads meanwhile sees a text that is too long rather than none.
fn write_in_place(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .custom_flags(O_NOFOLLOW | O_NONBLOCK)
        .open(path)?;
    file.write_all(text)?;
    file.set_len(text.len() as u64)?;
    file.sync_all()
}

fn rename(from: &Path, to: &Path, how: RenameFlags) -> io::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, how).map_err(|errno: Errno| errno.into())
}

fn discard(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!(%error, file = %path.display(), "cannot be removed");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const THEIRS: &[u8] = b"# theirs \xff\nnameserver 192.0.2.1\n";

    fn ours(server: &str) -> String {
        format!("# Written by ringtail for ringtail0. Of now.\nnameserver {server}\n")
    }

    fn place() -> (tempfile::TempDir, Place) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let place = Place {
            conf: dir.path().join("etc/resolv.conf"),
            copy: dir.path().join("copy"),
            tun: "ringtail0".into(),
        };
        (dir, place)
    }

    fn names(place: &Place) -> Vec<String> {
        let entries = std::fs::read_dir(place.conf.parent().unwrap()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn inode(path: &Path) -> (u64, u32) {
        let found = std::fs::symlink_metadata(path).unwrap();
        (found.ino(), found.mode())
    }

    #[test]
    fn a_file_comes_back_with_its_inode_mode_and_bytes() {
        let (_dir, place) = place();
        std::fs::write(&place.conf, THEIRS).unwrap();
        std::fs::set_permissions(&place.conf, std::fs::Permissions::from_mode(0o664)).unwrap();
        let before = inode(&place.conf);
        for server in ["1.1.1.1", "1.1.1.2", "1.1.1.2"] {
            place.put(&ours(server)).unwrap();
            assert_eq!(place.look(), There::Ours(ours(server)));
            assert_eq!(inode(&place.conf).1 & 0o777, 0o644);
            assert_eq!(place.theirs().0.as_deref(), Some(THEIRS));
            assert_eq!(
                names(&place),
                ["resolv.conf", "resolv.conf.before-ringtail"]
            );
        }
        place.restore().unwrap();
        place.restore().unwrap();
        assert_eq!(
            (inode(&place.conf), read(&place.conf)),
            (before, THEIRS.to_vec())
        );
        assert_eq!(names(&place), ["resolv.conf"]);
    }

    #[test]
    fn a_link_comes_back_as_a_link_and_is_not_written_through() {
        for target in ["target", "leads/nowhere"] {
            let (_dir, place) = place();
            let file = place.conf.with_file_name("target");
            std::fs::write(&file, THEIRS).unwrap();
            symlink(target, &place.conf).unwrap();
            let before = inode(&place.conf);
            place.put(&ours("1.1.1.1")).unwrap();
            assert_eq!(place.theirs().1, Path::new(target));
            assert_eq!(read(&file), THEIRS);
            place.restore().unwrap();
            assert_eq!(inode(&place.conf), before);
            assert_eq!(std::fs::read_link(&place.conf).unwrap(), Path::new(target));
            assert_eq!(names(&place), ["resolv.conf", "target"]);
        }
    }

    #[test]
    fn where_there_was_none_there_is_none_again() {
        let (_dir, place) = place();
        place.put(&ours("1.1.1.1")).unwrap();
        assert_eq!(place.theirs().0, None);
        place.put(&ours("1.1.1.2")).unwrap();
        assert_eq!(names(&place), ["resolv.conf"]);
        place.restore().unwrap();
        assert_eq!(names(&place), [""; 0]);
        place.restore().unwrap();
    }

    #[test]
    fn what_somebody_else_wrote_meanwhile_is_what_comes_back() {
        let (_dir, place) = place();
        std::fs::write(&place.conf, "nameserver 192.0.2.9\n").unwrap();
        place.put(&ours("1.1.1.1")).unwrap();
        let new = place.conf.with_file_name("new");
        std::fs::write(&new, THEIRS).unwrap();
        std::fs::rename(&new, &place.conf).unwrap();
        let before = inode(&place.conf);
        assert_eq!(place.look(), There::Theirs(THEIRS.to_vec()));
        // Ended now, it stays; it is no matter that something older waits.
        let ended = place.clone();
        place.put(&ours("1.1.1.1")).unwrap();
        ended.restore().unwrap();
        assert_eq!(
            (inode(&place.conf), read(&place.conf)),
            (before, THEIRS.to_vec())
        );
        place.put(&ours("1.1.1.1")).unwrap();
        std::fs::write(&place.conf, THEIRS).unwrap();
        place.restore().unwrap();
        assert_eq!(read(&place.conf), THEIRS);
        assert_eq!(names(&place), ["resolv.conf"]);
        // Ours was removed: what was there before comes back all the same.
        place.put(&ours("1.1.1.1")).unwrap();
        std::fs::remove_file(&place.conf).unwrap();
        place.restore().unwrap();
        assert_eq!(read(&place.conf), THEIRS);
    }

    #[test]
    fn a_crash_between_any_two_steps_loses_nothing() {
        let (_dir, place) = place();
        std::fs::write(&place.conf, THEIRS).unwrap();
        // Ours is half written.
        let ours_put_back = |place: &Place| {
            place.put(&ours("1.1.1.1")).unwrap();
            place.write_beside("# Writ").unwrap();
        };
        for left in [
            |place: &Place| drop(place.write_beside("# Writ")),
            ours_put_back,
        ] {
            left(&place);
            place.restore().unwrap();
            assert_eq!(
                (read(&place.conf), names(&place)),
                (THEIRS.to_vec(), vec!["resolv.conf".into()])
            );
        }
        place.write_beside("# Writ").unwrap();
        place.put(&ours("1.1.1.1")).unwrap();
        place.restore().unwrap();
        assert_eq!(names(&place), ["resolv.conf"], "nor is it in the way");
        // Ours waits aside, not yet exchanged.
        std::fs::write(place.aside(), ours("1.1.1.1")).unwrap();
        place.restore().unwrap();
        assert_eq!(
            (read(&place.conf), names(&place)),
            (THEIRS.to_vec(), vec!["resolv.conf".into()])
        );
        // The copy is written, the file not.
        files::write(&place.copy, THEIRS).unwrap();
        place.restore().unwrap();
        assert_eq!(read(&place.conf), THEIRS);
        assert!(!place.copy.exists());
        // Written in place, as where it cannot be moved.
        files::write(&place.copy, THEIRS).unwrap();
        let before = inode(&place.conf);
        write_in_place(&place.conf, ours("1.1.1.1").as_bytes()).unwrap();
        assert_eq!(place.theirs().0.as_deref(), Some(THEIRS));
        place.put(&ours("1.1.1.2")).unwrap();
        assert_eq!(names(&place), ["resolv.conf"], "in place again");
        place.restore().unwrap();
        assert_eq!(
            (inode(&place.conf), read(&place.conf)),
            (before, THEIRS.to_vec())
        );
        assert!(!place.copy.exists());
    }

    #[test]
    fn what_another_ringtail_wrote_is_left_to_it() {
        let (_dir, place) = place();
        let other = Place {
            tun: "other0".into(),
            ..place.clone()
        };
        std::fs::write(&place.conf, THEIRS).unwrap();
        place.put(&ours("1.1.1.1")).unwrap();
        assert_eq!(other.look(), There::Another("ringtail0".into()));
        let text = ours("1.1.1.3").replace("ringtail0", "other0");
        assert!(
            other
                .put(&text)
                .unwrap_err()
                .to_string()
                .contains("ringtail0")
        );
        // Its own text is not taken for the host's.
        assert_eq!(other.theirs().0.as_deref(), Some(THEIRS));
        // Somebody wrote the file anew, the other put its own there, and we end.
        std::fs::write(&place.conf, THEIRS).unwrap();
        other.put(&text).unwrap();
        place.restore().unwrap();
        assert_eq!(other.look(), There::Ours(text));
        other.restore().unwrap();
        assert_eq!(read(&place.conf), THEIRS);
    }

    #[test]
    fn what_is_no_file_is_left_alone() {
        let (_dir, place) = place();
        std::fs::create_dir(&place.conf).unwrap();
        assert!(place.put(&ours("1.1.1.1")).is_err());
        assert!(place.conf.is_dir());
        assert_eq!(names(&place), ["resolv.conf"]);
        nix::unistd::mkfifo(
            &place.conf.with_file_name("pipe"),
            nix::sys::stat::Mode::S_IRWXU,
        )
        .unwrap();
        assert_eq!(read(&place.conf.with_file_name("pipe")), b"");
    }
}
