//! Dialling a region: its nodes race, a quarter of a second apart, and the first whose TLS
//! stands wins.
//!
//! tailscaled waits 1.5 s for an unreachable first node at every connect and forgets it again;
//! here the next node starts after [`NODE_STAGGER`], or at once when the one before failed, and
//! the winner goes first the next time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rustls::pki_types::ServerName;

use crate::driver::names::Names;
use crate::driver::race::{self, Target};
use crate::driver::runtime::Kind;
use crate::driver::tls::stream::Stream;
use crate::driver::tls::verify::Verifiers;
use crate::driver::tls::{ClientTls, TlsError};
use crate::driver::underlay::Underlay;
use crate::netmap::{DerpNode, DerpRegion, Family};

/// Head start of a node over the next.
const NODE_STAGGER: Duration = Duration::from_millis(250);

/// For DNS and the TCP handshake with one node.
const TCP_LIMIT: Duration = Duration::from_millis(1500);

/// Of it, for DNS: so that the error says which of the two it was.
const LOOK_UP_LIMIT: Duration = Duration::from_millis(1200);

/// For everything until packets may go.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Ciphertext read at a time.
pub(super) const READ_LEN: usize = 256 << 10;

/// Where and how to dial.
#[derive(Clone, Debug)]
pub(super) struct Dialler {
    pub(super) names: Names,
    pub(super) verifiers: Arc<Verifiers>,
    pub(super) underlay: Underlay,
    pub(super) kind: Kind,
}

/// A relay with which TLS stands; nothing has been said inside it.
#[derive(Debug)]
pub(super) struct Dialled {
    /// Its place in the region's list.
    pub(super) index: usize,
    pub(super) addr: SocketAddr,
    pub(super) stream: Stream,
    pub(super) tls: ClientTls,
}

impl Dialler {
    /// Dials the nodes of a region, the one at `first` first.
    pub(super) async fn dial(
        &self,
        region: &DerpRegion,
        first: usize,
        on_attempt: &dyn Fn(SocketAddr),
    ) -> anyhow::Result<Dialled> {
        let mut order: Vec<usize> = (0..region.nodes.len())
            .filter(|&i| !region.nodes[i].stun_only)
            .collect();
        if let Some(at) = order.iter().position(|&i| i == first) {
            order[..=at].rotate_right(1);
        }
        if order.is_empty() {
            bail!("region {} has no relay", region.region_id);
        }
        let mut waiting = order.into_iter();
        let mut running = FuturesUnordered::new();
        let mut errors: Vec<String> = Vec::new();
        loop {
            if let Some(index) = waiting.next() {
                running.push(self.dial_node(index, &region.nodes[index], on_attempt));
            }
            loop {
                let more = waiting.len() > 0;
                tokio::select! {
                    result = running.next() => match result {
                        Some((_, Ok(dialled))) => return Ok(dialled),
                        Some((index, Err(error))) => {
                            errors.push(format!("{}: {error:#}", region.nodes[index].name));
                            if more { break; }
                        }
                        None => return Err(anyhow!(errors.join("; "))),
                    },
                    () = tokio::time::sleep(NODE_STAGGER), if more => break,
                }
            }
        }
    }

    async fn dial_node(
        &self,
        index: usize,
        node: &DerpNode,
        on_attempt: &dyn Fn(SocketAddr),
    ) -> (usize, anyhow::Result<Dialled>) {
        let result = async {
            let (addr, stream) = tokio::time::timeout(TCP_LIMIT, self.connect(node, on_attempt))
                .await
                .map_err(|_| anyhow!("no TCP connection within {TCP_LIMIT:?}"))??;
            let tls = self.handshake(node, &stream).await.context("TLS")?;
            Ok(Dialled {
                index,
                addr,
                stream,
                tls,
            })
        };
        (index, result.await)
    }

    /// Both families at once; the first connection wins.
    async fn connect(
        &self,
        node: &DerpNode,
        on_attempt: &dyn Fn(SocketAddr),
    ) -> anyhow::Result<(SocketAddr, Stream)> {
        let target = target(node);
        race::connect(&self.names, &target, LOOK_UP_LIMIT, |addr| {
            on_attempt(addr);
            Stream::connect(addr, &self.underlay, self.kind)
        })
        .await
    }

    async fn handshake(&self, node: &DerpNode, stream: &Stream) -> anyhow::Result<ClientTls> {
        let (config, name): (_, ServerName<'static>) = self.verifiers.client_config(node)?;
        let mut tls = ClientTls::client(config, name)?;
        let mut buffer = Vec::with_capacity(READ_LEN);
        loop {
            let result = tls.handle_input(|_| ());
            if tls.is_established() {
                // The Finished message waits in the output, so that the first data joins it.
                return Ok(tls);
            }
            let (out, len) = tls.take_out();
            if len > 0 {
                let (written, out) = stream.write_all(out, len).await;
                written?;
                tls.give_back(out);
            }
            result.map_err(explain)?;
            let (read, back) = stream.read(buffer).await;
            buffer = back;
            if read? == 0 {
                bail!("the relay closed during the handshake");
            }
            tls.inbox.extend_from_slice(&buffer);
            buffer.clear();
        }
    }
}

/// rustls' words, with a hint where people go wrong most.
fn explain(error: TlsError) -> anyhow::Error {
    let hint = match &error {
        TlsError::Rustls(rustls::Error::InvalidCertificate(
            rustls::CertificateError::UnknownIssuer,
        )) => {
            " (for a self-signed relay put the sha256-raw: value it prints into CertName of the \
             DERP map)"
        }
        TlsError::Rustls(_) | TlsError::Exhausted | TlsError::Failed | TlsError::Flood => "",
    };
    anyhow!("{error}{hint}")
}

/// Where a node's relay listens, IPv6 first. The name is asked for each family that the map leaves
/// to DNS, whether or not it gives an address of the other.
fn target(node: &DerpNode) -> Target<'_> {
    let mut known = Vec::new();
    if let Family::Literal(v6) = node.v6() {
        known.push(v6.into());
    }
    if let Family::Literal(v4) = node.v4() {
        known.push(v4.into());
    }
    Target {
        known,
        name: &node.host_name,
        want_v4: node.v4() == Family::Resolve,
        want_v6: node.v6() == Family::Resolve,
        port: node.derp_port(),
    }
}
