//! The status socket: how `ringtail status`, `ping` and `netcheck` talk to a running node.
//!
//! A Unix stream socket (0600) in the state directory. The client writes one JSON line, the
//! [`Request`]; the node answers with JSON lines and closes. `status` and `netcheck` get one line;
//! `ping` one per reply. An answer that is an object with `error` is the last one.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::accept::{self, Attention};
use super::unix_socket::{self, SocketFile};

/// Longest request line in bytes.
const REQUEST_LEN_MAX: u64 = 4096;
/// Requests being served at once.
const CLIENTS_MAX: usize = 32;
/// How long a client may take to send its line, and to take each answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers queued for one client.
const ANSWERS_MAX: usize = 16;

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Everything the node knows about itself.
    Status,
    /// One DISCO round trip to a peer, by relay and by the direct path.
    Ping {
        /// A peer's name, inner address or node key.
        peer: String,
    },
    /// Measures all relays anew and reports.
    Netcheck,
}

/// A request on its way to the agent, with the way back.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Takes answers; dropping it ends the connection.
    pub answers: mpsc::Sender<Value>,
}

/// Opens the socket, taking the place of one left behind by a killed node. The caller holds the state
/// directory's lock.
///
/// # Errors
/// When the socket cannot be made ([`unix_socket::bind`]).
pub fn listen(path: &Path) -> anyhow::Result<(UnixListener, SocketFile)> {
    let (listener, file) = unix_socket::bind(path)?;
    Ok((UnixListener::from_std(listener)?, file))
}

/// Takes connections for ever and turns each into a [`Call`].
pub async fn serve(listener: UnixListener, calls: mpsc::Sender<Call>) {
    accept::serve(listener, CLIENTS_MAX, "status", |stream, attention| {
        serve_client(stream, attention, calls.clone())
    })
    .await;
}

async fn serve_client(
    stream: UnixStream,
    attention: Attention,
    calls: mpsc::Sender<Call>,
) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = BufReader::new(read.take(REQUEST_LEN_MAX));
    tokio::time::timeout(CLIENT_TIMEOUT, read.read_line(&mut line)).await??;
    attention.ours();
    let (answers, mut answered) = mpsc::channel(ANSWERS_MAX);
    match serde_json::from_str(&line) {
        Ok(request) => calls
            .send(Call { request, answers })
            .await
            .context("the node is stopping")?,
        Err(error) => {
            answers.try_send(serde_json::json!({"error": format!("bad request: {error}")}))?;
            drop(answers);
        }
    }
    while let Some(answer) = answered.recv().await {
        let mut text = answer.to_string();
        text.push('\n');
        attention.client();
        tokio::time::timeout(CLIENT_TIMEOUT, write.write_all(text.as_bytes())).await??;
        attention.ours();
    }
    Ok(())
}

/// The client's side: sends one request and gives each answer to `each`.
///
/// # Errors
/// When no node listens there, or an answer is an error.
pub async fn ask(
    path: &Path,
    request: &Request,
    mut each: impl FnMut(Value) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let stream = match UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(error) if unix_socket::nobody_listens(&error) => bail!(
            "no ringtail node runs here ({}); start one with `ringtail up`, or name its --state-dir",
            path.display()
        ),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot reach {}", path.display()));
        }
    };
    let (read, mut write) = stream.into_split();
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    write.write_all(line.as_bytes()).await?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let answer: Value = serde_json::from_str(&line).context("the node's answer is not JSON")?;
        if let Some(error) = answer.get("error").and_then(Value::as_str) {
            bail!("{error}");
        }
        each(answer)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "local")]
    async fn a_request_gets_its_answers_and_garbage_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (calls, mut called) = mpsc::channel(4);
        let (listener, file) = listen(&path).unwrap();
        tokio::task::spawn_local(serve(listener, calls));
        tokio::task::spawn_local(async move {
            while let Some(Call { request, answers }) = called.recv().await {
                for n in 0..2 {
                    let _ = answers
                        .send(serde_json::json!({"n": n, "echo": request}))
                        .await;
                }
            }
        });
        let mut seen = Vec::new();
        ask(&path, &Request::Ping { peer: "b".into() }, |answer| {
            seen.push(answer["n"].clone());
            assert!(answer["echo"]["peer"] == "b");
            Ok(())
        })
        .await
        .unwrap();
        assert!(seen == [0, 1]);

        let mut raw = UnixStream::connect(&path).await.unwrap();
        raw.write_all(b"\xff{]\n").await.unwrap();
        let mut text = Vec::new();
        let _ = raw.read_to_end(&mut text).await;
        let mut raw = UnixStream::connect(&path).await.unwrap();
        raw.write_all(b"{\"request\":\"nonsense\"}\n")
            .await
            .unwrap();
        let mut text = String::new();
        raw.read_to_string(&mut text).await.unwrap();
        assert!(text.contains("bad request"), "{text}");
        drop(file);
        assert!(!path.exists());
    }

    #[tokio::test(flavor = "local")]
    async fn without_a_node_the_client_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = ask(&dir.path().join("s"), &Request::Status, |_| Ok(())).await;
        assert!(error.unwrap_err().to_string().contains("ringtail up"));
    }
}
