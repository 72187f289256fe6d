//! The meta-certificate, which carries the relay's key inside the TLS handshake, and the little
//! of X.509 that pinning a relay's certificate needs.
//!
//! The relay appends one certificate behind its real chain: version 3, serial number = protocol
//! version, subject and issuer `CN=derpkey<64 hex digits of the node key>` and nothing else, a
//! throw-away Ed25519 key, valid 30 days around the start, basicConstraints critical and empty.
//! The name has 71 characters where X.509 allows 64, so builders refuse it and the DER is made by
//! hand. It is trusted because the TLS handshake covers it, not for its own signature.
//! Source: `derp/derpserver`, `derp/derphttp` in tailscale/tailscale.

use crate::key::{NodePublic, parse_hex};

/// What the common name of a meta-certificate begins with.
pub const META_PREFIX: &str = "derpkey";

/// Half the validity of a meta-certificate in seconds: 30 days.
pub const META_VALIDITY_SECS: i64 = 30 * 24 * 3600;

mod tag {
    pub(super) const BOOLEAN: u8 = 0x01;
    pub(super) const INTEGER: u8 = 0x02;
    pub(super) const BIT_STRING: u8 = 0x03;
    pub(super) const OCTET_STRING: u8 = 0x04;
    pub(super) const OID: u8 = 0x06;
    pub(super) const PRINTABLE: u8 = 0x13;
    pub(super) const UTC_TIME: u8 = 0x17;
    pub(super) const GENERALIZED_TIME: u8 = 0x18;
    pub(super) const SEQUENCE: u8 = 0x30;
    pub(super) const SET: u8 = 0x31;
    pub(super) const VERSION: u8 = 0xa0;
    pub(super) const EXTENSIONS: u8 = 0xa3;
}

const OID_ED25519: &[u8] = &[0x2b, 0x65, 0x70];
const OID_COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const OID_BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];

/// Builds the meta-certificate of a relay.
///
/// `now` is Unix seconds, `signer_public` a throw-away Ed25519 public key and `sign` signs with
/// its private half.
pub fn build_meta<E>(
    relay: &NodePublic,
    version: u8,
    now: i64,
    signer_public: &[u8; 32],
    sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    let name = format!("{META_PREFIX}{}", relay.to_hex());
    let name = der(
        tag::SEQUENCE,
        &[&der(
            tag::SET,
            &[&der(
                tag::SEQUENCE,
                &[
                    &der(tag::OID, &[OID_COMMON_NAME]),
                    &der(tag::PRINTABLE, &[name.as_bytes()]),
                ],
            )],
        )],
    );
    let algorithm = der(tag::SEQUENCE, &[&der(tag::OID, &[OID_ED25519])]);
    let validity = der(
        tag::SEQUENCE,
        &[
            &time(now - META_VALIDITY_SECS),
            &time(now + META_VALIDITY_SECS),
        ],
    );
    let key = der(
        tag::SEQUENCE,
        &[&algorithm, &der(tag::BIT_STRING, &[&[0], signer_public])],
    );
    let constraints = der(
        tag::SEQUENCE,
        &[
            &der(tag::OID, &[OID_BASIC_CONSTRAINTS]),
            &der(tag::BOOLEAN, &[&[0xff]]),
            &der(tag::OCTET_STRING, &[&der(tag::SEQUENCE, &[])]),
        ],
    );
    let body = der(
        tag::SEQUENCE,
        &[
            &der(tag::VERSION, &[&der(tag::INTEGER, &[&[2]])]),
            &der(tag::INTEGER, &[&[version]]),
            &algorithm,
            &name,
            &validity,
            &name,
            &key,
            &der(tag::EXTENSIONS, &[&der(tag::SEQUENCE, &[&constraints])]),
        ],
    );
    let signature = sign(&body)?;
    Ok(der(
        tag::SEQUENCE,
        &[
            &body,
            &algorithm,
            &der(tag::BIT_STRING, &[&[0], &signature]),
        ],
    ))
}

