//! The thread: reads what is there, and carries out the difference to what is wanted.

use std::collections::BTreeSet;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rtnetlink::packet_route::route::RouteType;

use super::netlink::{FoundRoute, Netlink, Watch};
use super::nft;
use super::router::Router;
use super::sysctl;
use super::table::Claim;
use super::{Report, Shared};
use crate::driver::ledger::{Entry, Ledger};
use crate::driver::lock;
use crate::hostnet::{
    Action, Conflict, Host, Lans, MAIN, Overlay, Plan, Problem, Route, Settings, State, Step, Way,
    WayBack, by_hand, forwarding, guest_bridges, lies_in, meets, stays, steps, table_of_priority,
};
use crate::netmap::prefix::{V4_RANGE, V6_RANGE, has_no_hosts, is_exit};

/// Whoever asks for our table is turned away this often, and it is looked at what the host's firewall drops.
const COUNT_PERIOD: Duration = Duration::from_secs(10);
/// The table of the host's own addresses, which is asked before any other.
const LOCAL: u32 = 255;
/// Index of the loopback interface.
const LOOPBACK: u32 = 1;
/// Host routes remembered at most, of those that meet ours.
const HOST_ROUTES_MAX: usize = 65_536;
/// Prefixes in the ranges of networks like ours that the host has elsewhere, at most: each takes two rules.
const ELSEWHERE_MAX: usize = 512;
/// Routes of a routing daemon that are offered at most: as many as a coordination server of ours looks at.
const HANDED_MAX: usize = 256;
/// Conflicts remembered as told at most.
const TOLD_MAX: usize = 1024;
/// Times the rules are tried, as each family may turn out not to have any.
const TRIES: usize = 3;
/// `ENODEV`, `ESRCH`, `ENOENT`, `EADDRNOTAVAIL`: what a deletion meets when it is gone already.
const GONE: [i32; 4] = [
    nix::libc::ENODEV,
    nix::libc::ESRCH,
    nix::libc::ENOENT,
    nix::libc::EADDRNOTAVAIL,
];

/// What the kernel answers when it may well do so the next time.
const LATER: [i32; 4] = [
    nix::libc::ENOBUFS,
    nix::libc::ENOMEM,
    nix::libc::EAGAIN,
    nix::libc::EINTR,
];
/// Then it is asked again after this long.
const LATER_PERIOD: Duration = Duration::from_secs(1);

/// The thread's own.
pub(super) struct Worker {
    pub(super) settings: Settings,
    pub(super) tun_name: String,
    /// Keeps the table ours.
    pub(super) claim: Claim,
    pub(super) ledger: Ledger,
    pub(super) netlink: Netlink,
    pub(super) overlay: Overlay,
    pub(super) host: Host,
    /// Bridges that had a port other than guests'.
    pub(super) real_bridges: BTreeSet<u32>,
    /// Tables that the host's rules lead to.
    pub(super) tables: BTreeSet<u32>,
    /// What leads into the tunnel, or nowhere.
    pub(super) tunnel: BTreeSet<IpNet>,
    /// More host routes meet ours than are remembered.
    pub(super) too_many: bool,
    /// Addresses that we gave the TUN.
    pub(super) added: BTreeSet<IpAddr>,
    /// What this process may not do, though it is to be done; and what leads into the TUN by somebody else's hand,
    /// which is looked at only then.
    pub(super) denied: Option<Vec<Step>>,
    pub(super) led: BTreeSet<IpNet>,
    /// Addresses that the TUN is to have and was not given.
    pub(super) missing: BTreeSet<IpAddr>,
    pub(super) told: BTreeSet<Conflict>,
    pub(super) router: Router,
    pub(super) lans: Lans,
    /// The table of a routing daemon, what it has in there for others, and whether there is more.
    pub(super) handed_in: Option<u32>,
    pub(super) handed: BTreeSet<IpNet>,
    pub(super) too_many_handed: bool,
    /// The services that the host's routes were looked through for.
    pub(super) services: BTreeSet<IpAddr>,
    pub(super) shared: Arc<Shared>,
}

