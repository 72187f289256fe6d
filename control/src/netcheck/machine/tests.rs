use rand::SeedableRng as _;

use super::*;
use crate::testing::start;

/// A network in which region `n` answers after `latency[n - 1]`, with a NAT whose port is `port`.
struct Lab {
    now: Instant,
    check: Netcheck,
    latency: Vec<Option<Duration>>,
    /// The port that the server of a region sees.
    port: fn(u8) -> u16,
    answers: VecDeque<(Instant, Vec<u8>)>,
    sent: Vec<(Instant, SocketAddr)>,
    /// What a name gives at a time.
    dns: Box<dyn Fn(Instant) -> Vec<IpAddr>>,
    asked: Vec<(Instant, String)>,
    events: Vec<(Instant, Event)>,
}

impl Lab {
    fn new(latency: &[Option<u64>]) -> Self {
        let now = start();
        let mut check = Netcheck::new(41641, true, false, StdRng::seed_from_u64(7));
        let eth = Interface {
            name: "eth0".into(),
            addrs: vec!["192.168.1.2".parse().unwrap()],
        };
        check.set_interfaces(now, &[eth], "ringtail0", true);
        let latency = latency
            .iter()
            .map(|ms| ms.map(Duration::from_millis))
            .collect();
        let mut lab = Self {
            now,
            check,
            latency,
            port: |_| 5555,
            answers: VecDeque::new(),
            sent: Vec::new(),
            dns: Box::new(|_| Vec::new()),
            asked: Vec::new(),
            events: Vec::new(),
        };
        lab.drain();
        lab.events.clear();
        lab
    }

    /// One whose map is of these regions.
    fn started(latency: &[Option<u64>]) -> Self {
        let mut lab = Self::new(latency);
        let regions = u32::try_from(latency.len()).unwrap();
        lab.check
            .set_derp_map(lab.now, &DerpMap::of_regions(regions));
        lab
    }

    fn drain(&mut self) {
        while let Some(name) = self.check.poll_name(self.now) {
            let found = (self.dns)(self.now);
            self.check.set_resolved(self.now, &name, found);
            self.asked.push((self.now, name));
        }
        while let Some(transmit) = self.check.poll_transmit() {
            self.sent.push((self.now, transmit.to));
            let IpAddr::V4(ip) = transmit.to.ip() else {
                panic!("the lab has no IPv6");
            };
            let region = ip.octets()[3];
            if let Some(Some(latency)) = self.latency.get(usize::from(region) - 1) {
                let seen = SocketAddr::from(([198, 51, 100, 7], (self.port)(region)));
                let answer = stun::respond(&transmit.bytes, seen).unwrap();
                self.answers
                    .push_back((self.now + *latency, answer.as_ref().to_vec()));
            }
        }
        while let Some(event) = self.check.poll_event() {
            self.events.push((self.now, event));
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.drain();
            self.answers.make_contiguous().sort_by_key(|(at, _)| *at);
            let answer = self.answers.front().map(|(at, _)| *at);
            let timer = self.check.poll_timeout();
            let Some(next) = [answer, timer]
                .into_iter()
                .flatten()
                .min()
                .filter(|at| *at <= end)
            else {
                self.now = end;
                return;
            };
            self.now = next.max(self.now);
            if answer == Some(next) {
                let (_, bytes) = self.answers.pop_front().unwrap();
                let _ = self.check.handle_datagram(self.now, &bytes);
            } else {
                self.check.handle_timeout(self.now);
            }
        }
    }

