//! The address of a coordination server, and a byte stream to it.
//!
//! `https` is TLS on that port, `http` that port plain, nothing else is tried. Plain HTTP is for
//! loopback and private addresses only: on other networks the server's key could be replaced on
//! the way, and real clients would not come back after a lost connection
//! (`protocol/coordination-transport.md` §3).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::names::Names;
use super::race::{self, Target};
use super::tls::{roots, verify};
use super::underlay::Underlay;

/// A connected byte stream, plain or TLS.
pub trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

/// A parsed coordination URL.
#[derive(Clone, Debug)]
pub struct ControlUrl {
    tls: bool,
    host: String,
    port: u16,
    /// How connections stay outside of the tunnel, if they are to.
    pub(super) underlay: Underlay,
    /// Who may vouch for the server; the web's roots if nobody sets them.
    pub(super) roots: Arc<RootCertStore>,
}

impl ControlUrl {
    /// Parses `http://host[:port]` or `https://host[:port]`, with nothing but a slash behind.
    ///
    /// # Errors
    /// When the text is something else, or a plain URL names a public address; says what to write.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let (tls, rest) = if let Some(rest) = text.strip_prefix("https://") {
            (true, rest)
        } else if let Some(rest) = text.strip_prefix("http://") {
            (false, rest)
        } else {
            bail!("{text:?} is no coordination URL: write https://host or http://10.0.0.1:8080");
        };
        let authority: http::uri::Authority = rest
            .strip_suffix('/')
            .unwrap_or(rest)
            .parse()
            .with_context(|| format!("{text:?} is no coordination URL"))?;
        if authority.as_str().contains('@') || authority.host().is_empty() {
            bail!("{text:?} is no coordination URL: host and port only");
        }
        let url = Self {
            tls,
            host: authority
                .host()
                .trim_start_matches('[')
                .trim_end_matches(']')
                .to_owned(),
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            underlay: Underlay::default(),
            roots: roots::web(),
        };
        if let Ok(address) = url.host.parse() {
            url.check_address(address)?;
        }
        Ok(url)
    }

    /// Whether what the server says first can be changed on its way: plain HTTP to another machine.
    pub fn is_exposed(&self) -> bool {
        let address: Option<IpAddr> = self.host.parse().ok();
        let loopback = address.map_or(self.host == "localhost", |ip| {
            ip.to_canonical().is_loopback()
        });
        !self.tls && !loopback
    }

    /// Host name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// For the `Host` header and `:authority`.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    fn check_address(&self, address: IpAddr) -> anyhow::Result<()> {
        if !self.tls && !is_private(address) {
            bail!(
                "plain http is for loopback and private addresses only, and {address} is public: \
                 use https://{}",
                self.host
            );
        }
        Ok(())
    }

    /// Connects, within `limit` or a little later. With `authenticated_inside` any certificate will
    /// do, because the server's key is known and Noise authenticates it.
    ///
    /// # Errors
    /// When no address of the host takes the connection, or TLS fails.
    pub async fn connect(
        &self,
        names: &Names,
        limit: Duration,
        authenticated_inside: bool,
    ) -> anyhow::Result<Box<dyn ByteStream>> {
        let literal: Option<IpAddr> = self.host.parse().ok();
        let target = Target {
            known: literal.into_iter().collect(),
            name: &self.host,
            want_v4: literal.is_none(),
            want_v6: literal.is_none(),
            port: self.port,
        };
        let attempt = |address: SocketAddr| async move {
            self.check_address(address.ip())?;
            Ok::<_, anyhow::Error>(self.underlay.connect(address).await?)
        };
        let (_, stream) = race::connect(names, &target, limit, attempt)
            .await
            .context("cannot connect")?;
        self.secure(stream, authenticated_inside).await
    }

    async fn secure(
        &self,
        stream: TcpStream,
        authenticated_inside: bool,
    ) -> anyhow::Result<Box<dyn ByteStream>> {
        if !self.tls {
            return Ok(Box::new(stream));
        }
        let name = ServerName::try_from(self.host.clone()).context("not a TLS name")?;
        let roots = (!authenticated_inside).then(|| self.roots.clone());
        let config = tls_config(roots)?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .with_context(|| {
                format!(
                    "TLS with {} failed (--ca-file names who may vouch for a certificate; with \
                     --control-key any is taken)",
                    self.host
                )
            })?;
        Ok(Box::new(stream))
    }
}

