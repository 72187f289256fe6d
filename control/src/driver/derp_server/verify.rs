//! Asks whether a client may be served: a coordination server, by derper's protocol, or a file of keys.
//!
//! Asked when a client has shown whose key it has, and of everybody who is connected again and again,
//! so that a node which was removed loses its relay. A verifier that does not answer lets nobody in
//! (unless it is to fail open), and ends nobody's connection.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

use super::{Shared, now};
use crate::derp::admission::{ANSWER_LEN_MAX, Answer, Answers, LIST_LEN_MAX, Question, parse_list};
use crate::driver::control_url::ControlUrl;
use crate::driver::lock;
use crate::driver::names::Names;
use crate::driver::tls::roots;
use crate::key::NodePublic;
use crate::places::limit::LogLimit;

/// For an answer, connecting and waiting for others included.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Questions at a time about those who come,
const ASKED_MAX: usize = 16;
/// and about those who are here.
const ASKED_AGAIN_MAX: usize = 4;

/// How often the file is looked at.
const FILE_LOOK: Duration = Duration::from_secs(2);

/// Where the path is not given.
const VERIFY_PATH: &str = "/verify";

/// Who is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerifyBy {
    /// A URL, http or https.
    Url(String),
    /// A file with a list of keys.
    File(PathBuf),
}

/// How clients are verified.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// Who is asked.
    pub by: VerifyBy,
    /// Serve whoever comes while the verifier cannot be reached.
    pub fail_open: bool,
    /// PEM file of certificates that may vouch for an https verifier, besides the web's and the host's.
    pub ca_file: Option<PathBuf>,
    /// How often those who are connected are asked about again.
    pub every: Duration,
}

/// Asks.
#[derive(Debug)]
pub(super) struct Verifier {
    ask: Ask,
    fail_open: bool,
    every: Duration,
    answers: Mutex<Answers>,
    log: Mutex<LogLimit>,
    /// The file is to be read.
    pub(super) read_again: Notify,
}

#[derive(Debug)]
enum Ask {
    Url(Box<Asker>),
    File {
        path: PathBuf,
        keys: Mutex<BTreeSet<NodePublic>>,
    },
}

#[derive(Debug)]
struct Asker {
    url: ControlUrl,
    path: String,
    names: Names,
    slots: Semaphore,
    /// For those who are here: strangers do not keep us from asking about them.
    slots_again: Semaphore,
    /// Connections that nobody uses: no more than may be asked at a time.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// What is known of a client.
enum Verdict {
    Served,
    Refused,
    /// The verifier says something that is no answer.
    Nonsense(anyhow::Error),
    /// It does not say anything.
    Silent(anyhow::Error),
}

impl Verdict {
    fn of(allow: bool) -> Self {
        if allow { Self::Served } else { Self::Refused }
    }
}

impl Verifier {
    /// Gets ready; a file is read.
    ///
    /// # Errors
    /// A URL that is none, or a file that cannot be used.
    pub(super) fn new(options: VerifyOptions) -> anyhow::Result<Self> {
        let ask = match options.by {
            VerifyBy::Url(url) => Ask::Url(Box::new(Asker::new(&url, options.ca_file.as_deref())?)),
            VerifyBy::File(path) => Ask::File {
                keys: Mutex::new(read_list(&path)?),
                path,
            },
        };
        Ok(Self {
            ask,
            fail_open: options.fail_open,
            every: options.every,
            answers: Mutex::default(),
            log: Mutex::default(),
            read_again: Notify::new(),
        })
    }

    /// Whether a client may be served.
    ///
    /// # Errors
    /// Why not; it is in the log and counted.
    pub(super) async fn admit(
        &self,
        shared: &Shared,
        key: NodePublic,
        source: IpAddr,
    ) -> Result<(), String> {
        let counters = &shared.counters;
        let known = lock(&self.answers).get(now(), &key);
        let verdict = match known {
            Some(allow) => Verdict::of(allow),
            None => self.ask(key, source, false).await,
        };
        let (counter, why) = match verdict {
            Verdict::Served => return Ok(()),
            Verdict::Silent(error) if self.fail_open => {
                counters.verify_failed_open.add(1);
                self.say(key, source, &format!("served unverified: {error:#}"));
                return Ok(());
            }
            Verdict::Refused => (
                &counters.verify_refused,
                "the verifier refuses its key".to_owned(),
            ),
            Verdict::Silent(error) | Verdict::Nonsense(error) => (
                &counters.verify_failures,
                format!("the verifier gives no answer: {error:#}"),
            ),
        };
        counter.add(1);
        self.say(key, source, &format!("refused: {why}"));
        Err(why)
    }

    /// A line in the log, of which strangers do not get many.
    fn say(&self, key: NodePublic, source: IpAddr, what: &str) {
        let Some(left_out) = lock(&self.log).admit(now()) else {
            return;
        };
        tracing::warn!(%source, %key, "client {what}");
        if left_out > 0 {
            tracing::warn!(left_out, "more clients than the log has lines for");
        }
    }

    /// Asks, `again` about somebody who is connected.
    async fn ask(&self, key: NodePublic, source: IpAddr, again: bool) -> Verdict {
        let asker = match &self.ask {
            Ask::File { keys, .. } => {
                return Verdict::of(lock(keys).contains(&key));
            }
            Ask::Url(asker) => asker,
        };
        let asked = timeout(ANSWER_LIMIT, asker.ask(key, source, again)).await;
        let verdict =
            asked.unwrap_or_else(|_| Verdict::Silent(anyhow!("not within {ANSWER_LIMIT:?}")));
        match verdict {
            Verdict::Served => lock(&self.answers).put(now(), key, true),
            Verdict::Refused => lock(&self.answers).put(now(), key, false),
            Verdict::Nonsense(_) | Verdict::Silent(_) => {}
        }
        verdict
    }

