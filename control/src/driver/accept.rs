//! The accept loop of the Unix sockets by which programs of this machine talk to us.
//!
//! Whoever connects is served at once. Connections are bounded, by a share of the descriptors that the
//! process has left too; when they are all taken, the one that has been silent for longest makes room.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::clock::now;
use super::descriptors;

/// How long nothing is accepted when nobody can make room.
const PAUSE: Duration = Duration::from_millis(20);

/// Whether a connection waits for its client, and since when: `None` while we are at work for it.
#[derive(Clone)]
pub(super) struct Attention(Rc<Cell<Option<Instant>>>);

impl Attention {
    /// The client is to say or take something.
    pub(super) fn client(&self) {
        self.0.set(Some(now()));
    }

    /// We are to answer.
    pub(super) fn ours(&self) {
        self.0.set(None);
    }
}

struct Client {
    task: JoinHandle<()>,
    attention: Attention,
}

/// Takes connections for ever, `most` of them at once, and gives each to `client` in a task of its
/// own. `who` is what the log calls it.
pub(super) async fn serve<F>(
    listener: UnixListener,
    most: usize,
    who: &'static str,
    client: impl Fn(UnixStream, Attention) -> F,
) where
    F: Future<Output = anyhow::Result<()>> + 'static,
{
    // Half of what is left: the rest is for what the process is here to do.
    let most = most.min(descriptors::left() / 2).max(1);
    let mut clients: Vec<Client> = Vec::new();
    let mut failing = false;
    loop {
        let accepted = listener.accept().await;
        clients.retain(|client| !client.task.is_finished());
        match accepted {
            Ok((stream, _)) => {
                failing = false;
                while clients.len() >= most && !make_room(&mut clients).await {
                    tokio::time::sleep(PAUSE).await;
                    clients.retain(|client| !client.task.is_finished());
                }
                let attention = Attention(Rc::new(Cell::new(Some(now()))));
                let work = client(stream, attention.clone());
                let task = tokio::task::spawn_local(async move {
                    if let Err(error) = work.await {
                        tracing::debug!(%error, "{who} client");
                    }
                });
                clients.push(Client { task, attention });
            }
            Err(error) => {
                // Out of descriptors, most likely.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "{who} socket");
                }
                if !make_room(&mut clients).await {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Ends the connection that has waited longest for its client. False if none does.
async fn make_room(clients: &mut Vec<Client>) -> bool {
    let waiting = clients.iter().enumerate();
    let idlest = waiting
        .filter_map(|(at, client)| Some((client.attention.0.get()?, at)))
        .min();
    let Some((_, at)) = idlest else {
        return false;
    };
    let client = clients.swap_remove(at);
    client.task.abort();
    // Cancelled or just done: its descriptor is closed now.
    drop(client.task.await);
    true
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream as Blocking;
    use std::path::Path;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Sends back each byte; a `w` only after somebody's `r`.
    async fn echo(
        mut stream: UnixStream,
        attention: Attention,
        release: Rc<tokio::sync::Notify>,
    ) -> anyhow::Result<()> {
        loop {
            attention.client();
            let byte = stream.read_u8().await?;
            attention.ours();
            match byte {
                b'w' => release.notified().await,
                b'r' => release.notify_one(),
                _ => {}
            }
            stream.write_u8(byte).await?;
        }
    }

    fn connect(path: &Path) -> Blocking {
        let client = Blocking::connect(path).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        client
    }

    fn answer(mut client: &Blocking) -> Option<u8> {
        let mut byte = [0];
        (client.read(&mut byte).unwrap() == 1).then_some(byte[0])
    }

    fn ask(mut client: &Blocking, byte: u8) -> Option<u8> {
        client.write_all(&[byte]).ok()?;
        answer(client)
    }

    #[tokio::test(flavor = "local")]
    async fn who_comes_to_a_full_house_takes_the_place_of_the_idlest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(listener).unwrap();
        let release = Rc::new(tokio::sync::Notify::new());
        tokio::task::spawn_local(async move {
            serve(listener, 4, "test", |stream, attention| {
                echo(stream, attention, Rc::clone(&release))
            })
            .await;
        });
        tokio::task::spawn_blocking(move || {
            let mut waits = connect(&path);
            waits.write_all(b"w").unwrap();
            let idle: Vec<_> = (0..3).map(|_| connect(&path)).collect();
            // All are in, and the second is the least idle.
            for client in [&idle[0], &idle[2], &idle[1]] {
                assert_eq!(ask(client, b'x'), Some(b'x'));
            }
            let mut newest = Vec::new();
            for gone in [&idle[0], &idle[2]] {
                newest.push(connect(&path));
                assert_eq!(ask(newest.last().unwrap(), b'y'), Some(b'y'));
                assert_eq!(answer(gone), None, "the idlest has gone");
            }
            assert_eq!(ask(&idle[1], b'r'), Some(b'r'));
            assert_eq!(answer(&waits), Some(b'w'), "it was waiting for us");
        })
        .await
        .unwrap();
    }
}
