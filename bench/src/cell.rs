//! One measurement: a program, a kind of traffic, what it moved and what it cost.
//!
//! A cell starts an iperf3 server and client in two namespaces, or a ping stream, reads the CPU
//! counters around them, and appends one JSON line (see [`Cell`]) to a file. A cell that fails is
//! recorded with its error: a table with a hole says more than no table.

use crate::cpu::{Cost, Meter, Process};
use crate::{clock, events, netns, ping};
use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Seconds that iperf3 may take on top of its test before it is ended.
const GRACE: Duration = Duration::from_secs(8);

/// Kind of traffic.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// One TCP stream, client to server.
    Tcp1,
    /// Four TCP streams, client to server; a ping stream runs beside them.
    Tcp4,
    /// One TCP stream, server to client.
    Reverse,
    /// One TCP stream each way at once.
    Bidir,
    /// UDP datagrams of 200 bytes, as fast as the sender can.
    UdpSmall,
    /// UDP datagrams that fill the MTU, as fast as the sender can.
    UdpFull,
    /// Echoes on an idle path.
    Ping,
}

impl Kind {
    /// As headed in a table.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Kind::Tcp1 => "TCP 1 stream",
            Kind::Tcp4 => "TCP 4 streams",
            Kind::Reverse => "TCP reverse",
            Kind::Bidir => "TCP both ways",
            Kind::UdpSmall => "UDP 200 B",
            Kind::UdpFull => "UDP full size",
            Kind::Ping => "ping idle",
        }
    }

    fn is_udp(self) -> bool {
        matches!(self, Kind::UdpSmall | Kind::UdpFull)
    }
}

/// A line of cells.jsonl.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// "ringtail", "veth", "wireguard-go", …
    pub(crate) program: String,
    /// "direct", "relay" (`ringtail derp`) or "derper".
    pub(crate) path: String,
    /// "unpinned" or "pinned".
    pub(crate) layout: String,
    /// Congestion control of TCP cells.
    pub(crate) cc: String,
    /// Number of the round, from 1.
    pub(crate) round: u32,
    pub(crate) kind: Kind,
    /// What went wrong, if it did; the figures below are then missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) traffic: Option<Traffic>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpu: Option<Cost>,
    /// CPU seconds of the whole machine per 10^9 delivered bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_s_per_gb: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ping: Option<ping::Summary>,
}

/// What iperf3 moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Traffic {
    /// Payload bytes that reached the other end, both ways together.
    pub(crate) bytes: f64,
    pub(crate) seconds: f64,
    /// Delivered payload, 10^9 bits per second, both ways together.
    pub(crate) gbps: f64,
    /// TCP segments sent again.
    pub(crate) retransmits: Option<f64>,
    /// UDP datagrams delivered per second.
    pub(crate) pps: Option<f64>,
    /// UDP datagrams lost, in percent of those sent.
    pub(crate) loss_pct: Option<f64>,
}

/// `cell`: what to measure and where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kind of traffic.
    kind: Kind,
    /// Name of the program under test.
    #[arg(long)]
    program: String,
    /// direct, relay or derper.
    #[arg(long, default_value = "direct")]
    path: String,
    /// Namespace of the client.
    #[arg(long)]
    client: String,
    /// Namespace of the server.
    #[arg(long)]
    server: String,
    /// The server's address as the client sees it.
    #[arg(long)]
    target: Ipv4Addr,
    /// Length of the test.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Congestion control: never the kernel's default, which differs between machines.
    #[arg(long, default_value = "cubic")]
    cc: String,
    /// Inner MTU, which gives the payload of full-size UDP datagrams.
    #[arg(long, default_value_t = 1420)]
    mtu: u32,
    /// Number of the round.
    #[arg(long, default_value_t = 1)]
    round: u32,
    /// "pinned" puts the client on CPU 0 and the server on CPU 1.
    #[arg(long, default_value = "unpinned")]
    layout: String,
    /// A process to account for, as NAME=PID; may be given again.
    #[arg(long = "proc", value_name = "NAME=PID")]
    processes: Vec<Process>,
    /// File the JSON line is appended to.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Measures, appends the JSON line, and prints the figures in a few words.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut cell = Cell {
        program: args.program.clone(),
        path: args.path.clone(),
        layout: args.layout.clone(),
        cc: args.cc.clone(),
        round: args.round,
        kind: args.kind,
        error: None,
        traffic: None,
        cpu: None,
        cpu_s_per_gb: None,
        ping: None,
    };
    if let Err(error) = measure(args, &mut cell) {
        cell.error = Some(format!("{error:#}"));
    }
    if let Some(out) = &args.out {
        events::append(out, &cell)?;
    }
    println!("{}", in_words(&cell));
    Ok(())
}

