//! The configuration socket of a WireGuard device: `/var/run/wireguard/IFNAME.sock`.
//!
//! [`Socket::bind`] comes first in the life of a device: holding the name is what keeps a second
//! instance away. Every connection is a task of its own that reads, parses and writes at its
//! client's pace; only whole requests reach the device's loop, as [`Call`]s, and the reply it gives
//! is complete, so nobody waits for a slow client. `wg` connects once without sending anything
//! before each request, and may go away before its reply: neither is an error.

use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

use super::accept::{self, Attention};
use super::clock::now;
use super::unix_socket::{self, SocketFile};
use crate::uapi::{Parser, READ_LEN_MAX, Reply, Request};

/// Where `wg` looks for sockets.
pub const SOCKET_DIR: &str = "/var/run/wireguard";
/// Connections served at once.
const CLIENTS_MAX: usize = 256;
/// How long a client may pause inside a request, and in taking its reply.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// And for all of a request, or to take all of a reply.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection may be silent between requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A request on its way to the device, with the way back.
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Takes the answer; dropping it closes the connection.
    pub reply: oneshot::Sender<Reply>,
}

/// A bound socket; its file goes with it.
pub struct Socket {
    listener: std::os::unix::net::UnixListener,
    file: SocketFile,
}

impl Socket {
    /// Binds the socket of the interface in `dir` ([`SOCKET_DIR`]), which is made if it is missing.
    /// One left behind by a process that is gone is replaced.
    ///
    /// # Errors
    /// Somebody answers on the socket already, or it cannot be made.
    pub fn bind(dir: &Path, interface: &str) -> anyhow::Result<Self> {
        let path = dir.join(format!("{interface}.sock"));
        make_dir(dir)?;
        // Two instances that start at once take turns here.
        let turn =
            std::fs::File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
        let _turn = Flock::lock(turn, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("cannot lock {}", dir.display()))?;
        let (listener, file) = unix_socket::bind(&path)
            .with_context(|| format!("{interface} is in use, or its socket cannot be made"))?;
        Ok(Self { listener, file })
    }

    /// Whether the socket's file is still there and still ours.
    pub fn is_there(&self) -> bool {
        self.file.is_there()
    }

    /// The listening end, for [`serve`].
    ///
    /// # Errors
    /// No more descriptors, or no runtime.
    pub fn listener(&self) -> std::io::Result<UnixListener> {
        UnixListener::from_std(self.listener.try_clone()?)
    }
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .with_context(|| format!("cannot make {}", dir.display()))
}

/// Takes connections for ever and turns what they ask into [`Call`]s.
pub async fn serve(listener: UnixListener, calls: mpsc::Sender<Call>) {
    accept::serve(
        listener,
        CLIENTS_MAX,
        "configuration",
        |stream, attention| serve_client(stream, attention, calls.clone()),
    )
    .await;
}

async fn serve_client(
    mut stream: UnixStream,
    attention: Attention,
    calls: mpsc::Sender<Call>,
) -> anyhow::Result<()> {
    if timed(IDLE_TIMEOUT, stream.readable()).await.is_err() {
        return Ok(());
    }
    let mut parser = Parser::new(interface_index);
    let mut piece = Zeroizing::new(vec![0; READ_LEN_MAX]);
    // When the request began that is not complete.
    let mut begun = None;
    loop {
        while let Some(request) = parser.poll_request() {
            begun = None;
            let (reply, answer) = oneshot::channel();
            let call = Call { request, reply };
            attention.ours();
            calls.send(call).await.ok().context("the device is going")?;
            let answer = answer.await.context("the device is going")?;
            let taken = send(&mut stream, &attention, answer.as_bytes());
            timed(WHOLE_TIMEOUT, taken).await?;
        }
        if parser.is_closed() {
            return Ok(());
        }
        let patience = if parser.is_idle() {
            IDLE_TIMEOUT
        } else {
            let end = *begun.get_or_insert_with(now) + WHOLE_TIMEOUT;
            CLIENT_TIMEOUT.min(end.saturating_duration_since(now()))
        };
        attention.client();
        match timed(patience, stream.read(&mut piece)).await? {
            0 => parser.handle_end(),
            len => parser.handle_bytes(&piece[..len]),
        }
    }
}

