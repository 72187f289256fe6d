//! A tiny client of the WireGuard configuration socket, so that comparing peers needs no `wg`.
//!
//! One request configures a peer whole: one of the programs compared here panics when an
//! existing peer is set a second time.

#![forbid(unsafe_code)]

use anyhow::{Context, bail};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// `uapi`: private key, port and one peer of a userspace WireGuard interface.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Interface name, which names the socket in /var/run/wireguard.
    #[arg(long)]
    interface: String,
    /// Own private key, hex.
    #[arg(long)]
    private_key: String,
    /// Own UDP port.
    #[arg(long)]
    listen_port: u16,
    /// The peer's public key, hex.
    #[arg(long)]
    peer: String,
    /// The peer's address and port.
    #[arg(long)]
    endpoint: std::net::SocketAddr,
    /// What the peer may send from and be sent to.
    #[arg(long, value_name = "PREFIX")]
    allowed_ip: Vec<String>,
    /// Seconds to wait for the socket to appear.
    #[arg(long, default_value_t = 5.0)]
    timeout: f64,
}

/// Sends one `set` request and checks the answer.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let path = format!("/var/run/wireguard/{}.sock", args.interface);
    let deadline = crate::clock::now() + Duration::from_secs_f64(args.timeout);
    let mut stream = loop {
        match UnixStream::connect(&path) {
            Ok(stream) => break stream,
            Err(error) if crate::clock::now() > deadline => {
                return Err(error).with_context(|| format!("no answer at {path}"));
            }
            Err(_) => crate::clock::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(request(args).as_bytes())?;
    for line in BufReader::new(stream).lines() {
        match line?.strip_prefix("errno=") {
            Some("0") => return Ok(()),
            Some(code) => bail!("{} refused its configuration: errno {code}", args.interface),
            None => {}
        }
    }
    bail!("{} closed its socket without an answer", args.interface)
}

fn request(args: &Args) -> String {
    let mut text = format!(
        "set=1\nprivate_key={}\nlisten_port={}\npublic_key={}\nendpoint={}\n",
        args.private_key, args.listen_port, args.peer, args.endpoint
    );
    for prefix in &args.allowed_ip {
        let _ = writeln!(text, "allowed_ip={prefix}");
    }
    text.push('\n');
    text
}

/// `wgkeys`: prints `PRIVATE PUBLIC`, both as 64 hex digits.
pub(crate) fn print_keys() -> anyhow::Result<()> {
    let secret = x25519_dalek::StaticSecret::from(rand::random::<[u8; 32]>());
    let public = x25519_dalek::PublicKey::from(&secret);
    println!("{} {}", hex(secret.as_bytes()), hex(public.as_bytes()));
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_the_device_then_the_peer_and_ends_with_an_empty_line() {
        let text = request(&Args {
            interface: "w0".into(),
            private_key: "aa".into(),
            listen_port: 5,
            peer: "bb".into(),
            endpoint: "192.0.2.2:7".parse().expect("address"),
            allowed_ip: vec!["10.0.0.0/8".into()],
            timeout: 0.0,
        });
        assert_eq!(
            text,
            "set=1\nprivate_key=aa\nlisten_port=5\npublic_key=bb\nendpoint=192.0.2.2:7\n\
             allowed_ip=10.0.0.0/8\n\n"
        );
    }

    #[test]
    fn bytes_print_as_two_hex_digits_each() {
        assert_eq!(hex(&[0, 10, 255]), "000aff");
    }
}
