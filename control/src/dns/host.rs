//! How the host's resolver is told: who keeps its settings, and the text of a resolv.conf(5).
//!
//! On most hosts `/etc/resolv.conf` belongs to a program, which would overwrite what others write there, so
//! that program is asked ([`Manager`]). Only systemd-resolved can ask different servers for different
//! domains; elsewhere all questions go to our own server, which asks those servers for the rest that were
//! there before ([`Base`]).

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use super::HostDns;

/// The port of DNS.
const PORT: u16 = 53;
/// Servers taken at most; glibc asks three.
pub const SERVERS_MAX: usize = 8;
/// Search domains taken at most.
pub const SEARCH_MAX: usize = 32;
/// Lines of options taken at most.
const OPTIONS_MAX: usize = 8;
/// systemd-resolved's stub.
const RESOLVED_STUB: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 53));
/// What the first line of our file begins with; the name of the TUN follows.
const OURS: &str = "# Written by ringtail for ";

/// Who keeps the settings of the host's resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manager {
    /// systemd-resolved, by D-Bus.
    Resolved,
    /// resolvconf(8), Debian's or openresolv, by its command.
    Resolvconf(Flavour),
    /// Nobody, or somebody who does not ask: the file is replaced.
    File,
}

/// Which resolvconf it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Debian's: the records of all interfaces in one file, in an order of its own.
    Debian,
    /// openresolv: a record can be exclusive.
    Openresolv,
}

/// What a look at the host found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found<'a> {
    /// `/etc/resolv.conf` as it is without us, if there is one.
    pub resolv_conf: Option<&'a str>,
    /// `/etc/nsswitch.conf`.
    pub nsswitch: &'a str,
    /// systemd-resolved answers.
    pub resolved: bool,
    /// The `resolvconf` that can be run.
    pub resolvconf: Option<Flavour>,
}

impl Manager {
    /// Who it is. What the file's first comment says of its writer is believed only if the rest agrees.
    pub fn of(found: &Found<'_>) -> Self {
        let Some(text) = found.resolv_conf else {
            return Self::File;
        };
        let writer = writer(text);
        let asked = asks_only_resolved(text)
            || resolve_before_dns(found.nsswitch)
                && matches!(writer, Some(Writer::Resolved | Writer::NetworkManager));
        match (found.resolvconf, writer) {
            _ if found.resolved && asked => Self::Resolved,
            (Some(flavour), Some(Writer::Resolvconf)) => Self::Resolvconf(flavour),
            _ => Self::File,
        }
    }

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resolved => "systemd-resolved",
            Self::Resolvconf(Flavour::Debian) => "resolvconf",
            Self::Resolvconf(Flavour::Openresolv) => "openresolv",
            Self::File => "/etc/resolv.conf",
        }
    }

    /// Whether it can ask us for some domains only.
    pub fn splits(self) -> bool {
        matches!(self, Self::Resolved)
    }
}

/// Whether systemd-resolved may be what this host asks, so that it is worth calling: a call starts it where it is
/// installed.
pub fn hints_at_resolved(resolv_conf: &str, link: &str, nsswitch: &str) -> bool {
    let resolvers_dir = link.contains("systemd/resolve");
    asks_only_resolved(resolv_conf) || resolvers_dir || resolve_before_dns(nsswitch)
}

/// Who wrote a resolv.conf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    Resolved,
    Resolvconf,
    NetworkManager,
}

/// As the comments say before the first other line.
fn writer(text: &str) -> Option<Writer> {
    let lines = text.lines().map(str::trim);
    let mut comments = lines.take_while(|line| line.is_empty() || line.starts_with(['#', ';']));
    comments.find_map(|line| {
        [
            ("systemd-resolved", Writer::Resolved),
            ("NetworkManager", Writer::NetworkManager),
            ("resolvconf", Writer::Resolvconf),
        ]
        .into_iter()
        .find_map(|(word, writer)| line.contains(word).then_some(writer))
    })
}

/// Whether a resolv.conf asks systemd-resolved's stub, and nobody else.
pub fn asks_only_resolved(text: &str) -> bool {
    let mut servers = values(text, "nameserver").peekable();
    servers.peek().is_some() && servers.all(|server| server.parse() == Ok(RESOLVED_STUB))
}

/// Whether programs ask systemd-resolved by its library, before they would read the file (nsswitch.conf(5)).
fn resolve_before_dns(nsswitch: &str) -> bool {
    let mut lines = nsswitch.lines().map(str::trim);
    let hosts = lines.find_map(|line| line.strip_prefix("hosts:"));
    let mut services = hosts.unwrap_or_default().split_whitespace();
    services.find(|word| ["dns", "resolve"].contains(word)) == Some("resolve")
}

/// The first words behind a keyword that begins a line; comments have another.
fn values<'a>(text: &'a str, keyword: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| {
        let mut words = line.split_whitespace();
        words.next().filter(|word| *word == keyword)?;
        words.next()
    })
}

/// What a resolver is set to without us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// Its servers, loopback included, at port 53.
    pub servers: Vec<SocketAddr>,
    /// Its search domains.
    pub search: Vec<String>,
    /// Lines that say how it asks (`options`, `sortlist`).
    options: Vec<String>,
}

