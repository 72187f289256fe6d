//! Unix stream sockets that are ours alone: the status socket and the configuration socket.
//!
//! The descriptor gets its mode before it is bound, and the file comes into being with it: there is no
//! moment at which another user could connect. (The file's mode, and not a look at who connected, so
//! that an administrator can open the socket to a group.) A socket that a dead program left behind is
//! replaced, and so is a link, which is not followed; one that somebody listens on is his, and what is
//! no socket is not ours to remove.

use std::fs::Permissions;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, lchown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use nix::sys::stat::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A bound socket's file; it goes with this, unless another took its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// To know it from another's in its place.
    identity: Identity,
}

/// Device, inode, and when it came into being where the file system says so: numbers of inodes are used
/// again.
type Identity = (u64, u64, Option<SystemTime>);

impl SocketFile {
    /// Whether the file is still there and still ours.
    pub fn is_there(&self) -> bool {
        identity(&self.path) == Some(self.identity)
    }
}

impl SocketFile {
    /// Lets a group connect too. The folder is one that only we can write to, lest what is changed be
    /// another file.
    ///
    /// # Errors
    /// We may not give it away.
    pub fn open_to(&self, group: u32) -> anyhow::Result<()> {
        let open = || {
            lchown(&self.path, None, Some(group))?;
            std::fs::set_permissions(&self.path, Permissions::from_mode(0o660))
        };
        open().with_context(|| format!("cannot open {} to a group", self.path.display()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_there() {
            // Somebody else may have been quicker: then there is nothing left to do.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Binds a socket with mode 0600 and listens, without blocking. The caller holds a lock that keeps
/// another instance of ours from doing the same.
///
/// # Errors
/// Somebody listens there, something else than a socket is in its place, or it cannot be made.
pub fn bind(path: &Path) -> anyhow::Result<(UnixListener, SocketFile)> {
    make_room(path)?;
    let address = SockAddr::unix(path).with_context(|| {
        format!(
            "{} is no name for a socket (its path has at most 107 bytes)",
            path.display()
        )
    })?;
    let bound = || -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        socket.bind(&address)?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let socket = bound().with_context(|| format!("cannot listen on {}", path.display()))?;
    let identity = identity(path).context("the socket has just been made and is gone")?;
    let path = path.to_owned();
    Ok((socket.into(), SocketFile { path, identity }))
}

/// Removes what a dead program left.
fn make_room(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let there = match std::fs::symlink_metadata(path) {
        Ok(there) => there.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {shown}")),
    };
    if !there.is_symlink() {
        if !there.is_socket() {
            bail!("{shown} is in the way, and is no socket");
        }
        if answers(path)? {
            bail!("another program listens on {shown}");
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot replace {shown}"))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether somebody listens on the socket.
fn answers(path: &Path) -> anyhow::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(true),
        // Its queue is full: it lives, if slowly.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) if nobody_listens(&error) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot look at {}", path.display())),
    }
}

/// Whether connecting failed because nobody listens there.
pub(super) fn nobody_listens(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused
    )
}

fn identity(path: &Path) -> Option<Identity> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.created().ok()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn nobody_else_can_connect_at_any_moment() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let over = AtomicBool::new(false);
        // Looks at the file's mode as often as it can while sockets come and go. A mode set after
        // binding shows itself here within a few rounds.
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let (mut seen, mut open) = (0, 0);
                while !over.load(Ordering::Relaxed) {
                    if let Ok(found) = std::fs::symlink_metadata(&path) {
                        seen += 1;
                        open += u32::from(found.mode() & 0o177 != 0);
                    }
                }
                (seen, open)
            });
            for _ in 0..3000 {
                let (listener, file) = bind(&path).unwrap();
                assert!(file.is_there());
                drop((listener, file));
            }
            over.store(true, Ordering::Relaxed);
            let (seen, open) = watcher.join().unwrap();
            assert!(
                seen > 0 && open == 0,
                "{open} of {seen} looks found it open"
            );
        });
        assert!(!path.exists());
    }

    #[test]
    fn a_live_programs_socket_is_not_stolen_and_a_dead_ones_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let theirs = UnixListener::bind(&path).unwrap();
        let error = bind(&path).unwrap_err().to_string();
        assert!(error.contains("another program listens"), "{error}");
        UnixStream::connect(&path).unwrap();
        drop(theirs);
        let (listener, ours) = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listener);
        // Whoever takes the place of ours keeps it.
        let elsewhere = dir.path().join("elsewhere");
        let _next = UnixListener::bind(&elsewhere).unwrap();
        std::fs::rename(&elsewhere, &path).unwrap();
        assert!(!ours.is_there());
        drop(ours);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_link_is_not_followed_and_what_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("s"), dir.path().join("other"));
        let theirs = UnixListener::bind(&other).unwrap();
        symlink(&other, &path).unwrap();
        let (_listener, _file) = bind(&path).unwrap();
        let found = std::fs::symlink_metadata(&path).unwrap();
        assert!(found.file_type().is_socket());
        UnixStream::connect(&other).unwrap();
        drop(theirs);

        let file = dir.path().join("file");
        std::fs::write(&file, "a person's").unwrap();
        let error = bind(&file).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), b"a person's");
        let long = dir.path().join("x".repeat(120));
        assert!(bind(&long).unwrap_err().to_string().contains("107 bytes"));
    }
}