impl Worker {
    #[expect(
        clippy::disallowed_methods,
        reason = "a driver: it measures and bounds its own work"
    )]
    pub(super) fn run(mut self, watch: &Watch, rules: Option<&nft::Watch>, woken: &UnixStream) {
        let mut look = true;
        let mut unseen = false;
        // Routes may change all the time, and what new ones take is thrown at once. Addresses and interfaces seldom
        // do, but a new address may forbid a route of ours, and an interface may be the one of our LAN.
        let (mut rest_until, mut rest_until_soon) = (Instant::now(), Instant::now());
        let mut count_at = Instant::now() + COUNT_PERIOD;
        loop {
            let start = Instant::now();
            let taken = lock(&self.shared.wishes).take(&mut self.overlay, &mut self.host);
            if taken.stop {
                break;
            }
            if taken.overlay {
                // A wish is carried out at once.
                look = true;
                rest_until = start;
            }
            self.claim.turn_away();
            // However much news there is.
            look |= self.poll_timeout().is_some_and(|due| due <= start);
            if start >= count_at {
                count_at = start + COUNT_PERIOD;
                look |= self.router.count(start, &self.overlay);
            }
            let rested = start >= rest_until;
            if look && rested {
                match self.look_at_host() {
                    Ok(()) => {
                        self.services = self.overlay.services.clone();
                        let (settings, tun) = (&self.settings, &self.tun_name);
                        self.router
                            .settle(start, settings, tun, &self.overlay, &self.host);
                        let host = &self.host;
                        let (ways, carrying) = (&host.ways, &host.carrying);
                        let offered = &self.overlay.offered;
                        self.lans
                            .look(start, offered, ways, carrying, &host.guest_links);
                    }
                    // Interfaces that the kernel did not tell of are not gone.
                    Err(error) => {
                        tracing::debug!(%error, "the host is looked at again");
                        unseen = true;
                    }
                }
            }
            if look && rested || taken.dialled {
                self.settle();
            }
            for done in taken.waiting {
                // Who asked may have given up.
                let _ = done.send(());
            }
            if look && rested {
                look = std::mem::take(&mut unseen);
                let now = Instant::now();
                rest_until = now + ringtail_dataplane::rest_after(now - start);
                rest_until_soon = now + (now - start);
                if look {
                    rest_until = rest_until.max(now + LATER_PERIOD);
                }
            }
            let wake_at = if look {
                rest_until
            } else {
                self.poll_timeout()
                    .map_or(count_at, |due| due.min(count_at))
            };
            let timeout = wake_at.saturating_duration_since(Instant::now());
            match wait(watch, rules, woken, timeout) {
                Woken::Wish => {}
                Woken::News => {
                    let news = watch.take();
                    for route in &news.routes {
                        self.throw_at_once(route);
                    }
                    look = true;
                    if news.soon {
                        rest_until = rest_until.min(rest_until_soon);
                    }
                }
                Woken::Rules => {
                    if let Some(rules) = rules {
                        rules.take();
                    }
                    look = true;
                }
                Woken::Nothing => {}
            }
            drain(woken);
        }
        self.clean_up();
    }

    /// When the host is to be looked at although there is no news.
    fn poll_timeout(&self) -> Option<Instant> {
        let due = [self.lans.poll_timeout(), self.router.poll_timeout()];
        due.into_iter().flatten().min()
    }

    /// Reads what the host has of its own.
    ///
    /// # Errors
    /// The kernel does not say all of it now: everything that is known stays.
    fn look_at_host(&mut self) -> io::Result<()> {
        let known = (self.host.clone(), self.tables.clone(), self.handed.clone());
        let result = self.read_host();
        if result.is_err() {
            (self.host, self.tables, self.handed) = known;
        }
        result
    }

    fn read_host(&mut self) -> io::Result<()> {
        let tun = self.settings.tun;
        let file = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.tun_name);
        self.host.ipv6 = std::fs::read_to_string(file).is_ok_and(|text| text.trim() == "0");
        let addresses = self.netlink.addresses()?;
        let others = || addresses.iter().filter(|found| found.interface != tun);
        self.host.connected = others().filter_map(|found| found.subnet).collect();
        let elsewhere = others().filter_map(|found| {
            let range = range_of(found.address)?;
            Some((found.interface, found.subnet.unwrap_or(range)))
        });
        self.host.elsewhere = elsewhere.collect();
        let links = self.netlink.links()?;
        let bridges = guest_bridges(&links, &mut self.real_bridges);
        let theirs = others().filter(|found| bridges.contains(&found.interface));
        self.host.guests = theirs.filter_map(|found| found.subnet).collect();
        let carrying = links.iter().filter(|link| link.carries);
        self.host.carrying = carrying.map(|link| link.index).collect();
        // They have a carrier only while there are guests.
        self.host.carrying.extend(&bridges);
        self.host.guest_links = bridges;
        let outside = links
            .iter()
            .filter(|link| link.index != tun && link.index != LOOPBACK);
        let outside = outside.map(|link| link.name.as_str());
        self.host.way_back = match self.overlay.exit {
            Some(_) => sysctl::way_back(outside),
            None => WayBack::Unasked,
        };
        let names = links.into_iter().map(|link| (link.index, link.name));
        self.host.links = names.collect();
        // Also where the interface is down, and has no route any more.
        let subnets = others().filter_map(|found| Some((found.subnet?, found.interface)));
        let overlay = &self.overlay;
        let near = subnets.filter(|(net, _)| forwarding::concerns(overlay, net));
        self.host.ways = near.collect();
        self.host.routes.clear();
        self.handed.clear();
        self.too_many_handed = false;
        self.tables = BTreeSet::from([MAIN.into()]);
        self.too_many = false;
        let mut nets = self.overlay.nets();
        nets.extend(self.overlay.services.iter().copied().map(IpNet::from));
        for v6 in [false, true] {
            let rules = if_there(self.netlink.rules(v6))?;
            let theirs = rules.iter().filter(|found| !found.ours);
            self.tables
                .extend(theirs.filter_map(|found| match found.rule.action {
                    Action::Table(table) if table != LOCAL => Some(table),
                    Action::Table(_) | Action::Goto(_) | Action::Nop => None,
                }));
            let (tables, routes) = (&self.tables, &mut self.host.routes);
            let too_many = &mut self.too_many;
            let (ways, overlay) = (&mut self.host.ways, &self.overlay);
            let elsewhere = &mut self.host.elsewhere;
            let (handed, too_many_handed) = (&mut self.handed, &mut self.too_many_handed);
            let handed_in = self.handed_in;
            let result = self.netlink.routes(v6, 0, false, &mut |found| {
                if handed_in == Some(found.table)
                    && is_others(&found, tun)
                    && !has_no_hosts(&found.net)
                    && !is_exit(&found.net)
                {
                    *too_many_handed |= handed.len() >= HANDED_MAX;
                    if !*too_many_handed {
                        handed.insert(found.net);
                    }
                }
                if found.kind == RouteType::Unicast
                    && !found.ours
                    && tables.contains(&found.table)
                    && forwarding::concerns(overlay, &found.net)
                    && ways.len() < HOST_ROUTES_MAX
                {
                    let others = found.interfaces.iter().filter(|by| **by != tun);
                    ways.extend(others.map(|by| (found.net, *by)));
                }
                if of_host(&found, tables, tun)
                    && found.kind == RouteType::Unicast
                    && let Some(range) = range_of(found.net.addr())
                    && range.contains(&found.net)
                {
                    // Another tunnel has a route for each of its nodes, and the whole range already.
                    let by = found.interfaces.iter().map(|by| (*by, found.net));
                    let by: Vec<_> = by
                        .filter(|(by, _)| !elsewhere.contains(&(*by, range)))
                        .collect();
                    if elsewhere.len() < ELSEWHERE_MAX {
                        elsewhere.extend(by);
                    }
                }
                if of_host(&found, tables, tun) && meets(&nets, &found.net) {
                    *too_many |= routes.len() >= HOST_ROUTES_MAX;
                    if !*too_many {
                        routes.insert(found.net);
                    }
                }
            });
            if_there(result)?;
        }
        Ok(())
    }

    /// The host has got a route: it counts before all others are looked at again.
    fn throw_at_once(&mut self, found: &FoundRoute) {
        let net = found.net;
        let rules = self.settings.rules[usize::from(net.addr().is_ipv6())];
        let concerns = of_host(found, &self.tables, self.settings.tun)
            && stays(&self.overlay, &self.host, &net);
        if !rules || !concerns || !lies_in(&self.tunnel, &net) {
            return;
        }
        let route = |way| Route {
            net,
            table: self.settings.table,
            way,
        };
        let mut steps = vec![Step::AddRoute(route(Way::Throw))];
        if self.tunnel.remove(&net) {
            steps.push(Step::DeleteRoute(route(Way::Tunnel)));
        }
        for step in &steps {
            if let Err(error) = self.netlink.carry_out(step, self.settings.tun) {
                tracing::debug!(%error, ?step, "the look that follows tries again");
            }
        }
    }

    /// Makes it as it is to be, and says how it stands.
    fn settle(&mut self) {
        let mut plan = Plan::default();
        let mut problems = Problems::default();
        for _ in 0..TRIES {
            plan = crate::hostnet::plan(&self.settings, &self.overlay, &self.host);
            problems.0.clear();
            let rules = self.settings.rules;
            match self.read(&plan.state) {
                Ok((there, shared_table)) => {
                    if shared_table {
                        problems.host(format!(
                            "another program uses table {} too; choose another with --table",
                            self.settings.table
                        ));
                    }
                    self.carry_out(&steps(&plan.state, &there), &mut problems);
                }
                Err(error) => problems.host(format!("cannot read the host's routes: {error}")),
            }
            if rules == self.settings.rules {
                break;
            }
        }
        for (v6, family) in [(false, "IPv4"), (true, "IPv6")] {
            if !self.settings.rules[usize::from(v6)] && (!v6 || self.host.ipv6) {
                let why = match self.denied {
                    Some(_) => "this process may set no policy rules (it lacks CAP_NET_ADMIN)",
                    None => "the kernel takes no policy rules",
                };
                problems.host(format!(
                    "{why} for {family}: only peers' own addresses are routed"
                ));
                if self.overlay.exit.is_some() {
                    problems.host(format!(
                        "{family} does not go to the exit node, but out of this host as ever"
                    ));
                }
            }
        }
        let tun = &self.tun_name;
        let commands = by_hand(tun, self.denied.as_deref().unwrap_or_default(), &self.led);
        if !commands.is_empty() {
            problems.host(format!(
                "this process may not change the host's network (it lacks CAP_NET_ADMIN); who may has to do it: {}",
                commands.join(" && ")
            ));
        }
        if !self.host.ipv6 && self.overlay.addresses.iter().any(IpAddr::is_ipv6) {
            let command = if Path::new("/proc/sys/net/ipv6").exists() {
                format!(": sysctl -w net/ipv6/conf/{tun}/disable_ipv6=0")
            } else {
                String::new()
            };
            problems.host(format!(
                "{tun} has no IPv6: the network's IPv6 addresses and routes are not used{command}"
            ));
        }
        if self.too_many {
            problems.host(format!(
                "over {HOST_ROUTES_MAX} of the host's routes meet the network's: the rest may be taken into the tunnel"
            ));
        }
        problems.0.extend_from_slice(self.router.problems());
        if let (true, Some(table)) = (self.too_many_handed, self.handed_in) {
            problems.host(format!(
                "over {HANDED_MAX} routes stand in table {table} (--advertise-routes-from): the rest is not offered"
            ));
        }
        let mut lost = self.lans.lost();
        problems.0.extend(lost.iter().map(|net| Problem {
            part: "ha",
            text: format!(
                "{net} is not announced: no interface that is up, with a carrier, leads there"
            ),
        }));
        lost.extend(self.router.unserved(&self.overlay));
        let into = plan.state.routes.iter().filter(|r| r.way != Way::Throw);
        self.tunnel = into.map(|route| route.net).collect();
        self.publish(plan, lost, problems.0);
    }

    /// What is there of ours, and whether somebody else uses our table.
    fn read(&mut self, wanted: &State) -> io::Result<(State, bool)> {
        let mut there = State::default();
        let mut shared_table = false;
        let (table, tun) = (self.settings.table, self.settings.tun);
        self.led.clear();
        for v6 in [false, true] {
            if !self.settings.rules[usize::from(v6)] {
                let (ours_only, led) = (self.denied.is_none(), &mut self.led);
                self.netlink
                    .routes(v6, MAIN, ours_only, &mut |found| match (
                        found.interfaces == [tun],
                        found.ours,
                    ) {
                        (true, true) => _ = there.routes.insert(route(&found, MAIN, tun)),
                        (true, false) => _ = led.insert(found.net),
                        (false, _) => {}
                    })?;
                continue;
            }
            match self.netlink.rules(v6) {
                Ok(rules) => {
                    let ours = rules.iter().filter(|found| found.ours);
                    let ours =
                        ours.filter(|found| table_of_priority(found.rule.priority) == Some(table));
                    there.rules.extend(ours.map(|found| found.rule));
                }
                Err(error) => {
                    tracing::debug!(%error, v6, "no policy rules");
                    self.settings.rules[usize::from(v6)] = false;
                    continue;
                }
            }
            self.netlink.routes(v6, table, false, &mut |found| {
                if found.ours {
                    there.routes.insert(route(&found, table, tun));
                } else {
                    shared_table = true;
                }
            })?;
        }
        let addresses = self.netlink.addresses()?;
        let on_tun = addresses.into_iter().filter(|found| found.interface == tun);
        there.addresses = on_tun
            .map(|found| found.address)
            .filter(|ip| self.added.contains(ip) || wanted.addresses.contains(ip))
            .collect();
        Ok((there, shared_table))
    }

    fn carry_out(&mut self, steps: &[Step], problems: &mut Problems) {
        let mut failed = 0;
        let mut first = None;
        self.denied.iter_mut().for_each(Vec::clear);
        self.missing.clear();
        for step in steps {
            let result = self.netlink.carry_out(step, self.settings.tun);
            let denied = result.as_ref().is_err_and(is_denied);
            if denied {
                self.denied.get_or_insert_default().push(*step);
            }
            match step {
                Step::AddAddress(ip) => {
                    self.added.insert(*ip);
                }
                Step::DeleteAddress(ip) => {
                    self.added.remove(ip);
                }
                Step::AddRule(rule) => {
                    if let Err(error) = &result
                        && error.raw_os_error() != Some(nix::libc::EEXIST)
                    {
                        tracing::debug!(%error, ?rule, "the rule is refused");
                        self.settings.rules[usize::from(rule.v6)] = false;
                        return;
                    }
                }
                Step::DeleteRule(_) | Step::AddRoute(_) | Step::DeleteRoute(_) => {}
            }
            let Err(error) = result else {
                continue;
            };
            let fine = denied
                || match step {
                    Step::AddAddress(_) | Step::AddRule(_) | Step::AddRoute(_) => {
                        error.raw_os_error() == Some(nix::libc::EEXIST)
                    }
                    Step::DeleteAddress(_) | Step::DeleteRule(_) | Step::DeleteRoute(_) => error
                        .raw_os_error()
                        .is_some_and(|errno| GONE.contains(&errno)),
                };
            if let Step::AddAddress(ip) = step
                && error.raw_os_error() != Some(nix::libc::EEXIST)
            {
                self.missing.insert(*ip);
            }
            if !fine {
                failed += 1;
                first.get_or_insert_with(|| format!("{}: {error}", describe(step)));
            }
        }
        if let Some(first) = first {
            let more = failed - 1;
            problems.host(if more > 0 {
                format!("{first}, and {more} more")
            } else {
                first
            });
        }
    }

    fn publish(&mut self, plan: Plan, lost: BTreeSet<IpNet>, problems: Vec<Problem>) {
        if self.told.len() > TOLD_MAX {
            self.told.clear();
        }
        for conflict in &plan.conflicts {
            if self.told.insert(conflict.clone()) {
                tracing::warn!(
                    conflict = conflict.describe(),
                    "a route meets the host's own"
                );
            }
        }
        let mut report = lock(&self.shared.report);
        let news = report.problems != problems
            || report.services != self.services
            || report.conflicts != plan.conflicts
            || report.guest_links != self.host.guest_links
            || report.handed != self.handed
            || report.missing != self.missing;
        *report = Report {
            table: self.settings.table,
            services: self.services.clone(),
            conflicts: plan.conflicts,
            more_conflicts: plan.more_conflicts,
            kept_out: plan.kept_out,
            guest_links: self.host.guest_links.clone(),
            handed: self.handed.clone(),
            missing: self.missing.clone(),
            lost,
            problems,
        };
        if news {
            self.shared.news.notify_one();
        }
    }

    fn clean_up(&mut self) {
        let mut problems = Problems::default();
        if let Err(error) = self.router.clean_up(&self.settings) {
            problems.host(format!("cannot remove a rule of the firewall: {error}"));
        }
        match self.read(&State::default()) {
            Ok((there, _)) => self.carry_out(&steps(&State::default(), &there), &mut problems),
            Err(error) => problems.host(error.to_string()),
        }
        if problems.0.is_empty() {
            let table = self.claim.table;
            self.ledger.done(&Entry::Routes { table });
        }
        for problem in problems.0 {
            tracing::warn!(
                problem = problem.text,
                "something of ours stays behind; the keeper or the next start removes it"
            );
        }
    }
}