/// The relay's key and protocol version from the first meta-certificate of a chain, if any.
pub fn relay_key<'a>(chain: impl IntoIterator<Item = &'a [u8]>) -> Option<(NodePublic, u8)> {
    chain.into_iter().find_map(|certificate| {
        let brief = Brief::parse(certificate)?;
        let hex = brief.common_name?.strip_prefix(META_PREFIX)?;
        let key = NodePublic(parse_hex(hex).ok()?);
        let [version] = *brief.serial else {
            return None;
        };
        Some((key, version))
    })
}

/// Whether a certificate is a meta-certificate by its name, well-formed or not.
pub fn is_meta(certificate: &[u8]) -> bool {
    Brief::parse(certificate)
        .and_then(|brief| brief.common_name)
        .is_some_and(|name| name.starts_with(META_PREFIX))
}

/// The few fields of a certificate that are read here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Brief<'a> {
    /// The serial number, big-endian, without the sign byte.
    pub serial: &'a [u8],
    /// The last common name of the subject.
    pub common_name: Option<&'a str>,
    /// Unix seconds from which it is valid.
    pub not_before: i64,
    /// Unix seconds up to which it is valid.
    pub not_after: i64,
}

impl<'a> Brief<'a> {
    /// Reads a DER certificate (RFC 5280 §4.1), or nothing if it is not one.
    pub fn parse(certificate: &'a [u8]) -> Option<Self> {
        let (mut outer, _) = expect(certificate, tag::SEQUENCE)?;
        let mut body = take(&mut outer, tag::SEQUENCE)?;
        if body.first() == Some(&tag::VERSION) {
            take(&mut body, tag::VERSION)?;
        }
        let serial = take(&mut body, tag::INTEGER)?;
        take(&mut body, tag::SEQUENCE)?;
        take(&mut body, tag::SEQUENCE)?;
        let mut validity = take(&mut body, tag::SEQUENCE)?;
        let not_before = take_time(&mut validity)?;
        let not_after = take_time(&mut validity)?;
        let mut subject = take(&mut body, tag::SEQUENCE)?;
        let mut common_name = None;
        while !subject.is_empty() {
            let mut set = take(&mut subject, tag::SET)?;
            while !set.is_empty() {
                let mut attribute = take(&mut set, tag::SEQUENCE)?;
                let oid = take(&mut attribute, tag::OID)?;
                let (_, value, _) = element(attribute)?;
                if oid == OID_COMMON_NAME {
                    common_name = std::str::from_utf8(value).ok();
                }
            }
        }
        Some(Self {
            serial: serial
                .strip_prefix(&[0])
                .filter(|s| !s.is_empty())
                .unwrap_or(serial),
            common_name,
            not_before,
            not_after,
        })
    }
}

/// Tag, contents and what follows of the element at the front.
fn element(input: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = input.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x83 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let len = bytes.iter().fold(0, |n, &b| n << 8 | usize::from(b));
            (len, rest)
        }
        _ => return None,
    };
    let (contents, rest) = rest.split_at_checked(len)?;
    Some((tag, contents, rest))
}

fn expect(input: &[u8], want: u8) -> Option<(&[u8], &[u8])> {
    let (tag, contents, rest) = element(input)?;
    (tag == want).then_some((contents, rest))
}

fn take<'a>(input: &mut &'a [u8], want: u8) -> Option<&'a [u8]> {
    let (contents, rest) = expect(input, want)?;
    *input = rest;
    Some(contents)
}

fn take_time(input: &mut &[u8]) -> Option<i64> {
    let (kind, text, rest) = element(input)?;
    *input = rest;
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let (year, rest) = match kind {
        tag::UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i32 = year.parse().ok()?;
            // RFC 5280 §4.1.2.5.1: two digits from 50 on are of the twentieth century.
            (if year >= 50 { 1900 + year } else { 2000 + year }, rest)
        }
        tag::GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    if rest.len() != 10 || !rest.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let part = |at: usize| rest[at..at + 2].parse::<u8>().ok();
    let month = time::Month::try_from(part(0)?).ok()?;
    let date = time::Date::from_calendar_date(year, month, part(2)?).ok()?;
    let clock = time::Time::from_hms(part(4)?, part(6)?, part(8)?).ok()?;
    Some(date.with_time(clock).assume_utc().unix_timestamp())
}

