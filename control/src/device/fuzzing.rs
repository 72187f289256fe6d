//! The whole way from bytes to a device, for fuzzers and for the ordinary tests that replay what
//! they found.

use super::Device;
use crate::uapi::{DeviceStatus, Parser, PeerStatus, READ_LEN_MAX, Reply, Request};

/// Feeds a connection's bytes to a fresh device, cut into pieces as the first byte says, and reads
/// the device back at the end. Panics where a rule is broken.
pub fn connection(input: &[u8]) {
    let (cut, bytes) = input.split_first().unwrap_or((&0, &[]));
    let mut device = Device::default();
    let mut parser = Parser::new(|name| (name == "eth0").then_some(2));
    for piece in bytes.chunks((usize::from(*cut) + 1).min(READ_LEN_MAX)) {
        parser.handle_bytes(piece);
        requests(&mut parser, &mut device);
    }
    parser.handle_end();
    requests(&mut parser, &mut device);
    assert!(parser.is_closed());
    let ids = device.peers().map(|(id, _)| id).collect();
    let (mut configs, _) = device.peers_now(&ids);
    let prefixes: usize = configs.iter().map(|peer| peer.allowed_ips.len()).sum();
    assert_eq!(configs.len(), device.peers_len());
    assert_eq!(prefixes, device.allowed_ips_len());
    configs.sort_by_key(|peer| peer.id);
    configs.dedup_by_key(|peer| peer.id);
    assert_eq!(
        configs.len(),
        device.peers_len(),
        "an id was given out twice"
    );
}

fn requests(parser: &mut Parser, device: &mut Device) {
    while let Some(request) = parser.poll_request() {
        match request {
            Request::Get => {
                let reply = device.reply(DeviceStatus::default(), &|_| PeerStatus::default());
                assert!(reply.as_bytes().ends_with(b"errno=0\n\n"));
            }
            Request::BadGet(errno) => drop(Reply::to_bad_get(errno)),
            Request::Set(Ok(transaction)) => {
                if device.check(&transaction).is_ok() {
                    device.apply(transaction);
                }
            }
            Request::Set(Err(errno)) => drop(Reply::to_set(Err(errno))),
        }
    }
}