/// What is not as it should be.
#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    /// One of routes, rules or addresses.
    fn host(&mut self, text: String) {
        self.0.push(Problem { part: "host", text });
    }
}

/// What the kernel says of a family; one that is not there has nothing. What it has no room or time for now it says
/// when it is asked again.
fn if_there<T: Default>(answer: io::Result<T>) -> io::Result<T> {
    match answer {
        Err(error)
            if error
                .raw_os_error()
                .is_none_or(|errno| !LATER.contains(&errno)) =>
        {
            Ok(T::default())
        }
        answer => answer,
    }
}

/// Whether the kernel leaves such changes to others than this process. (`EACCES` says that an interface has no IPv6.)
fn is_denied(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EPERM)
}

/// Of the ranges that networks like ours have their addresses from, that of an address.
fn range_of(ip: IpAddr) -> Option<IpNet> {
    let mut ranges = [IpNet::from(V4_RANGE), IpNet::from(V6_RANGE)].into_iter();
    ranges.find(|range| range.contains(&ip))
}

/// Whether a route is the host's own, in a table that its rules lead to, and not its default.
fn of_host(found: &FoundRoute, tables: &BTreeSet<u32>, tun: u32) -> bool {
    is_others(found, tun) && tables.contains(&found.table)
}

/// Whether a route is not ours and says something of a network, which a default route does not.
fn is_others(found: &FoundRoute, tun: u32) -> bool {
    let counts = matches!(
        found.kind,
        RouteType::Unicast | RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit
    );
    let others = !found.ours && found.interfaces != [tun];
    counts && others && found.net.prefix_len() > 0
}

