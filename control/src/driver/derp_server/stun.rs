//! STUN beside the relay: one socket, one task.

use std::sync::Arc;

use tokio::net::UdpSocket;

use super::Shared;
use crate::stun;

/// Requests are 40 bytes; longer ones with other attributes still fit.
const DATAGRAM_LEN_MAX: usize = 1500;

/// Answers requests for ever. With `any` also those of ordinary STUN tools.
pub(super) async fn serve(shared: Arc<Shared>, socket: UdpSocket, any: bool) {
    let counters = &shared.counters;
    let mut datagram = [0; DATAGRAM_LEN_MAX];
    loop {
        // An error here is an ICMP answer to an earlier datagram, nothing about this one.
        let Ok((len, from)) = socket.recv_from(&mut datagram).await else {
            continue;
        };
        let respond = if any {
            stun::respond_to_any
        } else {
            stun::respond
        };
        let Some(answer) = respond(&datagram[..len], from) else {
            counters.stun_ignored.add(1);
            continue;
        };
        // A full send buffer loses the answer; waiting would lose the next requests.
        let counter = match socket.try_send_to(answer.as_ref(), from) {
            Ok(_) => &counters.stun_answered,
            Err(_) => &counters.stun_send_errors,
        };
        counter.add(1);
    }
}