/// Sends all of it; a client may not take its time for a part.
async fn send(
    stream: &mut UnixStream,
    attention: &Attention,
    mut bytes: &[u8],
) -> std::io::Result<()> {
    while !bytes.is_empty() {
        attention.client();
        let sent = timed(CLIENT_TIMEOUT, stream.write(bytes)).await?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

async fn timed<T>(
    limit: Duration,
    work: impl Future<Output = std::io::Result<T>>,
) -> std::io::Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(ErrorKind::TimedOut.into()),
    }
}

/// The index of an interface, for the scope of a link-local endpoint.
fn interface_index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::net::UnixStream as Client;

    use super::*;
    use crate::uapi::Errno;

    #[test]
    fn a_second_instance_is_refused_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("deep/wireguard");
        let first = Socket::bind(&dir, "wg0").unwrap();
        let path = dir.join("wg0.sock");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o777, 0o755);
        let second = format!("{:#}", Socket::bind(&dir, "wg0").err().unwrap());
        assert!(second.contains("wg0 is in use"), "{second}");
        assert!(first.is_there(), "the attempt did no harm");
        drop(first);
        assert!(!path.exists());

        // A listener that is gone leaves its file behind.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let next = Socket::bind(&dir, "wg0").unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(!next.is_there());
        std::fs::write(&path, "another's").unwrap();
        assert!(!next.is_there());
        drop(next);
        assert!(path.exists(), "what is not ours stays");
    }

    /// Answers every `get` with a large reply and refuses every `set`.
    async fn device(mut calls: mpsc::Receiver<Call>, large: usize) {
        while let Some(Call { request, reply }) = calls.recv().await {
            let answer = match request {
                Request::Get => {
                    let extras = (0..large).map(|n| (format!("n{n}"), "x".repeat(60)));
                    let status = crate::uapi::DeviceStatus {
                        extras: extras.collect(),
                        ..Default::default()
                    };
                    Reply::to_get(&status, 0, 0).finish()
                }
                Request::BadGet(errno) => Reply::to_bad_get(errno),
                Request::Set(_) => Reply::to_set(Err(Errno::PERMISSION)),
            };
            let _ = reply.send(answer);
        }
    }

    #[tokio::test(flavor = "local")]
    async fn probes_garbage_and_sleepy_clients_leave_the_others_served() {
        let dir = tempfile::tempdir().unwrap();
        let socket = Socket::bind(dir.path(), "wg0").unwrap();
        let path = dir.path().join("wg0.sock");
        let (sender, calls) = mpsc::channel(4);
        tokio::task::spawn_local(serve(socket.listener().unwrap(), sender));
        tokio::task::spawn_local(device(calls, 50_000));
        tokio::task::spawn_blocking(move || {
            let mut silent = Client::connect(&path).unwrap();
            let mut half = Client::connect(&path).unwrap();
            half.write_all(b"set=1\nprivate_key=90").unwrap();
            // Asks for a large reply and does not take it.
            let mut sleepy = Client::connect(&path).unwrap();
            sleepy.write_all(b"get=1\n\n").unwrap();
            for garbage in [&b"\0\xff\r\n"[..], &[b'x'; 1 << 20], b"get=1\n"] {
                let mut client = Client::connect(&path).unwrap();
                // The other side may close before it has read all.
                let _ = client.write_all(garbage);
            }
            for _ in 0..300 {
                drop(Client::connect(&path).unwrap());
            }
            let mut gone = Client::connect(&path).unwrap();
            gone.write_all(b"get=1\n\nget=1\n\n").unwrap();
            drop(gone);

            let mut client = Client::connect(&path).unwrap();
            client.write_all(b"set=1\n\nget=1\n\nget=1\n\n").unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("errno=-1\n\nringtail_n0="));
            assert_eq!(text.matches("errno=0\n\n").count(), 2);
            assert_eq!(text.lines().count(), 2 + 2 * 50_002);
            silent.write_all(b"get=1\n\n").unwrap();
            let mut first = [0; 12];
            silent.read_exact(&mut first).unwrap();
            assert_eq!(&first, b"ringtail_n0=");
            drop((half, sleepy));
        })
        .await
        .unwrap();
    }
}
