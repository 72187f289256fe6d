//! `ringtail device`.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, bail};
use clap::Args;
use ringtail_dataplane::{
    MTU_MAX, MTU_MIN, Offloads, SHARDS_MAX, pinned_by_default, shards_by_default,
};

use crate::config::{DriverName, EngineName};
use crate::driver::background::{self, Child};
use crate::driver::device::{self, Options};

/// The program is a device when it is called by this name.
pub(super) const LINK_NAME: &str = "ringtail-wg";
/// Names the state directory where `wg-quick` starts the device, without options.
const STATE_DIR_VARIABLE: &str = "RINGTAIL_DEVICE_STATE_DIR";
/// Inner MTU unless told otherwise: what fits into 1500 bytes with an IPv6 header outside.
const MTU_DEFAULT: u16 = 1420;

/// Run a WireGuard interface that `wg` and `wg-quick` configure.
///
/// Makes the interface IFNAME, down and without addresses, and its socket
/// /var/run/wireguard/IFNAME.sock, and goes to the background once both are there. It ends on
/// SIGTERM, when the interface is removed (`ip link del IFNAME`), or when the socket is deleted.
///
/// `wg-quick` starts it where WG_QUICK_USERSPACE_IMPLEMENTATION names a link `ringtail-wg` to this
/// program: called by that name it is `ringtail device`.
///
/// Environment: WG_PROCESS_FOREGROUND=1 is -f; RINGTAIL_DEVICE_STATE_DIR is --state-dir; LOG_LEVEL is
/// verbose, debug, error or silent. In the background nothing is logged unless LOG_LEVEL, RUST_LOG or
/// -v asks for it (then to standard error as it was), or --log-file names a file.
#[derive(Debug, Args)]
pub(super) struct DeviceArgs {
    /// Name of the interface, at most 15 bytes; `%d` stands for the first free number.
    #[arg(value_name = "IFNAME")]
    name: String,
    /// Stay in the foreground.
    #[arg(short, long)]
    foreground: bool,
    /// Data plane threads [default: one per usable core].
    #[arg(long, value_name = "COUNT")]
    shards: Option<usize>,
    /// Keep each shard on one core: true or false [default: true with more than two cores].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pin: Option<bool>,
    /// Let the scheduler place shards; the same as --pin=false.
    #[arg(long, conflicts_with = "pin")]
    no_pin: bool,
    /// I/O driver of the shards.
    #[arg(long, value_enum, default_value_t = DriverName::Auto)]
    driver: DriverName,
    /// Transport engine: our own, or boringtun's for comparison where that was built in.
    #[arg(long, value_enum, default_value_t = EngineName::Ringtail)]
    engine: EngineName,
    /// Inner MTU in bytes at first; `ip link set` changes it later.
    #[arg(long, value_name = "BYTES", default_value_t = MTU_DEFAULT)]
    mtu: u16,
    /// Super-packets from the TUN, and merging for writes to it: true or false.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    tun_offload: bool,
    /// UDP GSO on sends: true or false.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    udp_gso: bool,
    /// UDP GRO on receives: true or false.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    udp_gro: bool,
    /// Keep in this directory how far the clock has come, so that after a restart with the clock behind
    /// peers take our handshakes; RINGTAIL_DEVICE_STATE_DIR does the same [default: nothing is kept].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// In the background, append the log to this file.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

/// What LOG_LEVEL says, in our words; nothing if it is not set, or says nothing we know.
pub(super) fn log_level() -> Option<&'static str> {
    match std::env::var("LOG_LEVEL").ok()?.as_str() {
        "verbose" | "debug" => Some("debug"),
        "error" => Some("error"),
        "silent" => Some("off"),
        _ => None,
    }
}

/// Runs the device. `verbose` is whether -v was given.
pub(super) fn run(args: DeviceArgs, verbose: bool) -> anyhow::Result<()> {
    let foreground = args.foreground || is_set("WG_PROCESS_FOREGROUND", "1");
    if let Some(child) = Child::this() {
        return run_child(args.into_options()?, child);
    }
    if foreground {
        return device::run(args.into_options()?, || Ok(()));
    }
    let log = match &args.log_file {
        Some(path) => std::fs::File::options()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?
            .into(),
        None if verbose || wants_log() => Stdio::inherit(),
        None => Stdio::null(),
    };
    // Bad arguments are told here, without a child.
    args.into_options()?;
    background::start(log)
}

fn run_child(options: Options, child: Child) -> anyhow::Result<()> {
    child.detach()?;
    let mut child = Some(child);
    let ended = device::run(options, || child.take().map_or(Ok(()), Child::ready));
    if let (Err(error), Some(child)) = (&ended, child) {
        child.failed(error)?;
    }
    ended
}

fn wants_log() -> bool {
    std::env::var_os("RUST_LOG").is_some() || log_level().is_some_and(|level| level != "off")
}

fn is_set(variable: &str, value: &str) -> bool {
    std::env::var(variable).is_ok_and(|found| found == value)
}

/// Where the state goes, from where the caller stands: in the background the device stands elsewhere.
fn state_dir(given: Option<PathBuf>) -> anyhow::Result<Option<PathBuf>> {
    let told = || std::env::var_os(STATE_DIR_VARIABLE).filter(|dir| !dir.is_empty());
    given
        .or_else(|| told().map(PathBuf::from))
        .map(|dir| {
            std::path::absolute(&dir)
                .with_context(|| format!("cannot use {dir:?} as a state directory"))
        })
        .transpose()
}

impl DeviceArgs {
    fn into_options(self) -> anyhow::Result<Options> {
        for variable in ["WG_TUN_FD", "WG_UAPI_FD"] {
            if std::env::var_os(variable).is_some() {
                bail!(
                    "{variable} is set, but ringtail opens the interface (one queue per shard) and \
                     the socket itself; unset it"
                );
            }
        }
        let name = self.name;
        // IFNAMSIZ counts the closing NUL; the kernel refuses the rest of these too.
        let bad = name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
        if name.is_empty() || name.len() > 15 || bad || name == "." || name == ".." {
            bail!("{name:?} cannot name an interface; use 1 to 15 characters without '/'");
        }
        if name.contains('%') && name.replacen("%d", "", 1).contains('%') {
            bail!("{name:?} cannot name an interface; only one %d may be in it");
        }
        if !(MTU_MIN..=MTU_MAX).contains(&self.mtu) {
            bail!(
                "mtu {} is out of range; it can be {MTU_MIN} to {MTU_MAX}",
                self.mtu
            );
        }
        if self
            .shards
            .is_some_and(|shards| !(1..=SHARDS_MAX).contains(&shards))
        {
            bail!("--shards can be 1 to {SHARDS_MAX}");
        }
        Ok(Options {
            name,
            mtu: self.mtu,
            shards: self.shards.unwrap_or_else(shards_by_default),
            pin: !self.no_pin && self.pin.unwrap_or_else(pinned_by_default),
            driver: self.driver.into(),
            offloads: Offloads {
                tun: self.tun_offload,
                gso: self.udp_gso,
                gro: self.udp_gro,
            },
            engine: self.engine.into(),
            state_dir: state_dir(self.state_dir)?,
        })
    }
}
