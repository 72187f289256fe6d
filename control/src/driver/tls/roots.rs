//! Who may vouch for relays and coordination: the web's roots, which are built in, those of the host, and
//! those in a file that a person named.
//!
//! The host's are found as other programs find them: its own store, or what SSL_CERT_FILE and
//! SSL_CERT_DIR name in its place. What cannot be read of it is logged, since the built-in roots
//! remain; what a person named must be right.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// Reasons shown of all for which certificates of the host's store are left out.
const REASONS_SHOWN: usize = 3;

/// The built-in roots alone.
pub fn web() -> Arc<RootCertStore> {
    Arc::new(built_in())
}

/// All roots, those of the PEM file `ca_file` among them.
///
/// # Errors
/// That file cannot be read, holds no certificate, or one that can be no root.
pub fn load(ca_file: Option<&Path>) -> anyhow::Result<Arc<RootCertStore>> {
    let mut roots = built_in();
    let host = rustls_native_certs::load_native_certs();
    let (found, broken) = roots.add_parsable_certificates(host.certs);
    if broken > 0 || !host.errors.is_empty() {
        let errors = host.errors.iter().take(REASONS_SHOWN);
        let reasons: Vec<String> = errors.map(ToString::to_string).collect();
        tracing::warn!(
            unread = host.errors.len(),
            broken,
            reasons = reasons.join("; "),
            "some of the host's root certificates are left out"
        );
    }
    if let Some(path) = ca_file {
        add_file(&mut roots, path)?;
    }
    tracing::debug!(
        found,
        all = roots.len(),
        "root certificates of the host and all"
    );
    Ok(Arc::new(roots))
}

fn built_in() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    roots
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .with_context(|| format!("cannot read certificates from {shown}"))?;
    if certificates.is_empty() {
        bail!("{shown} holds no certificate (PEM is expected)");
    }
    for (index, certificate) in certificates.into_iter().enumerate() {
        let nth = index + 1;
        let added = roots.add(certificate);
        added.with_context(|| format!("certificate {nth} of {shown} can be no root"))?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::ServerConfig;
    use rustls::pki_types::PrivateKeyDer;

    use super::*;

    /// A private CA, in PEM, and a server whose certificate it has signed, for a name or address.
    pub(crate) fn private_ca(server: &str) -> (String, ServerConfig) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        let leaf_key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new([server.to_owned()]).unwrap();
        let leaf = leaf.signed_by(&leaf_key, &issuer).unwrap();
        let chain = vec![leaf.der().clone()];
        let leaf_key = PrivateKeyDer::try_from(leaf_key.serialize_der()).unwrap();
        (
            ca.pem(),
            super::super::server_config(chain, leaf_key).unwrap(),
        )
    }

    #[test]
    fn a_file_adds_its_certificates_or_says_what_is_wrong_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let without = load(None).unwrap().len();
        assert!(without >= web().len(), "the built-in ones are always there");
        let (one, other) = (private_ca("a.example").0, private_ca("b.example").0);
        std::fs::write(&path, format!("# two\n{one}{other}")).unwrap();
        assert_eq!(load(Some(&path)).unwrap().len(), without + 2);
        let complaint = |text: &str| {
            std::fs::write(&path, text).unwrap();
            format!("{:#}", load(Some(&path)).unwrap_err())
        };
        assert!(complaint("").contains("holds no certificate"));
        assert!(complaint("not PEM").contains("holds no certificate"));
        let cut = &one[..one.len() / 2];
        assert!(complaint(cut).contains("cannot read certificates"));
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let said = complaint(&format!("{one}{garbage}"));
        assert!(said.contains("certificate 2 of") && said.contains("can be no root"));
        let missing = load(Some(&dir.path().join("missing"))).unwrap_err();
        assert!(format!("{missing:#}").contains("missing"));
    }
}
