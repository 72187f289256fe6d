//! The relay's key and certificate on disk.
//!
//! | file | holds | mode |
//! |---|---|---|
//! | `derp-key.json` | `{"PrivateKey":"privkey:<hex>"}`, derper's form | 0600 |
//! | `<hostname>.crt`, `<hostname>.key` | self-signed certificate and its key, PEM | 0600 |

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, bail};
use rcgen::{PublicKeyData as _, SigningKey as _};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, DnsName, PrivateKeyDer};
use serde::{Deserialize, Serialize};

use crate::derp::{PROTOCOL_VERSION, cert};
use crate::driver::clock::wall;
use crate::driver::files::{self, Readers};
use crate::key::{NodePrivate, NodePublic};

/// Years a self-signed certificate is good for. Nodes pin it by its hash, so that a new one means
/// a new DERP map.
const SELF_SIGNED_YEARS: i32 = 10;

/// A certificate chain, leaf first, and the leaf's key.
pub type ChainAndKey = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

#[derive(Serialize, Deserialize)]
struct KeyFile {
    #[serde(rename = "PrivateKey")]
    private_key: zeroize::Zeroizing<String>,
}

/// Loads the relay's key, making one the first time.
///
/// # Errors
/// A file that others can read, is damaged, or cannot be written.
pub fn relay_key(path: &Path) -> anyhow::Result<NodePrivate> {
    let shown = path.display();
    let Some(text) = files::read(path, Readers::Nobody)? else {
        let private = NodePrivate::generate();
        let file = KeyFile {
            private_key: private.to_text(),
        };
        files::write(path, &zeroize::Zeroizing::new(serde_json::to_vec(&file)?))?;
        return Ok(private);
    };
    let file: KeyFile = serde_json::from_slice(&text)
        .map_err(|_| anyhow::anyhow!("{shown} is not a relay key file"))?;
    file.private_key
        .parse()
        .with_context(|| format!("{shown} is not a relay key file"))
}

/// Reads a PEM chain and its key.
///
/// # Errors
/// Files that are missing or hold something else.
pub fn read_chain(chain: &Path, key: &Path) -> anyhow::Result<ChainAndKey> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(chain)
        .and_then(Iterator::collect)
        .with_context(|| format!("cannot read certificates from {}", chain.display()))?;
    if certificates.is_empty() {
        bail!("{} holds no certificate", chain.display());
    }
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("cannot read a private key from {}", key.display()))?;
    Ok((certificates, key))
}

/// The self-signed certificate for a host name or address, made and kept in `dir` the first time:
/// ECDSA P-256, which costs a handshake a tenth of RSA.
///
/// # Errors
/// Files that are damaged or cannot be written, a host name no certificate can carry.
pub fn self_signed(dir: &Path, hostname: &str) -> anyhow::Result<ChainAndKey> {
    // An IPv6 address or a wildcard must not become a path.
    let stem: String = hostname
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-._".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect();
    let (chain, key) = (
        dir.join(format!("{stem}.crt")),
        dir.join(format!("{stem}.key")),
    );
    if chain.exists() && files::read(&key, Readers::Nobody)?.is_some() {
        return read_chain(&chain, &key);
    }
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let certificate = certificate_params(hostname)?.self_signed(&pair)?;
    let key_text = zeroize::Zeroizing::new(pair.serialize_pem());
    files::write(&key, key_text.as_bytes())?;
    files::write(&chain, certificate.pem().as_bytes())?;
    read_chain(&chain, &key)
}

fn certificate_params(hostname: &str) -> anyhow::Result<rcgen::CertificateParams> {
    use rcgen::{
        DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
    };
    let mut params = rcgen::CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, hostname);
    params.distinguished_name = name;
    let refused =
        || format!("{hostname:?} is neither an address nor a name a certificate can carry");
    let san = match hostname.parse::<IpAddr>() {
        Ok(ip) => SanType::IpAddress(ip),
        Err(_) => {
            // The builder would take any ASCII text.
            DnsName::try_from(hostname).with_context(refused)?;
            SanType::DnsName(hostname.try_into().with_context(refused)?)
        }
    };
    params.subject_alt_names = vec![san];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let now = wall();
    // A node's clock may be behind.
    params.not_before = now - time::Duration::days(1);
    params.not_after = now + time::Duration::days(365 * i64::from(SELF_SIGNED_YEARS));
    Ok(params)
}

/// The certificate that carries the relay's key inside the handshake, with a throw-away key.
///
/// # Errors
/// The system gives no randomness.
pub fn meta_certificate(relay: &NodePublic) -> anyhow::Result<CertificateDer<'static>> {
    let signer = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let public: [u8; 32] = signer
        .der_bytes()
        .try_into()
        .context("an Ed25519 public key has 32 bytes")?;
    let now = wall().unix_timestamp();
    let der = cert::build_meta(relay, PROTOCOL_VERSION, now, &public, |body| {
        signer.sign(body)
    })?;
    Ok(der.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn key_and_certificate_are_made_once_private_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("derp-key.json");
        let key = relay_key(&path).unwrap();
        assert_eq!(relay_key(&path).unwrap().public(), key.public());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\"PrivateKey\":\"privkey:"));
        for host in ["192.0.2.1", "2001:db8::1", "relay.example"] {
            let (first, _) = self_signed(dir.path(), host).unwrap();
            let (again, _) = self_signed(dir.path(), host).unwrap();
            assert_eq!(first, again);
            assert_eq!(first.len(), 1);
        }
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let mode = entry.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(
            relay_key(&path)
                .unwrap_err()
                .to_string()
                .contains("chmod 600")
        );
        assert!(self_signed(dir.path(), "no such name").is_err());
    }
}
