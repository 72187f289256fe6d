//! The status socket: how the other commands of `ringtail` talk to a running node.
//!
//! A Unix stream socket (0600) in the state directory, for its owner, who may ask everything; and one
//! for a group where somebody wants that ([`Reader`]), who may ask what changes nothing. The client
//! writes one JSON line, the [`Request`]; the node answers with JSON lines and closes. Most requests get
//! one line; `ping` one per reply, `login` one whenever there is another address to visit. An answer that
//! is an object with `error` is the last one.

use std::fs::Permissions;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::unistd::Group;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::accept::{self, Attention};
use super::unix_socket::{self, SocketFile};
use crate::config::PrefsChange;

/// The owner's socket, in the state directory.
pub const SOCKET_NAME: &str = "ringtail.sock";
/// Where the sockets for groups are, by the name of the TUN interface.
pub const GROUP_SOCKET_DIR: &str = "/run/ringtail";
/// Longest request line in bytes: thousands of routes to offer.
const REQUEST_LEN_MAX: u64 = 128 << 10;
/// Requests being served at once: of the owner, and of a group, which may be many.
const CLIENTS_MAX: usize = 32;
const GROUP_CLIENTS_MAX: usize = 128;
/// How long a client may take to send its line, and to take each answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers queued for one client.
const ANSWERS_MAX: usize = 16;

/// Who may ask by a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Whose node it is.
    Owner,
    /// A group that somebody lets look at it.
    Group,
}

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Everything the node knows about itself.
    Status,
    /// The settings that may change while it runs.
    Prefs,
    /// Changes some of them.
    Set {
        /// To what; the others stay.
        change: PrefsChange,
    },
    /// Takes part again, after [`Self::Down`].
    Up,
    /// Takes no part any more; the process stays.
    Down,
    /// Lets the coordination server take this node in, with a person's help where it wants that.
    Login,
    /// Takes the node's key out of force, and this node out of the network.
    Logout,
    /// Inner addresses.
    Ip {
        /// Of this peer: name, inner address or node key; without it our own.
        peer: Option<String>,
    },
    /// Who has an address, of itself or as part of a prefix that it routes.
    Whois {
        /// The address.
        address: IpAddr,
    },
    /// How names are resolved.
    DnsStatus,
    /// What the network's resolver answers.
    DnsQuery {
        /// The name.
        name: String,
        /// The type of record, such as `AAAA`.
        kind: String,
    },
    /// Nodes that offer to be a way out to the Internet.
    ExitNodes,
    /// One round trip to a peer.
    Ping {
        /// A peer's name, inner address or node key.
        peer: String,
        /// Below the tunnel or inside.
        #[serde(default)]
        by: PingBy,
    },
    /// Measures all relays anew and reports.
    Netcheck,
}

/// By what a peer is asked to answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PingBy {
    /// DISCO, by relay and by the direct path.
    #[default]
    Disco,
    /// TSMP: by the tunnel, from node to node.
    Tsmp,
    /// HTTP: by the tunnel, from host to node.
    Peerapi,
}

impl Request {
    /// Whether it changes nothing: whoever may only look may ask it.
    pub fn is_read_only(&self) -> bool {
        match self {
            Self::Status
            | Self::Prefs
            | Self::Ip { .. }
            | Self::Whois { .. }
            | Self::DnsStatus
            | Self::DnsQuery { .. }
            | Self::ExitNodes
            | Self::Ping { .. }
            | Self::Netcheck => true,
            Self::Set { .. } | Self::Up | Self::Down | Self::Login | Self::Logout => false,
        }
    }
}

/// A request on its way to the node, with the way back.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Takes answers; dropping it ends the connection.
    pub answers: mpsc::Sender<Value>,
}

impl Call {
    /// Gives an answer that others may follow. A client that does not read its answers loses them.
    pub fn tell(&self, answer: Value) {
        let _ = self.answers.try_send(answer);
    }

    /// Gives the last answer.
    pub fn answer(self, answer: Value) {
        self.tell(answer);
    }

    /// Gives what went wrong as the last answer.
    pub fn refuse(self, why: &str) {
        self.tell(json!({"error": why}));
    }

