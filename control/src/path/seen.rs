//! Datagrams seen already, by their nonces.
//!
//! A DISCO message bears no time, so one that somebody has recorded opens as well as the first time.
//! A nonce is random and of one datagram; what bears one of the last is dropped before anything is
//! opened.

use std::collections::VecDeque;

use crate::disco::NONCE_LEN;

/// Nonces remembered per DISCO key: some minutes of a quiet peer's.
const SEEN_MAX: usize = 128;

/// The nonces of the last datagrams that opened. Eight bytes of each tell them apart.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(VecDeque<u64>);

impl Seen {
    pub(super) fn contains(&self, nonce: &[u8; NONCE_LEN]) -> bool {
        self.0.contains(&short(nonce))
    }

    pub(super) fn insert(&mut self, nonce: &[u8; NONCE_LEN]) {
        if self.0.len() == SEEN_MAX {
            self.0.pop_front();
        }
        self.0.push_back(short(nonce));
    }
}

fn short(nonce: &[u8; NONCE_LEN]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *nonce;
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}
