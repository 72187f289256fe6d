//! A file through the tunnel: one TCP connection, paced, so that it runs across every switch.

#![forbid(unsafe_code)]

use crate::clock;
use anyhow::{Context, bail};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes per read and write.
const CHUNK: usize = 64 << 10;

/// `send`: a file to a receiver.
#[derive(Debug, clap::Args)]
pub(crate) struct SendArgs {
    /// The file.
    file: PathBuf,
    /// The receiver's address and port.
    to: SocketAddr,
    /// Pace in Mb/s; 0 is as fast as it goes.
    #[arg(long, default_value_t = 0.0)]
    rate_mbps: f64,
}

/// `receive`: a file from a sender.
#[derive(Debug, clap::Args)]
pub(crate) struct ReceiveArgs {
    /// Where the file goes.
    file: PathBuf,
    /// Address and port to listen on.
    at: SocketAddr,
    /// Seconds without a byte after which the transfer counts as cut.
    #[arg(long, default_value_t = 30)]
    timeout: u64,
}

/// Sends the file, waits until the receiver has taken all of it, and says how many bytes it was.
pub(crate) fn send(args: &SendArgs) -> anyhow::Result<()> {
    let mut file = File::open(&args.file).with_context(|| format!("{}", args.file.display()))?;
    let mut stream = TcpStream::connect_timeout(&args.to, Duration::from_secs(20))?;
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0u64;
    let start = clock::now();
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        stream.write_all(&buffer[..length])?;
        sent += u64::try_from(length)?;
        if args.rate_mbps > 0.0 {
            let due = Duration::from_secs_f64(seconds_for(sent, args.rate_mbps)?);
            clock::sleep(due.saturating_sub(start.elapsed()));
        }
    }
    stream.shutdown(Shutdown::Write)?;
    // The receiver closes once it has stored everything.
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    if stream
        .read(&mut [0; 1])
        .context("the receiver did not confirm")?
        != 0
    {
        bail!("the receiver said something unexpected");
    }
    println!("{sent} bytes in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn seconds_for(bytes: u64, rate_mbps: f64) -> anyhow::Result<f64> {
    let kilobytes = u32::try_from(bytes / 1024).context("at most 4 TiB")?;
    Ok(f64::from(kilobytes) * 1024.0 * 8.0 / (rate_mbps * 1e6))
}

/// Takes one connection and stores what it brings until it ends.
pub(crate) fn receive(args: &ReceiveArgs) -> anyhow::Result<()> {
    let listener =
        TcpListener::bind(args.at).with_context(|| format!("listening at {}", args.at))?;
    store(&listener, &args.file, Duration::from_secs(args.timeout))
}

fn store(listener: &TcpListener, file: &Path, timeout: Duration) -> anyhow::Result<()> {
    let mut file = File::create(file)?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(timeout))?;
    let mut buffer = vec![0; CHUNK];
    let mut received = 0u64;
    loop {
        let length = stream.read(&mut buffer).context("the transfer was cut")?;
        if length == 0 {
            break;
        }
        file.write_all(&buffer[..length])?;
        received += u64::try_from(length)?;
    }
    file.flush()?;
    println!("{received} bytes");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_arrives_whole_and_at_its_pace() -> anyhow::Result<()> {
        let base = std::env::temp_dir().join(format!("rt-transfer-{}", std::process::id()));
        let (from, to) = (base.with_extension("in"), base.with_extension("out"));
        let bytes: Vec<u8> = (0..200_000u32).flat_map(u32::to_be_bytes).collect();
        std::fs::write(&from, &bytes)?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let args = SendArgs {
            file: from.clone(),
            to: listener.local_addr()?,
            rate_mbps: 32.0,
        };
        let stored = to.clone();
        let receiver =
            std::thread::spawn(move || store(&listener, &stored, Duration::from_secs(5)));
        let start = clock::now();
        send(&args)?;
        assert!(
            start.elapsed().as_millis() >= 190,
            "800 kB at 32 Mb/s take 0.2 s"
        );
        receiver
            .join()
            .map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        assert_eq!(std::fs::read(&to)?, bytes);
        std::fs::remove_file(from)?;
        std::fs::remove_file(to)?;
        Ok(())
    }
}
