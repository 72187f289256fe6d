//! How an administrator's orders reach the coordination server of a state directory.
//!
//! A running server listens on `coord.sock` (0600) in its state directory. The client writes one
//! JSON line, the [`Order`]; the answer is one line, `{"done": …}` or `{"error": "…"}`. Where no
//! server runs, [`give`] holds the directory's lock and changes the store itself.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream as BlockingStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::clock::{now, wall};
use super::coord_server::Orders;
use super::coord_store::{Database, pause};
use super::state::StateDir;
use super::unix_socket::{self, SocketFile};
use crate::coord::admin::{self, Done, Order, Refusal};

/// Longest line in bytes: as many routes as can be approved fit.
const LINE_LEN_MAX: u64 = 64 * 1024;

/// Orders under way at once.
const CLIENTS_MAX: usize = 16;

/// How long a client may take to send its line, and to take the answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a server may take to start listening, and another to let go of the directory.
const SERVER_WAIT: Duration = Duration::from_secs(5);

/// How long a running server may take for its answer.
const ANSWER_WAIT: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Done(Done),
    Error(String),
}

/// Begins to listen, on the current tokio runtime; the caller holds the directory's lock.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(dir: &StateDir, orders: Orders) -> anyhow::Result<SocketFile> {
    let (listener, file) = unix_socket::bind(&dir.file("coord.sock"))?;
    tokio::spawn(serve(UnixListener::from_std(listener)?, orders));
    Ok(file)
}

async fn serve(listener: UnixListener, orders: Orders) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        // Whoever comes when all places are taken waits in the backlog.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "admin socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let orders = orders.clone();
        tokio::spawn(async move {
            if let Err(error) = serve_client(stream, orders).await {
                tracing::debug!(%error, "admin client");
            }
            drop(place);
        });
    }
}

async fn serve_client(stream: UnixStream, orders: Orders) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = tokio::io::BufReader::new(read.take(LINE_LEN_MAX));
    timeout(CLIENT_TIMEOUT, read.read_line(&mut line)).await??;
    let answer = match serde_json::from_str(&line) {
        Ok(order) => match orders.give(order).await {
            Ok(done) => Answer::Done(done),
            Err(error) => Answer::Error(error),
        },
        Err(error) => Answer::Error(format!("bad order: {error}")),
    };
    let mut text = serde_json::to_string(&answer)?;
    text.push('\n');
    timeout(CLIENT_TIMEOUT, write.write_all(text.as_bytes())).await??;
    Ok(())
}

/// Has an order carried out by the server that runs on this directory, or in its store when none
/// does.
///
/// # Errors
/// When it is refused or cannot be stored, or a server runs that takes no orders.
pub fn give(dir: &StateDir, order: &Order) -> anyhow::Result<Done> {
    let deadline = now() + SERVER_WAIT;
    loop {
        let path = dir.file("coord.sock");
        match BlockingStream::connect(&path) {
            Ok(stream) => return ask(&stream, order),
            Err(error) if unix_socket::nobody_listens(&error) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot use {}", path.display()));
            }
        }
        match dir.lock() {
            Ok(_lock) => return change(Database::open(&dir.file("coord.db"))?, order),
            Err(error) if !dir.is_in_use()? => return Err(error),
            Err(_) if now() < deadline => pause(),
            Err(_) => bail!(
                "the coordination server that runs here does not listen on {}: an older ringtail?",
                path.display()
            ),
        }
    }
}

/// Asks a running server.
fn ask(stream: &BlockingStream, order: &Order) -> anyhow::Result<Done> {
    let mut text = serde_json::to_string(order)?;
    text.push('\n');
    stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    stream.set_read_timeout(Some(ANSWER_WAIT))?;
    let answer = || -> anyhow::Result<Answer> {
        let mut writer = stream;
        writer.write_all(text.as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream.take(LINE_LEN_MAX)).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    match answer().context("no answer from the coordination server")? {
        Answer::Done(done) => Ok(done),
        Answer::Error(error) => Err(anyhow!(error)),
    }
}

/// Changes the store of a server that does not run; the caller holds the directory's lock.
fn change(mut database: Database, order: &Order) -> anyhow::Result<Done> {
    let Order::Node { node, change } = order else {
        return Err(Refusal::NobodyWaits.into());
    };
    let nodes = database.load()?.nodes;
    let (write, done) = admin::plan(nodes.iter(), node, change, wall())?;
    if let Some(write) = write {
        database.write(&[write])?;
    }
    Ok(done)
}
