//! Which certificate a server has to show: a relay, per entry of the DERP map.
//!
//! | `DerpNode` | what is checked |
//! |---|---|
//! | nothing special | chain to a root ([`roots`](super::roots)), name = host name |
//! | `CertName: "x.example"` | the same with that name (the SNI stays the host name) |
//! | `CertName: "sha256-raw:<hex>"` | exactly this one certificate, its dates, and that it covers the SNI if one is sent |
//! | `InsecureForTests` | nothing |
//!
//! The meta-certificate behind the chain is left out of all of it. In every case the handshake
//! itself proves that the relay holds the certificate's key. Source: `net/tlsdial` in
//! tailscale/tailscale.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use ringtail_dataplane::steady_wall;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use sha2::{Digest as _, Sha256};

use crate::derp::cert::{self, Brief};
use crate::netmap::DerpNode;

/// What a pin begins with.
pub const PIN_PREFIX: &str = "sha256-raw:";

/// The pin of a certificate, as it stands in a DERP map: over its whole DER, in lower case.
pub fn pin_of(certificate: &[u8]) -> String {
    let mut text = PIN_PREFIX.to_owned();
    for byte in Sha256::digest(certificate) {
        write!(text, "{byte:02x}").expect("a String takes every write");
    }
    text
}

/// Makes TLS configurations for the nodes of a DERP map.
#[derive(Debug)]
pub struct Verifiers {
    provider: Arc<CryptoProvider>,
    web: Arc<WebPkiServerVerifier>,
}

impl Verifiers {
    /// Verifiers that trust these roots, of which there is one at least.
    pub fn new(roots: Arc<RootCertStore>) -> Self {
        let provider = super::provider();
        let web = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .expect("roots make a verifier");
        Self { provider, web }
    }

    /// The configuration and the name (SNI) with which a node is dialled.
    ///
    /// # Errors
    /// When the host name or `CertName` is not a possible name.
    pub fn client_config(
        &self,
        node: &DerpNode,
    ) -> anyhow::Result<(Arc<ClientConfig>, ServerName<'static>)> {
        let name = server_name(&node.host_name)?;
        let check = if node.insecure_for_tests {
            Check::Nothing
        } else if node.cert_name.starts_with(PIN_PREFIX) {
            Check::Pin(node.cert_name.clone())
        } else if node.cert_name.is_empty() {
            Check::Web(self.web.clone(), name.clone())
        } else {
            Check::Web(self.web.clone(), server_name(&node.cert_name)?)
        };
        let provider = self.provider.clone();
        let verifier = Verifier { check, provider };
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.resumption = rustls::client::Resumption::disabled();
        Ok((Arc::new(config), name))
    }
}

fn server_name(text: &str) -> anyhow::Result<ServerName<'static>> {
    ServerName::try_from(text.to_owned())
        .map_err(|_| anyhow::anyhow!("{text:?} is not a host name or address that TLS can check"))
}

#[derive(Debug)]
enum Check {
    Nothing,
    Pin(String),
    Web(Arc<WebPkiServerVerifier>, ServerName<'static>),
}

/// Takes any certificate, for a server whose key is known and shown inside the TLS stream.
pub fn any_certificate(provider: Arc<CryptoProvider>) -> Arc<dyn ServerCertVerifier> {
    let check = Check::Nothing;
    Arc::new(Verifier { check, provider })
}

#[derive(Debug)]
struct Verifier {
    check: Check,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check_pin(
        &self,
        pin: &str,
        leaf: &CertificateDer<'_>,
        others: usize,
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let shown = pin_of(leaf);
        if others > 0 {
            return Err(Error::General(
                "the relay shows a chain of certificates where the DERP map pins a single one"
                    .to_owned(),
            ));
        }
        if shown != pin {
            return Err(Error::General(format!(
                "the relay's certificate is {shown} but the DERP map's CertName wants {pin}"
            )));
        }
        let brief = Brief::parse(leaf).ok_or(CertificateError::BadEncoding)?;
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if now < brief.not_before {
            return Err(CertificateError::NotValidYet.into());
        }
        if now > brief.not_after {
            return Err(CertificateError::Expired.into());
        }
        if matches!(name, ServerName::DnsName(_)) {
            let parsed = ParsedCertificate::try_from(leaf)?;
            rustls::client::verify_server_name(&parsed, name)?;
        }
        Ok(())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain: Vec<CertificateDer<'_>> = intermediates
            .iter()
            .filter(|certificate| !cert::is_meta(certificate))
            .cloned()
            .collect();
        let check = |now| match &self.check {
            Check::Nothing => Ok(ServerCertVerified::assertion()),
            Check::Pin(pin) => self
                .check_pin(pin, leaf, chain.len(), name, now)
                .map(|()| ServerCertVerified::assertion()),
            Check::Web(web, wanted) => web.verify_server_cert(leaf, &chain, wanted, ocsp, now),
        };
        match check(now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
            )) => {
                // The system's clock may be behind what we know the time to be at least.
                check(UnixTime::since_unix_epoch(
                    steady_wall().max(Duration::from_secs(now.as_secs())),
                ))
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, leaf, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, leaf, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