fn measure(args: &Args, cell: &mut Cell) -> anyhow::Result<()> {
    if args.kind == Kind::Ping {
        let meter = Meter::start(&args.processes)?;
        cell.ping = Some(ping_beside(args)?.join()?);
        cell.cpu = Some(meter.stop()?);
        return Ok(());
    }
    let server = server(args)?;
    let mut processes = args.processes.clone();
    processes.push(Process {
        name: "iperf3-server".into(),
        pid: server.0.id(),
    });
    let meter = Meter::start(&processes)?;
    let beside = (args.kind == Kind::Tcp4)
        .then(|| ping_beside(args))
        .transpose()?;
    let report = client(args);
    let cost = meter.stop()?;
    drop(server);
    if let Some(beside) = beside {
        cell.ping = Some(beside.join()?);
    }
    let traffic = parse(args.kind, datagram_len(args), &report?)?;
    cell.cpu_s_per_gb = (traffic.bytes > 0.0).then(|| cost.machine_s / (traffic.bytes / 1e9));
    cell.cpu = Some(cost);
    cell.traffic = Some(traffic);
    Ok(())
}

/// A ping stream in a thread of its own.
struct Beside(std::thread::JoinHandle<anyhow::Result<ping::Summary>>);

impl Beside {
    fn join(self) -> anyhow::Result<ping::Summary> {
        self.0
            .join()
            .map_err(|_| anyhow!("the ping stream panicked"))?
    }
}

fn ping_beside(args: &Args) -> anyhow::Result<Beside> {
    let ns = args.client.clone();
    let idle = args.kind == Kind::Ping;
    let plan = ping::Plan {
        target: args.target,
        interval: Duration::from_millis(if idle { 5 } else { 10 }),
        duration: Some(Duration::from_secs(u64::from(args.seconds))),
        stop_file: None,
        events: None,
    };
    let thread = std::thread::Builder::new()
        .name("ping".into())
        .spawn(move || {
            netns::enter(&ns)?;
            ping::summarise(&ping::stream(&plan)?)
        })?;
    Ok(Beside(thread))
}

/// A child that never outlives its owner.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Reaped {
    /// Starts iperf3, and gives what it says.
    fn start(mut command: Command) -> anyhow::Result<(Reaped, ChildStdout)> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting iperf3 (is it installed?)")?;
        let mut child = Reaped(child);
        let stdout = child.0.stdout.take().context("iperf3 has no output")?;
        Ok((child, stdout))
    }
}

/// A server that listens.
fn server(args: &Args) -> anyhow::Result<Reaped> {
    let mut command = on_cpu(args, &args.server, 1);
    command.args(["-s", "-1", "--forceflush"]);
    let (child, stdout) = Reaped::start(command)?;
    let mut lines = BufReader::new(stdout).lines();
    loop {
        match lines.next().transpose()? {
            Some(line) if line.contains("listening") => break,
            Some(_) => {}
            None => bail!("the iperf3 server did not start in {}", args.server),
        }
    }
    // Whatever it still says must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    Ok(child)
}

fn on_cpu(args: &Args, ns: &str, cpu: u32) -> Command {
    netns::command(Some(ns), (args.layout == "pinned").then_some(cpu), "iperf3")
}

/// UDP payload that fills the MTU: less 20 bytes of IPv4 and 8 of UDP.
fn datagram_len(args: &Args) -> u32 {
    if args.kind == Kind::UdpSmall {
        200
    } else {
        args.mtu - 28
    }
}

/// Runs the client to its end and returns its JSON report.
fn client(args: &Args) -> anyhow::Result<Value> {
    let mut command = on_cpu(args, &args.client, 0);
    command
        .arg("-c")
        .arg(args.target.to_string())
        .args(["-J", "-t"]);
    command.arg(args.seconds.to_string());
    match args.kind {
        Kind::Tcp1 => {}
        Kind::Tcp4 => {
            command.args(["-P", "4"]);
        }
        Kind::Reverse => {
            command.arg("-R");
        }
        Kind::Bidir => {
            command.arg("--bidir");
        }
        Kind::UdpSmall | Kind::UdpFull => {
            command
                .args(["-u", "-b", "0", "-l"])
                .arg(datagram_len(args).to_string());
        }
        Kind::Ping => bail!("ping needs no iperf3"),
    }
    if !args.kind.is_udp() {
        command.args(["-C", &args.cc]);
    }
    let (mut child, mut stdout) = Reaped::start(command)?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let deadline = clock::now() + Duration::from_secs(u64::from(args.seconds)) + GRACE;
    while child.0.try_wait()?.is_none() {
        if clock::now() > deadline {
            bail!("iperf3 did not end");
        }
        clock::sleep(Duration::from_millis(5));
    }
    let text = reader
        .join()
        .map_err(|_| anyhow!("reading iperf3 panicked"))??;
    let report: Value = serde_json::from_str(&text).context("iperf3 said no JSON")?;
    match report.get("error").and_then(Value::as_str) {
        Some(error) => bail!("iperf3: {error}"),
        None => Ok(report),
    }
}