impl Base {
    /// Reads a resolv.conf(5). Servers that `is_ours` are left out; `interface` gives the index of an
    /// interface by its name, for addresses that are valid on one link only.
    pub fn read(
        text: &str,
        is_ours: &dyn Fn(IpAddr) -> bool,
        interface: &dyn Fn(&str) -> Option<u32>,
    ) -> Self {
        let mut base = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(|word| server(word, interface));
                    base.servers.extend(
                        server.filter(|server| {
                            !is_ours(server.ip()) && !base.servers.contains(server)
                        }),
                    );
                }
                // The last one counts.
                Some("search" | "domain") => {
                    base.search = words.take(SEARCH_MAX).map(str::to_owned).collect();
                }
                Some("options" | "sortlist") if base.options.len() < OPTIONS_MAX => {
                    base.options.push(line.trim().to_owned());
                }
                Some(_) | None => {}
            }
        }
        base.servers.truncate(SERVERS_MAX);
        base
    }

    /// Reads what `resolvconf -l` says, Debian's or openresolv's, but for the record `ours`: both put the domains of
    /// all records into one list.
    pub fn read_records(
        text: &str,
        ours: &str,
        is_ours: &dyn Fn(IpAddr) -> bool,
        interface: &dyn Fn(&str) -> Option<u32>,
    ) -> Self {
        let mut is_of_ours = false;
        let (mut rest, mut search) = (String::new(), Vec::new());
        for line in text.lines() {
            if let Some(record) = line.strip_prefix("# resolv.conf from ") {
                is_of_ours = record == ours;
            }
            let mut words = line.split_whitespace();
            match words.next() {
                _ if is_of_ours => {}
                Some("search" | "domain") => search.extend(words),
                Some(_) | None => rest.extend([line, "\n"]),
            }
        }
        rest.extend(["search ", &search.join(" ")]);
        Self::read(&rest, is_ours, interface)
    }

    /// The servers that others than this host may be: those of a local stub stand elsewhere.
    pub fn elsewhere(&self) -> impl Iterator<Item = SocketAddr> {
        let all = self.servers.iter().copied();
        all.filter(|server| !server.ip().is_loopback())
    }
}

/// An address as resolv.conf has it, `fe80::1%eth0` included.
fn server(word: &str, interface: &dyn Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    let Some((address, zone)) = word.split_once('%') else {
        return Some(SocketAddr::new(word.parse().ok()?, PORT));
    };
    let scope = zone.parse().ok().or_else(|| interface(zone))?;
    let address = address.parse().ok()?;
    Some(SocketAddrV6::new(address, PORT, 0, scope).into())
}