    /// Asks about everybody who is connected, for ever, and ends who is refused.
    pub(super) async fn watch(&self, shared: &Shared) {
        let mut seen = match &self.ask {
            Ask::File { path, .. } => written(path),
            Ask::Url(_) => None,
        };
        let mut asked_at = now();
        loop {
            let wait = match self.ask {
                Ask::File { .. } => FILE_LOOK,
                Ask::Url(_) => (asked_at + self.every).saturating_duration_since(now()),
            };
            let told = tokio::select! {
                () = tokio::time::sleep(wait) => false,
                () = self.read_again.notified() => true,
            };
            if let Ask::File { path, keys } = &self.ask {
                let fresh = written(path);
                let changed = fresh.is_some() && std::mem::replace(&mut seen, fresh) != fresh;
                if !changed && !told {
                    continue;
                }
                match read_list(path) {
                    Ok(list) => {
                        tracing::info!(keys = list.len(), "read {} again", path.display());
                        *lock(keys) = list;
                    }
                    Err(error) => {
                        tracing::warn!(error = format!("{error:#}"), "the old list stays");
                        continue;
                    }
                }
            }
            asked_at = now();
            self.ask_again(shared, shared.connected()).await;
        }
    }

    async fn ask_again(&self, shared: &Shared, connected: BTreeMap<NodePublic, SocketAddr>) {
        let all: Vec<_> = connected.into_iter().collect();
        for some in all.chunks(ASKED_AGAIN_MAX) {
            let asked = some
                .iter()
                .map(|(key, from)| self.ask(*key, from.ip().to_canonical(), true));
            for ((key, from), verdict) in some.iter().zip(join_all(asked).await) {
                match verdict {
                    Verdict::Served => {}
                    Verdict::Refused => {
                        shared.remove(key);
                        // Strangers do not use up the log's lines for this: it is one a connection.
                        let source = from.ip();
                        tracing::warn!(%source, %key, "client ended: the verifier refuses its key now");
                    }
                    // Whoever is here stays; there is no use asking on.
                    Verdict::Silent(error) | Verdict::Nonsense(error) => {
                        shared.counters.verify_failures.add(1);
                        tracing::warn!(
                            error = format!("{error:#}"),
                            "the verifier gives no answer"
                        );
                        return;
                    }
                }
            }
        }
    }
}

/// When a file was written, and its length.
fn written(path: &Path) -> Option<(SystemTime, u64)> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.modified().ok()?, found.len()))
}

fn read_list(path: &Path) -> anyhow::Result<BTreeSet<NodePublic>> {
    let shown = path.display();
    let len = std::fs::metadata(path)
        .with_context(|| format!("cannot read {shown}"))?
        .len();
    if len > LIST_LEN_MAX {
        bail!("{shown} is longer than {LIST_LEN_MAX} bytes");
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    parse_list(&text).with_context(|| format!("{shown} is no list of keys"))
}

impl Asker {
    fn new(url: &str, ca_file: Option<&Path>) -> anyhow::Result<Self> {
        let parsed: http::Uri = url
            .parse()
            .with_context(|| format!("{url:?} is no URL of a verifier"))?;
        let (Some(scheme), Some(authority)) = (parsed.scheme_str(), parsed.authority()) else {
            bail!("{url:?} is no URL of a verifier: write http://10.0.0.1:8080{VERIFY_PATH}");
        };
        let path = parsed.path_and_query().map_or("", |path| path.as_str());
        let path = if path.len() > 1 { path } else { VERIFY_PATH };
        let mut url = ControlUrl::parse(&format!("{scheme}://{authority}"))?;
        url.roots = roots::load(ca_file)?;
        Ok(Self {
            url,
            path: path.to_owned(),
            names: Names::default(),
            slots: Semaphore::new(ASKED_MAX),
            slots_again: Semaphore::new(ASKED_AGAIN_MAX),
            idle: Mutex::default(),
        })
    }

    async fn ask(&self, key: NodePublic, source: IpAddr, again: bool) -> Verdict {
        let slots = if again {
            &self.slots_again
        } else {
            &self.slots
        };
        let Ok(_slot) = slots.acquire().await else {
            return Verdict::Silent(anyhow!("the relay ends"));
        };
        let question = Question {
            node_public: key,
            source,
        };
        let body = match serde_json::to_vec(&question) {
            Ok(body) => Bytes::from(body),
            Err(error) => return Verdict::Nonsense(error.into()),
        };
        // A connection that was kept may have been closed meanwhile.
        let kept = lock(&self.idle).pop();
        if let Some(kept) = kept
            && let Ok(verdict) = self.post(kept, body.clone()).await
        {
            return verdict;
        }
        let asked = async { self.post(self.connect().await?, body).await };
        asked.await.unwrap_or_else(Verdict::Silent)
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let stream = self.url.connect(&self.names, ANSWER_LIMIT, false).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the verifier");
            }
        });
        Ok(sender)
    }

    async fn post(&self, mut to: SendRequest<Full<Bytes>>, body: Bytes) -> anyhow::Result<Verdict> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.path)
            .header(header::HOST, self.url.authority())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        to.ready().await?;
        let response = to.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LEN_MAX).collect();
        let body = body.await.map_err(|error| anyhow!(error))?.to_bytes();
        lock(&self.idle).push(to);
        if status != StatusCode::OK {
            return Ok(Verdict::Nonsense(anyhow!("HTTP status {status}")));
        }
        Ok(match serde_json::from_slice::<Answer>(&body) {
            Ok(answer) => Verdict::of(answer.allow),
            Err(error) => Verdict::Nonsense(error.into()),
        })
    }
}
