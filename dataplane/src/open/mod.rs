//! Takes receive batches apart: runs of datagrams that belong to one session, to be opened
//! together, and what the rest is.

#![forbid(unsafe_code)]

use crate::classify::{Class, classify, owner_shard};
use crate::stats::DropReason;

/// Datagrams of a receive batch that are next to each other and of one kind.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Run<'a> {
    /// Data for one of our receiver indexes; the bytes of all its datagrams, to be opened in place.
    Data(u32, &'a mut [u8]),
    /// One handshake message.
    Handshake(&'a [u8]),
    /// One DISCO or STUN message.
    Control(&'a [u8]),
    /// One data message of a session that another shard owns, and its length in bytes.
    Foreign(u8, usize),
    /// One datagram to drop.
    Invalid(DropReason),
}

/// Splits a batch (datagrams of `stride` bytes, the last may be shorter; empty it is one datagram) into
/// runs, in order.
pub(crate) fn runs(bytes: &mut [u8], stride: usize, shard: u8, mut each: impl FnMut(Run<'_>)) {
    let stride = stride.max(1);
    let mut open: Option<(u32, usize)> = None;
    let mut at = 0;
    loop {
        let end = (at + stride).min(bytes.len());
        let class = classify(&bytes[at..end]);
        if let Some((index, start)) = open
            && class != Class::Data(index)
        {
            each(Run::Data(index, &mut bytes[start..at]));
            open = None;
        }
        match class {
            Class::Data(index) if owner_shard(index) == shard => {
                open.get_or_insert((index, at));
            }
            Class::Data(index) => each(Run::Foreign(owner_shard(index), end - at)),
            Class::Handshake => each(Run::Handshake(&bytes[at..end])),
            Class::Disco | Class::Stun => each(Run::Control(&bytes[at..end])),
            Class::PeerRelay => each(Run::Invalid(DropReason::UnknownMessage)),
            Class::Invalid(reason) => each(Run::Invalid(reason)),
        }
        at = end;
        if at == bytes.len() {
            break;
        }
    }
    if let Some((index, start)) = open {
        each(Run::Data(index, &mut bytes[start..]));
    }
}

/// Splits lengths into groups that [`runs`] takes as one batch: equal ones, and at most one shorter
/// at the end. No group is empty; they give back `lens` in order.
pub(crate) fn groups(mut lens: &[u16]) -> impl Iterator<Item = &[u16]> {
    std::iter::from_fn(move || {
        let stride = *lens.first()?;
        let equal = lens.iter().take_while(|len| **len == stride).count();
        let tail = lens.get(equal).is_some_and(|len| *len < stride);
        let (group, rest) = lens.split_at(equal + usize::from(tail));
        lens = rest;
        Some(group)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_grouped_as_gro_would_have_them() {
        let groups = |lens: &[u16]| groups(lens).map(<[u16]>::to_vec).collect::<Vec<_>>();
        assert_eq!(groups(&[]), Vec::<Vec<u16>>::new());
        assert_eq!(groups(&[9, 9, 9, 5, 9]), [vec![9, 9, 9, 5], vec![9]]);
        assert_eq!(groups(&[5, 9, 5, 5]), [vec![5], vec![9, 5], vec![5]]);
        assert_eq!(groups(&[7, 7]), [vec![7, 7]]);
    }

    fn data(index: u32) -> Vec<u8> {
        let mut datagram = vec![4, 0, 0, 0];
        datagram.extend(index.to_le_bytes());
        datagram.resize(40, 7);
        datagram
    }

    fn collect(bytes: &[u8], stride: usize) -> Vec<(&'static str, usize)> {
        let mut all = Vec::new();
        runs(&mut bytes.to_vec(), stride, 1, |run| {
            all.push(match run {
                Run::Data(_, bytes) => ("data", bytes.len()),
                Run::Handshake(_) => ("handshake", 1),
                Run::Control(_) => ("control", 1),
                Run::Foreign(shard, _) => ("foreign", usize::from(shard)),
                Run::Invalid(_) => ("invalid", 1),
            });
        });
        all
    }

    #[test]
    fn datagrams_of_one_session_form_one_run() {
        let mut bytes = [data(0x0102), data(0x0102), data(0x0103)].concat();
        assert_eq!(collect(&bytes, 40), [("data", 80), ("data", 40)]);
        bytes.truncate(113);
        assert_eq!(collect(&bytes, 40), [("data", 80), ("data", 33)]);
        bytes.truncate(100);
        assert_eq!(collect(&bytes, 40), [("data", 80), ("invalid", 1)]);
    }

    #[test]
    fn what_is_not_ours_is_told_apart() {
        let mut disco = b"TS\xf0\x9f\x92\xac".to_vec();
        disco.resize(40, 0);
        let bytes = [data(0x0101), data(0x0301), data(0x0101), disco].concat();
        assert_eq!(
            collect(&bytes, 40),
            [("data", 40), ("foreign", 3), ("data", 40), ("control", 1)]
        );
        let mut relayed = vec![0, 0, 0x7a, 0x12, 0, 0xab, 0xcd, 0];
        runs(&mut relayed, 8, 1, |run| {
            assert_eq!(run, Run::Invalid(DropReason::UnknownMessage));
        });
        let mut initiation = vec![1, 0, 0, 0];
        initiation.resize(148, 0);
        assert_eq!(collect(&initiation, 148), [("handshake", 1)]);
    }

    #[test]
    fn garbage_of_any_length_is_one_invalid_datagram() {
        for len in 0..64 {
            assert_eq!(collect(&vec![0xee; len], len), [("invalid", 1)]);
        }
    }
}