/// Whether an address is loopback or private: RFC 1918, unique local, link-local.
pub fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

/// The server's certificate needs one of these to vouch for it, or nobody.
fn tls_config(roots: Option<Arc<RootCertStore>>) -> anyhow::Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .context("no TLS version to offer")?;
    let Some(roots) = roots else {
        return Ok(builder
            .dangerous()
            .with_custom_certificate_verifier(verify::any_certificate(provider))
            .with_no_client_auth());
    };
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_parse_to_scheme_host_and_port() {
        for (text, authority) in [
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://10.1.2.3", "10.1.2.3:80"),
            ("https://coord.example/", "coord.example:443"),
            ("https://[2001:db8::1]:8443", "[2001:db8::1]:8443"),
            ("http://[fd00::1]:8080", "[fd00::1]:8080"),
            ("http://localhost:1", "localhost:1"),
        ] {
            assert_eq!(ControlUrl::parse(text).unwrap().authority(), authority);
        }
    }

    #[test]
    fn plain_http_to_another_machine_is_exposed() {
        for (text, exposed) in [
            ("http://127.0.0.1:8080", false),
            ("http://[::1]:8080", false),
            ("http://localhost", false),
            ("http://10.0.0.1:8080", true),
            ("http://coord.lan", true),
            ("https://coord.example", false),
        ] {
            assert_eq!(ControlUrl::parse(text).unwrap().is_exposed(), exposed);
        }
    }

    #[tokio::test(flavor = "local")]
    async fn a_server_of_a_private_ca_is_taken_where_that_is_named_or_its_key_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        let (ca, server) = roots::tests::private_ca("127.0.0.1");
        let (_, mistaken) = roots::tests::private_ca("127.0.0.1");
        std::fs::write(&file, ca).unwrap();
        let named = roots::load(Some(&file)).unwrap();
        let listen = async |server| {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
            tokio::task::spawn_local(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let acceptor = acceptor.clone();
                    tokio::task::spawn_local(async move { acceptor.accept(stream).await });
                }
            });
            address
        };
        let (private, another) = (listen(server).await, listen(mistaken).await);
        let connect = async |host, at: SocketAddr, roots, inside| {
            let mut url = ControlUrl::parse(&format!("https://{host}:{}", at.port())).unwrap();
            let limit = Duration::from_secs(5);
            url.roots = roots;
            let stream = url.connect(&Names::default(), limit, inside).await;
            stream.map(|_| ()).map_err(|error| format!("{error:#}"))
        };
        let good = connect("127.0.0.1", private, named.clone(), false).await;
        good.unwrap();
        let good = connect("127.0.0.1", private, roots::web(), true).await;
        good.unwrap();
        for (host, at, roots) in [
            ("127.0.0.1", private, roots::web()),
            ("127.0.0.1", another, named.clone()),
            // A name that is not in the certificate.
            ("127.0.0.2", private, named),
        ] {
            let error = connect(host, at, roots, false).await.unwrap_err();
            let refused = error.contains("--ca-file") && error.contains("invalid peer certificate");
            assert!(refused || host == "127.0.0.2", "{error}");
        }
    }

    #[test]
    fn what_is_no_url_or_plain_on_a_public_address_is_refused() {
        for text in [
            "10.0.0.1:8080",
            "ftp://10.0.0.1",
            "http://",
            "https://a b",
            "https://host/path",
            "https://user@host",
        ] {
            assert!(ControlUrl::parse(text).is_err(), "{text}");
        }
        for text in [
            "http://192.0.2.1",
            "http://100.64.0.1:8080",
            "http://[2001:db8::1]",
        ] {
            let error = ControlUrl::parse(text).unwrap_err().to_string();
            assert!(error.contains("private"), "{error}");
        }
    }
}