    /// Gives either as the last answer.
    pub fn answer_result(self, result: anyhow::Result<Value>) {
        match result {
            Ok(answer) => self.answer(answer),
            Err(error) => self.refuse(&format!("{error:#}")),
        }
    }
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

/// The same for a group, which may look ([`Reader::Group`]). The folder is made, open to everybody, if it is
/// missing.
///
/// # Errors
/// There is no such group, or the socket cannot be made.
pub fn listen_for_group(path: &Path, group: &str) -> anyhow::Result<(UnixListener, SocketFile)> {
    let found = Group::from_name(group).with_context(|| format!("cannot look up {group}"))?;
    let gid = found
        .with_context(|| format!("there is no group {group}"))?
        .gid;
    if let Some(folder) = path.parent() {
        make_open(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let (listener, file) = unix_socket::bind(path)?;
    file.open_to(gid.as_raw())?;
    Ok((UnixListener::from_std(listener)?, file))
}

/// Makes a folder that everybody may pass, whatever files this process makes are like. One that is there is
/// somebody's decision.
fn make_open(folder: &Path) -> std::io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(folder)?;
    std::fs::set_permissions(folder, Permissions::from_mode(0o755))
}

/// Takes connections of `reader` for ever and turns each into a [`Call`], if he may ask that.
pub async fn serve(listener: UnixListener, reader: Reader, calls: mpsc::Sender<Call>) {
    let most = match reader {
        Reader::Owner => CLIENTS_MAX,
        Reader::Group => GROUP_CLIENTS_MAX,
    };
    accept::serve(listener, most, "status", |stream, attention| {
        serve_client(stream, attention, reader, calls.clone())
    })
    .await;
}

async fn serve_client(
    stream: UnixStream,
    attention: Attention,
    reader: Reader,
    calls: mpsc::Sender<Call>,
) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = BufReader::new(read.take(REQUEST_LEN_MAX));
    tokio::time::timeout(CLIENT_TIMEOUT, read.read_line(&mut line)).await??;
    attention.ours();
    let (answers, mut answered) = mpsc::channel(ANSWERS_MAX);
    let asked: Result<Request, String> =
        serde_json::from_str(&line).map_err(|error| format!("bad request: {error}"));
    match asked {
        Ok(request) if reader == Reader::Group && !request.is_read_only() => {
            refuse(
                answers,
                "this socket is for looking: only the node's owner may change it",
            );
        }
        Ok(request) => calls
            .send(Call { request, answers })
            .await
            .context("the node is stopping")?,
        Err(error) => refuse(answers, &error),
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

/// The only answer, to a request that the node does not get to see.
fn refuse(answers: mpsc::Sender<Value>, why: &str) {
    // There is room for the first.
    let _ = answers.try_send(json!({"error": why}));
}

/// A text with what does not print escaped: names and reasons are other people's, and a terminal takes orders.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_control() {
            out.extend(char.escape_default());
        } else {
            out.push(char);
        }
    }
    out
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
            let lines: Vec<String> = error.lines().map(printable).collect();
            bail!("{}", lines.join("\n"));
        }
        each(answer)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::stat::{Mode, umask};

    use super::*;

    #[tokio::test(flavor = "local")]
    async fn a_request_gets_its_answers_and_garbage_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (calls, mut called) = mpsc::channel(4);
        let (listener, file) = listen(&path).unwrap();
        tokio::task::spawn_local(serve(listener, Reader::Owner, calls));
        tokio::task::spawn_local(async move {
            while let Some(Call { request, answers }) = called.recv().await {
                for n in 0..2 {
                    let _ = answers.send(json!({"n": n, "echo": request})).await;
                }
            }
        });
        let mut seen = Vec::new();
        ask(
            &path,
            &Request::Ping {
                peer: "b".into(),
                by: PingBy::Disco,
            },
            |answer| {
                seen.push(answer["n"].clone());
                assert!(answer["echo"]["peer"] == "b");
                Ok(())
            },
        )
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

    #[test]
    fn a_folder_for_everybody_is_one_also_where_files_are_closed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("ringtail");
        let mode = || std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777;
        // The mask of this thread alone.
        let made = || {
            unshare(CloneFlags::CLONE_FS).unwrap();
            umask(Mode::from_bits_truncate(0o077));
            make_open(&folder).unwrap();
        };
        std::thread::scope(|scope| scope.spawn(made).join().unwrap());
        assert_eq!(mode(), 0o755);
        std::fs::set_permissions(&folder, Permissions::from_mode(0o750)).unwrap();
        make_open(&folder).unwrap();
        assert_eq!(mode(), 0o750);
    }

    #[tokio::test(flavor = "local")]
    async fn whoever_may_look_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (calls, mut called) = mpsc::channel(4);
        let (listener, _file) = listen(&path).unwrap();
        tokio::task::spawn_local(serve(listener, Reader::Group, calls));
        let change = PrefsChange::default();
        for request in [Request::Set { change }, Request::Down, Request::Logout] {
            let error = ask(&path, &request, |_| Ok(())).await.unwrap_err();
            assert!(error.to_string().contains("for looking"), "{error}");
        }
        assert!(called.try_recv().is_err(), "the node did not hear of it");
        let asked = ask(&path, &Request::Ip { peer: None }, |_| Ok(()));
        let (asked, heard) = tokio::join!(asked, async { called.recv().await.unwrap().request });
        asked.unwrap();
        assert_eq!(heard, Request::Ip { peer: None });
    }

    #[tokio::test(flavor = "local")]
    async fn without_a_node_the_client_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = ask(&dir.path().join("s"), &Request::Status, |_| Ok(())).await;
        assert!(error.unwrap_err().to_string().contains("ringtail up"));
    }
}
