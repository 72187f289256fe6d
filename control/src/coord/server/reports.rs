//! Map requests: what a node reports of itself, and what it asks for.

use std::net::SocketAddr;
use std::time::Instant;

use serde_json::Value;
use time::OffsetDateTime;

use super::sessions::SessionId;
use super::store::expired;
use super::{CAPABILITY_VERSION_MIN, ENDPOINTS_MAX, HOSTINFO_LEN_MAX, Server};
use crate::coord::STAYED_AWAY;
use crate::key::MachinePublic;
use crate::netmap::wire::{MapRequest, MapResponse};

/// What a map request leads to.
#[derive(Clone, Debug, PartialEq)]
pub enum MapAnswer {
    /// State taken; the answer is empty.
    Taken,
    /// One message, then the end.
    Once(Box<MapResponse>),
    /// Messages from now on.
    Stream(SessionId),
}

/// Why a map request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapRefusal {
    /// HTTP 400.
    #[error("unsupported client version: ({0})")]
    Version(i64),
    /// HTTP 404: no such node on this machine.
    #[error("node not found")]
    NotFound,
    /// HTTP 404: there was one, and nobody removed it.
    #[error("{STAYED_AWAY}")]
    StayedAway,
    /// HTTP 400.
    #[error("Hostinfo is over {HOSTINFO_LEN_MAX} bytes")]
    Hostinfo,
    /// HTTP 400: nothing of such a node is taken, and it is told nothing but by a stream.
    #[error("the key of this node has expired")]
    Expired,
}

impl Server {
    /// Handles a map request of the machine.
    ///
    /// # Errors
    /// With the HTTP status of each [`MapRefusal`].
    pub fn handle_map(
        &mut self,
        now: Instant,
        wall: OffsetDateTime,
        machine: MachinePublic,
        request: &MapRequest,
        random: f64,
    ) -> Result<MapAnswer, MapRefusal> {
        if request.version < CAPABILITY_VERSION_MIN {
            return Err(MapRefusal::Version(request.version));
        }
        let Some(entry) = self.find(machine, request.node_key) else {
            let away = self.stayed_away.contains(&(machine, request.node_key));
            return Err(if away {
                MapRefusal::StayedAway
            } else {
                MapRefusal::NotFound
            });
        };
        let mut record = entry.record.clone();
        let id = record.id;
        if expired(&record) {
            // By a stream it hears how it stands, and when that changes.
            return if request.stream {
                Ok(MapAnswer::Stream(
                    self.open_session(now, wall, id, request, random),
                ))
            } else {
                Err(MapRefusal::Expired)
            };
        }
        record.capver = request.version;
        if !request.disco_key.is_zero() {
            record.disco = Some(request.disco_key);
        }
        if let Some(endpoints) = &request.endpoints {
            record.endpoints = endpoints.iter().copied().filter(is_endpoint).collect();
            record.endpoints.truncate(ENDPOINTS_MAX);
        }
        if let Some(hostinfo) = request.hostinfo.clone().filter(Value::is_object) {
            if hostinfo.to_string().len() > HOSTINFO_LEN_MAX {
                return Err(MapRefusal::Hostinfo);
            }
            self.take_hostinfo(&mut record, hostinfo);
            self.approve_own(&mut record);
        }
        if entry.record != record {
            self.replace(now, record);
        }
        if !request.stream {
            if request.omit_peers {
                return Ok(MapAnswer::Taken);
            }
            self.look();
            return Ok(MapAnswer::Once(Box::new(self.full(wall, id))));
        }
        Ok(MapAnswer::Stream(
            self.open_session(now, wall, id, request, random),
        ))
    }
}

/// Whether an address can be an endpoint: no multicast, no link-local IPv6, not unspecified.
pub(super) fn is_endpoint(endpoint: &SocketAddr) -> bool {
    let ip = endpoint.ip();
    let link_local = match endpoint {
        SocketAddr::V4(_) => false,
        SocketAddr::V6(v6) => v6.ip().is_unicast_link_local() || v6.scope_id() != 0,
    };
    endpoint.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !link_local
}