    fn reports(&self) -> Vec<(Instant, Report)> {
        let report = |(at, event): &(Instant, Event)| match event {
            Event::Report(report) => Some((*at, report.clone())),
            Event::HttpsLatencyWanted(_) | Event::Endpoints(_) | Event::Home { .. } => None,
        };
        self.events.iter().filter_map(report).collect()
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn two_relays_give_a_home_the_mapping_and_endpoints() {
    let mut lab = Lab::started(&[Some(30), Some(10)]);
    let began = lab.now;
    lab.run(SECOND);
    let (at, report) = lab.reports().remove(0);
    assert_eq!(at - began, Duration::from_millis(30));
    assert!(report.full && report.udp && report.ipv4 && !report.ipv6);
    assert_eq!(report.mapping_varies, Some(false));
    assert_eq!(report.home, Some(RegionId(2)));
    let public: SocketAddr = "198.51.100.7:5555".parse().unwrap();
    assert_eq!(report.public_endpoints(), [public]);
    // The first answer gives out the endpoints; nobody waits for the slower relay.
    let first = lab.events.iter().find_map(|(at, event)| match event {
        Event::Endpoints(endpoints) => Some((*at, endpoints.clone())),
        Event::HttpsLatencyWanted(_) | Event::Report(_) | Event::Home { .. } => None,
    });
    let (at, endpoints) = first.unwrap();
    assert_eq!(at - began, Duration::from_millis(10));
    let addrs: Vec<SocketAddr> = endpoints.iter().map(|endpoint| endpoint.addr).collect();
    assert_eq!(addrs, [public, "192.168.1.2:41641".parse().unwrap()]);
}

#[test]
fn a_hard_nat_shows_and_its_second_mapping_is_noise() {
    let mut lab = Lab::started(&[Some(10), Some(20), Some(30)]);
    lab.port = |region| 6000 + u16::from(region);
    lab.run(SECOND);
    let (_, report) = lab.reports().remove(0);
    assert_eq!(report.mapping_varies, Some(true));
    assert_eq!(
        report.public_endpoints(),
        ["198.51.100.7:6001".parse().unwrap()]
    );
    let Some((_, Event::Endpoints(endpoints))) = lab
        .events
        .iter()
        .rev()
        .find(|(_, event)| matches!(event, Event::Endpoints(_)))
    else {
        panic!("no endpoints");
    };
    // A fixed port may be forwarded statically: a guess worth a Ping.
    let guess = OwnEndpoint {
        addr: "198.51.100.7:41641".parse().unwrap(),
        kind: EndpointKind::StunLocalPort,
    };
    assert!(endpoints.contains(&guess));
}

#[test]
fn three_regions_are_enough_and_the_rest_gets_twice_the_slowest() {
    let mut lab = Lab::started(&[Some(10), Some(20), Some(30), None]);
    let began = lab.now;
    lab.run(SECOND);
    let (at, report) = lab.reports().remove(0);
    assert_eq!(at - began, Duration::from_millis(30 + 2 * 30));
    assert_eq!(report.latency.len(), 3);
}

#[test]
fn a_dead_relay_costs_three_seconds_but_no_endpoints() {
    let mut lab = Lab::started(&[Some(10), None]);
    let began = lab.now;
    lab.run(4 * SECOND);
    assert_eq!(lab.reports()[0].0 - began, 3 * SECOND);
    let tries: Vec<Duration> = lab
        .sent
        .iter()
        .filter(|(_, to)| to.ip() == IpAddr::from([203, 0, 113, 2]))
        .map(|(at, _)| *at - began)
        .collect();
    assert_eq!(tries, [0, 100, 200].map(Duration::from_millis));
}

#[test]
fn without_udp_the_latencies_come_over_https() {
    let mut lab = Lab::started(&[None, None]);
    let began = lab.now;
    lab.run(3 * SECOND);
    let regions = vec![RegionId(1), RegionId(2)];
    let wanted = (began + 3 * SECOND, Event::HttpsLatencyWanted(regions));
    assert!(lab.events.contains(&wanted));
    lab.check
        .handle_https_latency(lab.now, RegionId(1), None, false);
    let latency = Some(Duration::from_millis(40));
    lab.check
        .handle_https_latency(lab.now, RegionId(2), latency, false);
    lab.drain();
    let (_, report) = lab.reports().remove(0);
    assert_eq!((report.udp, report.home), (false, Some(RegionId(2))));
}

#[test]
fn https_is_waited_for_until_the_report_is_five_seconds_old_and_the_home_is_then_any() {
    let mut lab = Lab::started(&[None, None]);
    let began = lab.now;
    lab.run(9 * SECOND);
    let (at, report) = lab.reports().remove(0);
    assert_eq!(at - began, 5 * SECOND);
    assert!(report.latency.is_empty() && report.home.is_some());
    assert_eq!(lab.check.home, report.home);
}

#[test]
fn checks_repeat_only_while_active_and_are_full_every_five_minutes() {
    let mut lab = Lab::started(&[Some(10), Some(20)]);
    lab.run(120 * SECOND);
    assert_eq!(lab.reports().len(), 1);
    lab.check.set_active(lab.now, true);
    lab.run(600 * SECOND);
    let reports = lab.reports();
    let gaps: Vec<Duration> = reports
        .windows(2)
        .skip(1)
        .map(|w| w[1].0 - w[0].0)
        .collect();
    assert!(
        gaps.len() > 20
            && gaps
                .iter()
                .all(|gap| { (PERIOD_MIN..=PERIOD_MAX + SECOND).contains(gap) })
    );
    let full: Vec<Instant> = reports
        .iter()
        .filter(|(_, r)| r.full)
        .map(|(at, _)| *at)
        .collect();
    assert_eq!(full.len(), 3);
    assert!(full[1] - full[0] > FULL_REPORT_INTERVAL);
}

#[test]
fn a_check_asked_for_during_a_check_follows_it() {
    let mut lab = Lab::started(&[Some(10), Some(20)]);
    lab.check.start(lab.now, false);
    lab.check.start(lab.now, false);
    lab.run(SECOND);
    let full: Vec<bool> = lab
        .reports()
        .iter()
        .map(|(_, report)| report.full)
        .collect();
    assert_eq!(full, [true, false]);
}

#[test]
fn the_home_of_an_earlier_run_is_home_until_coordination_can_be_told_of_another() {
    let mut lab = Lab::new(&[Some(10), Some(60)]);
    lab.check.remember_home(RegionId(2));
    lab.check.set_derp_map(lab.now, &DerpMap::of_regions(2));
    // At once, and not only when something has been measured.
    assert_eq!(lab.check.home, Some(RegionId(2)));
    lab.run(120 * SECOND);
    assert_eq!(lab.check.home, Some(RegionId(2)));
    lab.check.set_control_up(true);
    assert_eq!(lab.check.told_home(), Some(RegionId(2)));
    lab.check.set_active(lab.now, true);
    lab.run(120 * SECOND);
    assert_eq!(lab.check.home, Some(RegionId(1)));
    assert_eq!(lab.check.told_home(), Some(RegionId(1)));
    // A region that is gone is nobody's home.
    let mut gone = Lab::new(&[Some(10)]);
    gone.check.remember_home(RegionId(9));
    gone.check.set_derp_map(gone.now, &DerpMap::of_regions(1));
    gone.run(SECOND);
    assert_eq!(gone.check.home, Some(RegionId(1)));
    // Which nobody knows of yet.
    assert_eq!(gone.check.told_home(), Some(RegionId(9)));
}

#[test]
fn a_home_that_is_down_is_left_at_once_unless_nobody_could_be_told() {
    let mut lab = Lab::started(&[Some(10), Some(20)]);
    lab.run(SECOND);
    assert_eq!(lab.check.home, Some(RegionId(1)));
    lab.check.set_control_up(false);
    lab.check.handle_region_down(lab.now, RegionId(1));
    assert_eq!(lab.check.home, Some(RegionId(1)));
    lab.check.set_control_up(true);
    lab.check.handle_region_down(lab.now, RegionId(1));
    assert_eq!(lab.check.home, Some(RegionId(2)));
}

#[test]
fn junk_is_dropped_by_name() {
    let mut lab = Lab::started(&[Some(10)]);
    let sent = lab.check.poll_transmit().unwrap().bytes;
    let from = |text: &str| stun::respond(&sent, text.parse().unwrap()).unwrap();
    let loopback = from("127.0.0.1:9");
    let now = lab.now;
    let good = from("198.51.100.7:9");
    for (bytes, drop) in [
        (&b"junk"[..], Drop::NotStun),
        (&sent, Drop::NotSuccess),
        (&good.as_ref()[..30], Drop::Malformed),
        (loopback.as_ref(), Drop::BadAddress),
        (good.as_ref(), Drop::UnknownId),
    ] {
        assert_eq!(lab.check.handle_datagram(now, bytes), Err(drop));
    }
    let counted: Vec<u64> = lab.check.drops().map(|(_, count)| count).collect();
    assert_eq!(counted, [1, 1, 1, 1, 1, 0, 0]);
}

/// One relay that has a name alone.
fn named(lab: &mut Lab) {
    let mut map = DerpMap::of_regions(1);
    let node = &mut map.regions.get_mut(&1).unwrap().nodes[0];
    node.ipv4.clear();
    lab.check.set_derp_map(lab.now, &map);
}

fn relay(last: u8) -> IpAddr {
    IpAddr::from([203, 0, 113, last])
}

#[test]
fn names_left_to_dns_are_asked_for_and_the_last_good_answer_stays() {
    let mut lab = Lab::new(&[Some(10)]);
    let began = lab.now;
    lab.dns = Box::new(
        move |now| {
            if now == began { vec![relay(1)] } else { vec![] }
        },
    );
    named(&mut lab);
    lab.run(40 * SECOND);
    assert_eq!(lab.asked[0], (began, "derp1.example.com".to_owned()));
    assert!(lab.asked.len() > 2, "and failed since");
    let report = &lab.reports()[0].1;
    assert!(report.udp && report.global_v4.is_some());
    lab.sent.clear();
    lab.check.start(lab.now, false);
    lab.run(SECOND);
    assert_eq!(lab.sent[0].1, SocketAddr::new(relay(1), 3478));
}

#[test]
fn a_node_that_started_without_dns_has_its_endpoint_soon_after_dns_works() {
    for works_after_ms in [100, 2_900, 7_000, 61_000, 3_600_000] {
        let mut lab = Lab::new(&[Some(10)]);
        let works = lab.now + Duration::from_millis(works_after_ms);
        // A resolver that refuses at once, until it works.
        lab.dns = Box::new(move |now| if now < works { vec![] } else { vec![relay(1)] });
        named(&mut lab);
        while lab.now < works + 20 * SECOND {
            lab.run(Duration::from_millis(100));
            // HTTPS fails for the same reason.
            lab.check
                .handle_https_latency(lab.now, RegionId(1), None, false);
        }
        let public = lab.events.iter().find(|(_, event)| {
            let is_public = |own: &OwnEndpoint| own.kind == EndpointKind::Stun;
            matches!(event, Event::Endpoints(own) if own.iter().any(is_public))
        });
        let (at, _) = public.expect("a public endpoint");
        assert!(*at - works < 4 * SECOND, "{:?} late", *at - works);
        let (_, first) = &lab.reports()[0];
        let blames_names = first.unresolved == ["derp1.example.com"];
        assert!(first.udp || (blames_names && first.udp_works().is_none()));
        let (_, last) = lab.reports().pop().unwrap();
        assert_eq!((last.udp_works(), last.unresolved.len()), (Some(true), 0));
        assert!(lab.asked.len() as u64 <= 8 + works_after_ms / 3_000);
    }
}

#[test]
fn a_relay_that_moved_is_found_at_its_new_address() {
    let mut lab = Lab::new(&[Some(10)]);
    let moves = lab.now + 45 * SECOND;
    lab.dns = Box::new(move |now| vec![relay(if now < moves { 1 } else { 2 })]);
    named(&mut lab);
    lab.check.set_active(lab.now, true);
    lab.run(45 * SECOND);
    assert!(lab.reports().iter().all(|(_, report)| report.udp));
    // Now the old address answers nobody, and the new one is that of region 2.
    lab.latency = vec![None, Some(Duration::from_millis(10))];
    lab.sent.clear();
    lab.run(35 * SECOND);
    let (_, last) = lab.reports().pop().unwrap();
    assert!(last.udp);
    assert_eq!(lab.sent.last().unwrap().1.ip(), relay(2));
}

#[test]
fn of_a_name_with_two_addresses_the_second_is_asked_too() {
    let mut lab = Lab::new(&[None, Some(10)]);
    lab.dns = Box::new(|_| vec![relay(1), relay(2)]);
    named(&mut lab);
    lab.run(6 * SECOND);
    assert!(lab.reports()[0].1.udp);
}

#[test]
fn a_name_beside_an_address_is_asked_for_the_other_family() {
    let mut lab = Lab::new(&[Some(10)]);
    let eth = |addrs: &[&str]| Interface {
        name: "eth0".into(),
        addrs: addrs.iter().map(|addr| addr.parse().unwrap()).collect(),
    };
    let mut map = DerpMap::of_regions(1);
    map.regions.get_mut(&1).unwrap().nodes[0].ipv6.clear();
    // Where IPv4 works, a name that does not resolve is no reason to complain.
    lab.check.set_derp_map(lab.now, &map);
    lab.run(SECOND);
    assert_eq!(lab.reports()[0].1.unresolved, Vec::<String>::new());
    // Where only IPv6 does, it is what the relay is reached by.
    let now = lab.now;
    lab.check
        .set_interfaces(now, &[eth(&["2001:db8::2"])], "ringtail0", true);
    let v6: IpAddr = "2001:db8::1".parse().unwrap();
    lab.check
        .set_resolved(now, "derp1.example.com", vec![relay(9), v6]);
    let mut asked = Vec::new();
    while let Some(transmit) = lab.check.poll_transmit() {
        asked.push(transmit.to.ip());
    }
    assert_eq!(asked, [v6], "and the map's IPv4 address stands");
}
