//! Simulated middleboxes: mapping, filtering, static mappings and hairpins (`nat-lab.md` §2, §5).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Mappings and filter entries live this long after their last use.
const LIFE: Duration = Duration::from_secs(30);

/// A network segment; 0 is the internet.
pub(super) type Zone = usize;

pub(super) const INTERNET: Zone = 0;

/// What the external port depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    Eim,
    Adm,
    Apdm,
    OneToOne,
    /// A firewall: addresses stay as they are.
    None,
}

/// Who may come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filtering {
    Eif,
    Adf,
    Apdf,
    /// No UDP at all, either way.
    Blocked,
}

/// Inner address, and the destination as far as the mapping depends on it.
type MappingKey = (SocketAddr, Option<IpAddr>, Option<u16>);

/// A router, or a firewall on a host, between two zones.
#[derive(Clone, Debug)]
pub(super) struct Middlebox {
    pub(super) mapping: Mapping,
    pub(super) filtering: Filtering,
    pub(super) outside: Zone,
    pub(super) inside: Vec<Zone>,
    /// The address on the outside; for a firewall that of the host behind it.
    pub(super) external: IpAddr,
    /// External port to inner address, open to everybody.
    pub(super) forwards: BTreeMap<u16, (Zone, SocketAddr)>,
    pub(super) hairpin: bool,
    next_port: u16,
    /// Ports that are not kept, though free.
    avoided: BTreeSet<u16>,
    /// Inner address and destination (as far as it matters) to external port and last use.
    mappings: BTreeMap<MappingKey, (Zone, u16, Instant)>,
    /// External port and a destination that the inside sent to.
    contacts: BTreeMap<(u16, SocketAddr), Instant>,
    /// Flows that came in through a forward: they leave through the same port.
    forwarded: BTreeMap<(SocketAddr, SocketAddr), u16>,
}

impl Middlebox {
    pub(super) fn new(
        mapping: Mapping,
        filtering: Filtering,
        outside: Zone,
        inside: Vec<Zone>,
        external: IpAddr,
    ) -> Self {
        Self {
            mapping,
            filtering,
            outside,
            inside,
            external,
            forwards: BTreeMap::new(),
            hairpin: false,
            next_port: 20_000,
            avoided: BTreeSet::new(),
            mappings: BTreeMap::new(),
            contacts: BTreeMap::new(),
            forwarded: BTreeMap::new(),
        }
    }

    /// Its uplink gets another address; what it knew of flows is gone.
    pub(super) fn move_to(&mut self, external: IpAddr) {
        self.external = external;
        self.mappings.clear();
        self.contacts.clear();
        self.forwarded.clear();
    }

    /// The source that a packet leaves with, or `None` if it may not leave.
    pub(super) fn outbound(
        &mut self,
        now: Instant,
        zone: Zone,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Option<SocketAddr> {
        if self.filtering == Filtering::Blocked {
            return None;
        }
        let port = match self.forwarded.get(&(from, to)) {
            Some(port) => *port,
            None => self.map(now, zone, from, to),
        };
        self.contacts.insert((port, to), now);
        let ip = if self.mapping == Mapping::None {
            from.ip()
        } else {
            self.external
        };
        Some(SocketAddr::new(ip, port))
    }

    fn map(&mut self, now: Instant, zone: Zone, from: SocketAddr, to: SocketAddr) -> u16 {
        let key = match self.mapping {
            Mapping::None | Mapping::OneToOne => return from.port(),
            Mapping::Eim => (from, None, None),
            Mapping::Adm => (from, Some(to.ip()), None),
            Mapping::Apdm => (from, Some(to.ip()), Some(to.port())),
        };
        if let Some((_, port, used)) = self.mappings.get_mut(&key)
            && now.saturating_duration_since(*used) <= LIFE
        {
            *used = now;
            return *port;
        }
        // EIM keeps the port while it is free, as masquerade does; the others draw new ones.
        let mapped = |port| self.mappings.values().any(|(_, other, _)| *other == port);
        let taken = |port| self.avoided.contains(&port) || mapped(port);
        let port = if self.mapping == Mapping::Eim && !taken(from.port()) {
            from.port()
        } else {
            self.next_port += 7;
            self.next_port
        };
        self.mappings.insert(key, (zone, port, now));
        port
    }

    /// Where a packet from outside goes, or `None` if it is dropped.
    pub(super) fn inbound(
        &mut self,
        now: Instant,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Option<(Zone, SocketAddr)> {
        if self.filtering == Filtering::Blocked {
            return None;
        }
        if let Some((zone, inner)) = self.forwards.get(&to.port()).copied() {
            self.forwarded.insert((inner, from), to.port());
            return Some((zone, inner));
        }
        let alive = |used: &Instant| now.saturating_duration_since(*used) <= LIFE;
        let known = |(port, contact): &(u16, SocketAddr)| {
            *port == to.port()
                && match self.filtering {
                    Filtering::Eif => true,
                    Filtering::Adf => contact.ip() == from.ip(),
                    Filtering::Apdf | Filtering::Blocked => *contact == from,
                }
        };
        let wide = self.mapping == Mapping::OneToOne && self.filtering == Filtering::Eif;
        if !wide
            && !self
                .contacts
                .iter()
                .any(|(entry, used)| alive(used) && known(entry))
        {
            return None;
        }
        let first = *self.inside.first()?;
        match self.mapping {
            Mapping::None => Some((first, to)),
            Mapping::OneToOne => {
                let inner = self.forwarded_host()?;
                Some((first, SocketAddr::new(inner, to.port())))
            }
            Mapping::Eim | Mapping::Adm | Mapping::Apdm => {
                let entries = self.mappings.iter_mut();
                let mut to_port = entries.filter(|(_, (_, port, _))| *port == to.port());
                let ((inner, _, _), (zone, _, used)) = to_port.next()?;
                *used = now;
                Some((*zone, *inner))
            }
        }
    }

    /// The one host behind a one-to-one translation, kept as the forward of port 0.
    fn forwarded_host(&self) -> Option<IpAddr> {
        self.forwards.get(&0).map(|(_, inner)| inner.ip())
    }

    /// Forgets all mappings and begins with other ports: the router was restarted.
    pub(super) fn rebind(&mut self) {
        self.mappings.clear();
        self.contacts.clear();
        self.forwarded.clear();
        self.next_port += 1000;
        self.avoided.insert(41641);
    }
}