/// The resolv.conf(5) that asks us for everything: our search domains, then the host's own, and how it asks as
/// it was.
pub fn resolv_conf(wish: &HostDns, base: &Base, tun: &str) -> String {
    let mut text = format!("{OURS}{tun}. What was here before comes back when it ends.\n");
    for server in &wish.servers {
        // Writing to a text does not fail.
        let _ = writeln!(text, "nameserver {server}");
    }
    let mut search: Vec<&str> = Vec::new();
    for domain in wish.search.iter().chain(&base.search) {
        if is_domain(domain)
            && !search
                .iter()
                .any(|known| known.eq_ignore_ascii_case(domain))
        {
            search.push(domain);
        }
    }
    if !search.is_empty() {
        let _ = writeln!(text, "search {}", search.join(" "));
    }
    for line in &base.options {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// Whether a text can stand in the file as one word, and be a name.
pub fn is_domain(text: &str) -> bool {
    let is_label = |label: &str| (1..=63).contains(&label.len());
    (1..=253).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic())
        && (text == "." || text.split('.').all(is_label))
}

/// The TUN of the ringtail that wrote a resolv.conf, if one did.
pub fn written_for(text: &str) -> Option<&str> {
    text.strip_prefix(OURS)?.split(". ").next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUB: &str = "# This is /run/systemd/resolve/stub-resolv.conf managed by man:systemd-resolved(8).\n\
                        nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n";

    fn found(resolv_conf: &str) -> Found<'_> {
        Found {
            resolv_conf: Some(resolv_conf),
            nsswitch: "passwd: files\nhosts: files dns\n",
            resolved: true,
            resolvconf: Some(Flavour::Debian),
        }
    }

    fn base(text: &str) -> Base {
        let interface = |name: &str| (name == "eth0").then_some(2);
        Base::read(
            text,
            &|ip| ip == IpAddr::from([100, 100, 100, 100]),
            &interface,
        )
    }

    #[test]
    fn what_others_told_resolvconf_is_not_what_we_did() {
        let records = "# resolv.conf from tun-ringtail0.ringtail\n# Written by ringtail for ringtail0. Of now.\n\
                       nameserver 100.100.100.100\nsearch lab.example gone.lan\noptions rotate\n\
                       # resolv.conf from eth0.inet\ndomain lan\nnameserver 192.0.2.1\n\n\
                       # resolv.conf from wlan0.inet\nsearch corp.example office.lan\noptions ndots:2\nnameserver 192.0.2.2\n";
        let of = |ours: &str| Base::read_records(records, ours, &|_| false, &|_| None);
        let others = of("tun-ringtail0.ringtail");
        assert_eq!(others.search, ["lan", "corp.example", "office.lan"]);
        assert_eq!(others.options, ["options ndots:2"]);
        let servers: Vec<String> = others.servers.iter().map(SocketAddr::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "192.0.2.2:53"]);
        assert_eq!(of("").servers.len(), 3, "each has a name");
    }

    #[test]
    fn the_manager_is_whom_the_host_asks_and_not_whom_a_comment_names() {
        use Manager::{File, Resolvconf, Resolved};
        let nss = "hosts: mymachines resolve [!UNAVAIL=return] files dns";
        let uplink = "# managed by man:systemd-resolved(8)\nnameserver 192.0.2.1\n";
        let debian =
            "# Dynamic resolv.conf(5) file generated by resolvconf(8)\n\nnameserver 192.0.2.1\n";
        let nm = "# Generated by NetworkManager\nnameserver 192.0.2.1\n";
        for (found, manager) in [
            (found(STUB), Resolved),
            (
                Found {
                    resolved: false,
                    ..found(STUB)
                },
                File,
            ),
            (
                found("nameserver 127.0.0.53\nnameserver 127.0.0.53\n"),
                Resolved,
            ),
            (found("nameserver 127.0.0.53\nnameserver 192.0.2.1\n"), File),
            (found(uplink), File),
            (
                Found {
                    nsswitch: nss,
                    ..found(uplink)
                },
                Resolved,
            ),
            (
                Found {
                    nsswitch: nss,
                    ..found(nm)
                },
                Resolved,
            ),
            (
                Found {
                    nsswitch: nss,
                    ..found("nameserver 192.0.2.1\n")
                },
                File,
            ),
            (found(debian), Resolvconf(Flavour::Debian)),
            (
                Found {
                    resolvconf: None,
                    ..found(debian)
                },
                File,
            ),
            (found("nameserver 192.0.2.1\n# by resolvconf\n"), File),
            (found(nm), File),
            (found(""), File),
            (
                Found {
                    resolv_conf: None,
                    ..found("")
                },
                File,
            ),
        ] {
            assert_eq!(Manager::of(&found), manager, "{found:?}");
        }
    }

    #[test]
    fn resolved_is_called_only_where_something_points_to_it() {
        let nss = "hosts: files resolve dns";
        assert!(hints_at_resolved(STUB, "", ""));
        assert!(hints_at_resolved(
            "",
            "../run/systemd/resolve/stub-resolv.conf",
            ""
        ));
        assert!(hints_at_resolved("nameserver 192.0.2.1", "", nss));
        assert!(!hints_at_resolved(
            "nameserver 192.0.2.1",
            "",
            "hosts: files dns resolve"
        ));
        assert!(!hints_at_resolved("", "", "#hosts: resolve\nhosts:\n"));
    }

    #[test]
    fn the_base_is_read_without_our_own_servers_and_nonsense() {
        let text = "# nameserver 192.0.2.9\nsearch a.example\ndomain b.example c.example\n nameserver 10.0.0.53 # office\n\
                    nameserver 127.0.0.1\nnameserver\nnameserver x\nnameserver fe80::1%eth0\nnameserver fe80::1%gone\n\
                    nameserver 100.100.100.100\nnameserver 10.0.0.53\noptions ndots:2\nsortlist 10.0.0.0\n";
        let base = base(text);
        let servers: Vec<String> = base.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["10.0.0.53:53", "127.0.0.1:53", "[fe80::1%2]:53"]);
        let elsewhere: Vec<String> = base.elsewhere().map(|at| at.ip().to_string()).collect();
        assert_eq!(elsewhere, ["10.0.0.53", "fe80::1"]);
        assert_eq!(base.search, ["b.example", "c.example"]);
        assert_eq!(base.options, ["options ndots:2", "sortlist 10.0.0.0"]);
        let many: String = (0..100)
            .map(|n| format!("nameserver 10.0.0.{n}\n"))
            .collect();
        assert_eq!(tests::base(&many).servers.len(), SERVERS_MAX);
    }

    #[test]
    fn our_file_names_us_alone_and_keeps_what_else_was_said() {
        let wish = HostDns {
            servers: vec![[100, 100, 100, 100].into()],
            search: vec![
                "lab.example".into(),
                "LAN".into(),
                "two words".into(),
                String::new(),
            ],
            match_domains: vec!["corp.example".into()],
            default: true,
        };
        let text = resolv_conf(&wish, &base(STUB), "ringtail0");
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "nameserver 100.100.100.100",
                "search lab.example LAN",
                "options edns0 trust-ad"
            ]
        );
        assert_eq!(written_for(&text), Some("ringtail0"));
        assert_eq!(written_for(STUB), None);
        // What we wrote is never taken for the host's own.
        assert_eq!(base(&text).servers, []);
    }
}