/// The figures in an iperf3 report.
fn parse(kind: Kind, datagram_len: u32, report: &Value) -> anyhow::Result<Traffic> {
    let end = report
        .get("end")
        .ok_or_else(|| anyhow!("iperf3 gave no end report"))?;
    let number = |sum: &str, field: &str| end.get(sum)?.get(field)?.as_f64();
    let need = |sum: &str, field: &str| {
        number(sum, field).ok_or_else(|| anyhow!("iperf3 gave no {sum}.{field}"))
    };
    if kind.is_udp() {
        // Newer versions split the sums; the receiver's is the one that knows losses.
        let sum = if number("sum_received", "packets").is_some_and(|n| n > 0.0) {
            "sum_received"
        } else {
            "sum"
        };
        let (sent, lost) = (need(sum, "packets")?, need(sum, "lost_packets")?);
        let seconds = need(sum, "seconds")?;
        let delivered = (sent - lost).max(0.0);
        let bytes = delivered * f64::from(datagram_len);
        return Ok(Traffic {
            bytes,
            seconds,
            gbps: bytes * 8.0 / seconds / 1e9,
            retransmits: None,
            pps: Some(delivered / seconds),
            loss_pct: Some(if sent > 0.0 {
                lost / sent * 100.0
            } else {
                100.0
            }),
        });
    }
    let seconds = need("sum_received", "seconds")?;
    let mut bytes = need("sum_received", "bytes")?;
    let mut retransmits = number("sum_sent", "retransmits");
    if kind == Kind::Bidir {
        bytes += need("sum_received_bidir_reverse", "bytes")?;
        if let Some(more) = number("sum_sent_bidir_reverse", "retransmits") {
            retransmits = Some(retransmits.unwrap_or(0.0) + more);
        }
    }
    Ok(Traffic {
        bytes,
        seconds,
        gbps: bytes * 8.0 / seconds / 1e9,
        retransmits,
        pps: None,
        loss_pct: None,
    })
}

/// The figures in a few words, for the progress line.
fn in_words(cell: &Cell) -> String {
    if let Some(error) = &cell.error {
        return format!("failed: {error}");
    }
    let mut words = Vec::new();
    if let Some(traffic) = &cell.traffic {
        words.push(format!("{:.2} Gb/s", traffic.gbps));
        if let Some(pps) = traffic.pps {
            words.push(format!("{:.0} kpps", pps / 1e3));
        }
        if let Some(loss) = traffic.loss_pct {
            words.push(format!("{loss:.1} % lost"));
        }
        if let Some(retransmits) = traffic.retransmits {
            words.push(format!("{retransmits:.0} retransmits"));
        }
    }
    if let Some(cost) = cell.cpu_s_per_gb {
        words.push(format!("{cost:.2} CPU s/GB"));
    }
    if let Some(ping) = &cell.ping {
        words.push(format!(
            "ping p50 {:.0} p99 {:.0} us",
            ping.p50_us, ping.p99_us
        ));
        if ping.lost > 0 {
            words.push(format!("{} of {} pings lost", ping.lost, ping.sent));
        }
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tcp_counts_what_was_received() -> anyhow::Result<()> {
        let report = json!({"end": {
            "sum_sent": {"bytes": 1100.0, "retransmits": 3},
            "sum_received": {"bytes": 1e9, "seconds": 4.0}}});
        let got = parse(Kind::Tcp1, 1392, &report)?;
        assert!((got.gbps - 2.0).abs() < 1e-9);
        assert_eq!(got.retransmits, Some(3.0));
        assert_eq!(got.loss_pct, None);
        Ok(())
    }

    #[test]
    fn both_ways_add_up() -> anyhow::Result<()> {
        let report = json!({"end": {
            "sum_sent": {"retransmits": 3}, "sum_sent_bidir_reverse": {"retransmits": 4},
            "sum_received": {"bytes": 1e9, "seconds": 4.0},
            "sum_received_bidir_reverse": {"bytes": 3e9, "seconds": 4.0}}});
        let got = parse(Kind::Bidir, 1392, &report)?;
        assert!((got.gbps - 8.0).abs() < 1e-9);
        assert_eq!(got.retransmits, Some(7.0));
        Ok(())
    }

    #[test]
    fn udp_counts_delivered_datagrams_in_either_form_of_report() -> anyhow::Result<()> {
        let sums = json!({"packets": 1000, "lost_packets": 250, "seconds": 0.5});
        for end in [
            json!({"sum": sums}),
            json!({"sum": {"packets": 9}, "sum_received": sums}),
        ] {
            let got = parse(Kind::UdpSmall, 200, &json!({"end": end}))?;
            assert_eq!(got.pps, Some(1500.0));
            assert_eq!(got.loss_pct, Some(25.0));
            assert!((got.bytes - 150_000.0).abs() < 1e-9);
        }
        Ok(())
    }

    #[test]
    fn a_report_without_sums_is_an_error() {
        assert!(parse(Kind::Tcp1, 0, &json!({"end": {}})).is_err());
        assert!(parse(Kind::Tcp1, 0, &json!({})).is_err());
    }
}