enum Woken {
    Wish,
    News,
    Rules,
    Nothing,
}

/// Waits for a wish, news of the kernel, or `timeout`.
fn wait(watch: &Watch, rules: Option<&nft::Watch>, woken: &UnixStream, timeout: Duration) -> Woken {
    let mut fds = vec![
        PollFd::new(woken.as_fd(), PollFlags::POLLIN),
        PollFd::new(watch.as_fd(), PollFlags::POLLIN),
    ];
    fds.extend(rules.map(|rules| PollFd::new(rules.as_fd(), PollFlags::POLLIN)));
    // Rounded up: a wait of nothing would spin.
    let ms = u16::try_from(timeout.as_millis() + 1).unwrap_or(u16::MAX);
    match poll(&mut fds, PollTimeout::from(ms)) {
        Ok(0) | Err(_) => Woken::Nothing,
        Ok(_) if fds[1].any() == Some(true) => Woken::News,
        Ok(_) if fds.get(2).is_some_and(|fd| fd.any() == Some(true)) => Woken::Rules,
        Ok(_) => Woken::Wish,
    }
}

/// Takes what woke us. The wishes are taken after it: one that comes in between wakes once more.
fn drain(mut woken: &UnixStream) {
    let mut bytes = [0; 64];
    while woken.read(&mut bytes).is_ok_and(|len| len > 0) {}
}

