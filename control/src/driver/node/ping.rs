//! Pings through the tunnel, for `ringtail ping`: by TSMP, which the peer's node answers, and to its peer
//! API, as far as the hosts of both let it pass.

use std::net::SocketAddr;
use std::time::Duration;

use ringtail_dataplane::Ping;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{Node, now};
use crate::agent::{Inside, millis};
use crate::driver::dns::visit_peerapi;
use crate::driver::local_api::Call;

/// How long an answer is waited for.
const LIMIT: Duration = Duration::from_secs(5);
const LATE: &str = "no answer within 5 s";

impl Node {
    /// Has the peer's node answer by TSMP.
    pub(super) fn ping_tsmp(&mut self, there: Inside, call: Call) {
        let number = self.next_question();
        let (told, pong) = oneshot::channel();
        self.pongs.retain(|_, waiting| !waiting.is_closed());
        self.pongs.insert(number, told);
        let started = now();
        let ping = Ping {
            number,
            src: there.ours,
            dst: there.theirs,
        };
        self.dataplane.ping(there.peer, ping);
        tokio::task::spawn_local(async move {
            let answer = match timeout(LIMIT, pong).await {
                Ok(Ok(port)) => json!({"peer": there.name, "via": "tsmp", "address": there.theirs,
                    "peerapi": port, "latency_ms": millis(now() - started)}),
                Ok(Err(_)) | Err(_) => json!({"peer": there.name, "reason": LATE}),
            };
            call.answer(answer);
        });
    }
}

/// Has the peer's API answer.
pub(super) async fn ping_peerapi(there: Inside, call: Call) {
    let Some(port) = there.peerapi else {
        let why = format!("{} has told of no peer API at {}", there.name, there.theirs);
        return call.refuse(&why);
    };
    let started = now();
    let at = SocketAddr::new(there.theirs, port);
    let visited = timeout(LIMIT, visit_peerapi(at)).await;
    let reason = match visited {
        Ok(Ok(())) => {
            return call.answer(json!({"peer": there.name, "via": "peerapi", "address": at,
                "latency_ms": millis(now() - started)}));
        }
        Ok(Err(error)) => format!("http://{at}: {error}"),
        Err(_) => LATE.to_owned(),
    };
    call.answer(json!({"peer": there.name, "reason": reason}));
}