/// A UTCTime up to 2049, a GeneralizedTime after it (RFC 5280 §4.1.2.5).
fn time(unix_secs: i64) -> Vec<u8> {
    let t = time::OffsetDateTime::from_unix_timestamp(unix_secs)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let rest = format!(
        "{:02}{:02}{:02}{:02}{:02}Z",
        u8::from(t.month()),
        t.day(),
        t.hour(),
        t.minute(),
        t.second()
    );
    if (1950..2050).contains(&t.year()) {
        let text = format!("{:02}{rest}", t.year() % 100);
        der(tag::UTC_TIME, &[text.as_bytes()])
    } else {
        let text = format!("{:04}{rest}", t.year());
        der(tag::GENERALIZED_TIME, &[text.as_bytes()])
    }
}

/// One element with the concatenation of `parts` as contents.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let [.., high, low] = len.to_be_bytes();
    let mut out = vec![tag];
    match len {
        0..=0x7f => out.push(low),
        0x80..=0xff => out.extend([0x81, low]),
        _ => {
            debug_assert!(len <= 0xffff, "a certificate here is below 64 KiB");
            out.extend([0x82, high, low]);
        }
    }
    for part in parts {
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derp::testing::{live, vectors};
    use rcgen::{PublicKeyData as _, SigningKey as _};

    fn ed25519(seed: [u8; 32]) -> rcgen::KeyPair {
        let mut pkcs8 = hex::decode("302e020100300506032b657004220420").unwrap();
        pkcs8.extend(seed);
        rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8.as_slice().into(), &rcgen::PKCS_ED25519)
            .unwrap()
    }

    #[test]
    fn the_published_meta_certificate_is_rebuilt_byte_for_byte() {
        let v = vectors();
        let signer = ed25519([7; 32]);
        let public: [u8; 32] = signer.der_bytes().try_into().unwrap();
        // The middle between 2026-01-01 and 2026-03-02.
        let now = 1_767_225_600 + META_VALIDITY_SECS;
        let built = build_meta(&v.public("derp_server"), 2, now, &public, |m| {
            signer.sign(m)
        });
        assert_eq!(
            hex::encode(built.unwrap()),
            hex::encode(v.meta_certificate())
        );
    }

    #[test]
    fn the_relay_key_is_found_behind_a_real_chain() {
        let recording = live("derp-session");
        let chain = recording.chain();
        let relay = NodePublic(
            recording.sessions()[0]
                .bytes("server_public")
                .try_into()
                .unwrap(),
        );
        assert_eq!(relay_key(chain.iter().map(Vec::as_slice)), Some((relay, 2)));
        assert!(!is_meta(&chain[0]));
        assert!(is_meta(&chain[1]));
        let leaf = Brief::parse(&chain[0]).unwrap();
        assert_eq!(leaf.common_name, Some("198.18.0.24"));
        assert_eq!(leaf.not_after - leaf.not_before, 365 * 24 * 3600);
    }

    #[test]
    fn a_truncated_or_damaged_certificate_is_no_panic() {
        let whole = vectors().meta_certificate();
        for len in 0..whole.len() {
            assert_eq!(Brief::parse(&whole[..len]), None);
        }
        for at in 0..whole.len() {
            for value in [0, 0x7f, 0x80, 0x84, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                let _ = relay_key([damaged.as_slice()]);
            }
        }
    }

    #[test]
    fn a_serial_above_eight_bits_is_not_a_version() {
        let v = vectors();
        let mut whole = v.meta_certificate();
        let at = whole.windows(3).position(|w| w == [2, 1, 2]).unwrap();
        // The first such window is the version field; the serial follows it.
        whole[at + 5] = 3;
        assert_eq!(
            relay_key([whole.as_slice()]),
            Some((v.public("derp_server"), 3))
        );
    }
}