fn route(found: &FoundRoute, table: u8, tun: u32) -> Route {
    let way = match (found.kind, found.interfaces == [tun]) {
        (RouteType::Throw, _) => Way::Throw,
        (RouteType::Unreachable, _) => Way::Unreachable,
        (RouteType::Unicast, true) => Way::Tunnel,
        _ => Way::Stale,
    };
    Route {
        net: found.net,
        table,
        way,
    }
}

fn describe(step: &Step) -> String {
    match step {
        Step::AddAddress(ip) => format!("cannot add the address {ip}"),
        Step::DeleteAddress(ip) => format!("cannot remove the address {ip}"),
        Step::AddRule(rule) => format!("cannot add the rule {}", rule.priority),
        Step::DeleteRule(rule) => format!("cannot remove the rule {}", rule.priority),
        Step::AddRoute(route) => format!("cannot add the route {}", route.net),
        Step::DeleteRoute(route) => format!("cannot remove the route {}", route.net),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_that_is_not_there_has_nothing_and_one_that_was_not_told_of_is_asked_for_again() {
        let answer = |errno| if_there::<Vec<u32>>(Err(io::Error::from_raw_os_error(errno)));
        assert!(answer(nix::libc::EAFNOSUPPORT).unwrap().is_empty());
        assert!(answer(nix::libc::EOPNOTSUPP).unwrap().is_empty());
        for errno in LATER {
            assert!(answer(errno).is_err());
        }
        assert_eq!(if_there(Ok(vec![7])).unwrap(), [7]);
    }
}
