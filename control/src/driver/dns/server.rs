//! Answering questions, however they came: by UDP and TCP on the service's addresses, by a peer, by a
//! person.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Settings;
use super::forward::{Over, forward, read_framed, write_framed};
use super::silent::Silent;
use crate::dns::{Decision, MESSAGE_LEN_MAX, Question, Read, Upstream, message};
use crate::driver::counters::{self, counters};
use crate::driver::lock;

/// Questions that are passed on at a time. Each costs a descriptor and some kilobytes.
pub(crate) const FORWARDED_MAX: usize = 512;
/// To the same resolvers: slow ones leave room for others.
const FORWARDED_ALIKE_MAX: usize = FORWARDED_MAX / 2;
/// Of peers: they leave room for the host.
const FORWARDED_OF_PEERS_MAX: usize = FORWARDED_ALIKE_MAX / 2;
/// Questions that came by UDP and are at work at a time.
const AT_WORK_MAX: usize = 1024;
/// Longest question by UDP in bytes.
const UDP_QUESTION_LEN_MAX: usize = 4096;
/// Connections by TCP.
const CONNECTIONS_MAX: usize = 64;
/// A connection that is silent for so long is closed.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long nothing is taken after that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes that the kernel keeps of questions.
const RECEIVE_BUFFER: usize = 1 << 20;
/// The port of the service.
const PORT: u16 = 53;

counters! {
    /// What became of questions.
    pub(super) struct Counters(counters::Shared) {
        /// Questions of this host.
        questions,
        /// Questions of peers that use us as their exit node.
        peer_questions,
        /// Answered here.
        answered,
        /// Passed on.
        forwarded,
        /// Passed on and not answered.
        forward_failed,
        /// Nobody to pass them on to.
        nobody_to_ask,
        /// Not taken: too many at a time.
        too_many,
        /// Not messages that are answered.
        junk,
        /// Connections by TCP that found no place.
        connections_refused,
    }
}

/// Answers questions by what is wished at the time.
pub(super) struct Resolver {
    settings: watch::Receiver<Arc<Settings>>,
    under_way: Mutex<UnderWay>,
    pub(super) silent: Silent,
    pub(super) counters: Counters,
}

/// Who is asked, and for whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Asked {
    upstreams: Arc<[Upstream]>,
    for_peer: bool,
}

/// A question without its number, how it came, and who is asked: an answer is for nobody who would not ask there.
type Key = (Arc<[u8]>, Over, Asked);

/// Questions that are passed on at the moment.
#[derive(Default)]
struct UnderWay {
    answers: HashMap<Key, watch::Receiver<Option<Answer>>>,
    /// How many by who is asked.
    alike: HashMap<Asked, usize>,
}

impl UnderWay {
    fn has_room(&self, asked: &Asked) -> bool {
        let alike = self.alike.get(asked).copied().unwrap_or(0);
        let max = if asked.for_peer {
            FORWARDED_OF_PEERS_MAX
        } else {
            FORWARDED_ALIKE_MAX
        };
        self.answers.len() < FORWARDED_MAX && alike < max
    }

    fn end(&mut self, key: &Key) {
        self.answers.remove(key);
        let (_, _, asked) = key;
        if let Some(alike) = self.alike.get_mut(asked) {
            *alike -= 1;
            if *alike == 0 {
                self.alike.remove(asked);
            }
        }
    }
}

/// What became of a question that was passed on; nothing if nobody answered.
type Answer = Option<Arc<[u8]>>;

impl Resolver {
    pub(super) fn new(settings: watch::Receiver<Arc<Settings>>) -> Self {
        Self {
            settings,
            under_way: Mutex::default(),
            silent: Silent::default(),
            counters: Counters::default(),
        }
    }

    /// Answers a question of this host; nothing where none is due.
    pub(super) async fn answer(self: &Arc<Self>, bytes: &[u8], over: Over) -> Option<Vec<u8>> {
        self.counters.questions.add(1);
        let question = self.read(bytes)?;
        let question = match question {
            Ok(question) => question,
            Err(answer) => return Some(answer),
        };
        let settings = Arc::clone(&self.settings.borrow());
        let query = &question.query;
        let decision = settings.wish.zones.decide(query.name(), query.query_type());
        let upstreams = match decision {
            Decision::Forward(upstreams) => upstreams,
            Decision::ForwardToHost => Arc::clone(&settings.host),
            ours @ (Decision::Addresses(_)
            | Decision::Pointer(_)
            | Decision::NoData
            | Decision::NoName
            | Decision::NotImplemented) => {
                self.counters.answered.add(1);
                let answer = question.answer(&settings.wish.zones, &ours)?;
                return fitted(&question, answer.to_vec().ok()?, over);
            }
        };
        let asked = Asked {
            upstreams,
            for_peer: false,
        };
        self.pass_on(asked, &question, bytes, over).await
    }

    /// Answers a question of a peer that leaves by us: what the host would find out.
    pub(super) async fn answer_peer(self: &Arc<Self>, bytes: &[u8]) -> Option<Vec<u8>> {
        self.counters.peer_questions.add(1);
        let question = match self.read(bytes)? {
            Ok(question) => question,
            Err(answer) => return Some(answer),
        };
        let settings = Arc::clone(&self.settings.borrow());
        if settings.wish.is_filtered(question.query.name()) {
            return question.failed(ResponseCode::Refused).to_vec().ok();
        }
        let upstreams = match settings.wish.zones.for_all_names() {
            Some(upstreams) if settings.host.is_empty() => upstreams.into(),
            Some(_) | None => Arc::clone(&settings.host),
        };
        let asked = Asked {
            upstreams,
            for_peer: true,
        };
        self.pass_on(asked, &question, bytes, Over::Stream).await
    }

    fn read(&self, bytes: &[u8]) -> Option<Result<Question, Vec<u8>>> {
        match message::read(bytes) {
            Read::Question(question) => Some(Ok(question)),
            Read::Answer(answer) => {
                self.counters.junk.add(1);
                Some(Err(answer))
            }
            Read::Nothing => {
                self.counters.junk.add(1);
                None
            }
        }
    }

    async fn pass_on(
        self: &Arc<Self>,
        asked: Asked,
        question: &Question,
        bytes: &[u8],
        over: Over,
    ) -> Option<Vec<u8>> {
        let failed = || question.failed(ResponseCode::ServFail).to_vec().ok();
        if asked.upstreams.is_empty() {
            self.counters.nobody_to_ask.add(1);
            return failed();
        }
        let Some(mut answer) = self.under_way(asked, bytes, over) else {
            self.counters.too_many.add(1);
            return failed();
        };
        let answer = answer.wait_for(Option::is_some).await.ok()?.clone();
        match answer.flatten() {
            Some(answer) => {
                let answer = message::with_id(&answer, message::id(bytes));
                fitted(question, answer, over)
            }
            None => failed(),
        }
    }

    /// Where the answer to a question will be. Whoever asks what is being asked already joins in: so a
    /// question that comes back to us, through whatever resolver, goes round no further: once for the host, once for peers.
    fn under_way(
        self: &Arc<Self>,
        asked: Asked,
        bytes: &[u8],
        over: Over,
    ) -> Option<watch::Receiver<Option<Answer>>> {
        let key = (
            Arc::from(message::with_id(bytes, [0; 2])),
            over,
            asked.clone(),
        );
        let mut under_way = lock(&self.under_way);
        if let Some(answer) = under_way.answers.get(&key) {
            return Some(answer.clone());
        }
        if !under_way.has_room(&asked) {
            return None;
        }
        self.counters.forwarded.add(1);
        let (sender, answer) = watch::channel(None);
        under_way.answers.insert(key.clone(), answer.clone());
        *under_way.alike.entry(asked.clone()).or_default() += 1;
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let question = Arc::clone(&key.0);
            let found = forward(asked.upstreams, question, over, &this.silent).await;
            if let Err(error) = &found {
                this.counters.forward_failed.add(1);
                tracing::debug!(%error, "no answer to a question that was passed on");
            }
            lock(&this.under_way).end(&key);
            sender.send_replace(Some(found.ok().map(Arc::from)));
        });
        Some(answer)
    }
}

/// An answer, or that it is too long for whoever asked.
fn fitted(question: &Question, answer: Vec<u8>, over: Over) -> Option<Vec<u8>> {
    let max = match over {
        Over::Udp => question.udp_len_max(),
        Over::Stream => MESSAGE_LEN_MAX,
    };
    if answer.len() <= max {
        return Some(answer);
    }
    question.truncated().to_vec().ok()
}

/// A socket: address, interface that questions come by, protocol.
type Place = (IpAddr, String, Over);

/// Sockets on the service's addresses, which need not be there yet, and on the tunnel's interface. What this host
/// sends to addresses of that interface counts as come by it, whatever it says of the loopback one; what peers
/// send there, the data plane keeps out; and what others send comes by another. Guests of this host, machines and
/// containers on a bridge without a way to elsewhere, may ask as well: many of them copy its resolv.conf.
///
/// Answers until it is dropped.
pub(super) struct Sockets {
    tun: String,
    resolver: Arc<Resolver>,
    /// Each with the task that answers.
    open: Vec<(Place, JoinSet<()>)>,
    /// Those that another had when they were tried last. It may be starting anew when they are free, and would
    /// fail for our taking them: they are taken when they are free twice.
    refused: Vec<Place>,
}

/// How it stands with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listening {
    /// Where this host is answered by UDP.
    pub(super) addresses: Vec<IpAddr>,
    /// What is not as it should be, for people.
    pub(super) problem: Option<String>,
}

impl Sockets {
    pub(super) fn new(tun: &str, resolver: Arc<Resolver>) -> Self {
        Self {
            tun: tun.to_owned(),
            resolver,
            open: Vec::new(),
            refused: Vec::new(),
        }
    }

    /// Opens what is missing and closes what is not wanted any more; what stays goes on undisturbed.
    pub(super) fn listen(&mut self, addresses: &[IpAddr], guests: &[String]) -> Listening {
        let mut wanted: Vec<Place> = Vec::new();
        for address in addresses {
            for link in std::iter::once(&self.tun).chain(guests) {
                wanted.extend([Over::Udp, Over::Stream].map(|over| (*address, link.clone(), over)));
            }
        }
        self.open.retain(|(place, _)| wanted.contains(place));
        self.refused.retain(|place| wanted.contains(place));
        let mut listening = Listening::default();
        for place in wanted {
            let opened = self.open(&place);
            let (address, link, over) = place;
            // A bridge that has just gone is no matter.
            if link != self.tun {
                continue;
            }
            match opened {
                Ok(()) if over == Over::Udp => listening.addresses.push(address),
                Ok(()) => {}
                Err(error) => {
                    let by = if over == Over::Udp { "UDP" } else { "TCP" };
                    let addr = SocketAddr::new(address, PORT);
                    listening.problem = Some(format!(
                        "cannot answer for names on {addr} by {by}: {error}"
                    ));
                }
            }
        }
        listening
    }

    fn open(&mut self, place: &Place) -> io::Result<()> {
        if self.open.iter().any(|(open, _)| open == place) {
            return Ok(());
        }
        let (address, link, over) = place;
        let addr = SocketAddr::new(*address, PORT);
        let opened = own_socket(addr, link, *over);
        let was_refused = self.refused.iter().position(|refused| refused == place);
        let socket = match (opened, was_refused) {
            (Ok(socket), None) => socket,
            (Ok(_), Some(index)) => {
                self.refused.swap_remove(index);
                return Err(io::Error::other("another program has but just left it"));
            }
            (Err(error), Some(_)) => return Err(error),
            (Err(error), None) => {
                if error.kind() == io::ErrorKind::AddrInUse {
                    self.refused.push(place.clone());
                }
                return Err(error);
            }
        };
        let resolver = Arc::clone(&self.resolver);
        let mut work = JoinSet::new();
        match over {
            Over::Udp => {
                let socket = Arc::new(UdpSocket::from_std(socket.into())?);
                work.spawn(serve_udp(socket, resolver));
            }
            Over::Stream => {
                work.spawn(serve_tcp(TcpListener::from_std(socket.into())?, resolver));
            }
        }
        self.open.push((place.clone(), work));
        Ok(())
    }
}

/// A socket that answers on one interface.
///
/// Beside another's for all addresses there is none, on purpose: a program that answers for all of this host's
/// addresses may take those of the service for its own, and then asks nobody. One that comes after us is let in,
/// if it shares its ports (`SO_REUSEPORT`, and the same user): the kernel prefers ours, which is the more specific.
fn own_socket(addr: SocketAddr, tun: &str, over: Over) -> io::Result<Socket> {
    let (kind, protocol) = match over {
        Over::Udp => (Type::DGRAM, Protocol::UDP),
        Over::Stream => (Type::STREAM, Protocol::TCP),
    };
    let socket = Socket::new(
        Domain::for_address(addr),
        kind.nonblocking(),
        Some(protocol),
    )?;
    match addr {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
        }
    }
    if over == Over::Stream {
        // A restart does not wait for the connections of the run before.
        socket.set_reuse_address(true)?;
    }
    // A burst of questions is not lost; what the kernel does not give is not needed.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
    socket.bind_device(Some(tun.as_bytes()))?;
    socket.bind(&addr.into())?;
    if over == Over::Stream {
        socket.listen(64)?;
    }
    socket.set_reuse_port(true)?;
    Ok(socket)
}

async fn serve_udp(socket: Arc<UdpSocket>, resolver: Arc<Resolver>) {
    let mut buffer = vec![0; UDP_QUESTION_LEN_MAX + 1];
    let mut work = JoinSet::new();
    loop {
        while work.try_join_next().is_some() {}
        // An error is that of an answer to somebody who is gone.
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        if len > UDP_QUESTION_LEN_MAX {
            resolver.counters.junk.add(1);
            continue;
        }
        if work.len() >= AT_WORK_MAX {
            resolver.counters.too_many.add(1);
            continue;
        }
        let (question, resolver) = (buffer[..len].to_vec(), Arc::clone(&resolver));
        let socket = Arc::clone(&socket);
        work.spawn(async move {
            if let Some(answer) = resolver.answer(&question, Over::Udp).await {
                // Who asked may be gone.
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

async fn serve_tcp(listener: TcpListener, resolver: Arc<Resolver>) {
    let mut work = JoinSet::new();
    loop {
        while work.try_join_next().is_some() {}
        match listener.accept().await {
            Ok(_) if work.len() >= CONNECTIONS_MAX => resolver.counters.connections_refused.add(1),
            Ok((stream, _)) => {
                work.spawn(connection(stream, Arc::clone(&resolver)));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn connection(mut stream: TcpStream, resolver: Arc<Resolver>) {
    while let Ok(Ok(question)) = timeout(SILENCE_MAX, read_framed(&mut stream)).await {
        let Some(answer) = resolver.answer(&question, Over::Stream).await else {
            return;
        };
        match timeout(SILENCE_MAX, write_framed(&mut stream, &answer)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Message;
    use hickory_proto::rr::RecordType;

    use super::super::question;
    use super::*;

    /// A resolver that passes everything on to `upstream`.
    fn passing_on(upstream: SocketAddr) -> Arc<Resolver> {
        let settings = Settings {
            host: Arc::from([Upstream::Plain(upstream)]),
            ..Settings::default()
        };
        let (sender, receiver) = watch::channel(Arc::new(settings));
        // The last settings stay.
        drop(sender);
        Arc::new(Resolver::new(receiver))
    }

    fn code(answer: Option<Vec<u8>>) -> ResponseCode {
        Message::from_vec(&answer.unwrap())
            .unwrap()
            .metadata
            .response_code
    }

    #[tokio::test]
    async fn a_question_that_comes_round_again_is_passed_on_once() {
        let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolver = passing_on(upstream.local_addr().unwrap());
        // It knows nobody to ask but us.
        let round = Arc::clone(&resolver);
        let asked = tokio::spawn(async move {
            let mut buffer = vec![0; 512];
            let mut asked = 0;
            while let Ok(Ok((len, from))) =
                timeout(Duration::from_secs(3), upstream.recv_from(&mut buffer)).await
            {
                asked += 1;
                let answer = round.answer(&buffer[..len], Over::Udp);
                if let Ok(Some(answer)) = timeout(Duration::from_secs(2), answer).await {
                    upstream.send_to(&answer, from).await.unwrap();
                }
            }
            asked
        });
        let question = question("loop.example", RecordType::A).unwrap();
        let answer = resolver.answer(&question, Over::Udp).await;
        assert_eq!(code(answer), ResponseCode::ServFail);
        // Sent again once, as nobody answered, and passed on no second time.
        assert!(asked.await.unwrap() <= 2);
        assert_eq!(resolver.counters.forwarded.get(), 1);
        assert!(lock(&resolver.under_way).alike.is_empty());
    }

    /// Where sockets may be bound to the loopback interface: a port below 1024 is for root.
    #[tokio::test]
    async fn who_is_refused_a_socket_says_so_and_the_others_stay() {
        let resolver = passing_on("127.0.0.1:9".parse().unwrap());
        let [free, taken] = [[127, 53, 7, 1], [127, 53, 7, 2]].map(IpAddr::from);
        let Ok(another) = UdpSocket::bind((taken, PORT)).await else {
            eprintln!("skipped: who_is_refused_a_socket_says_so_and_the_others_stay needs port 53");
            return;
        };
        let mut sockets = Sockets::new("lo", resolver);
        let listening = sockets.listen(&[free, taken], &[]);
        assert_eq!(listening.addresses, [free]);
        let problem = listening.problem.unwrap();
        assert!(problem.contains("127.53.7.2:53 by UDP"), "{problem}");
        assert_eq!(sockets.open.len(), 3, "TCP is nobody else's");
        drop(another);
        let listening = sockets.listen(&[free, taken], &[]);
        assert!(listening.problem.unwrap().contains("but just left it"));
        let listening = sockets.listen(&[free, taken], &["no-such-bridge".into()]);
        assert_eq!(
            (listening.addresses, listening.problem),
            (vec![free, taken], None)
        );
        assert_eq!(sockets.open.len(), 4);
        // Who comes later and shares its ports is not kept out.
        for (kind, protocol) in [(Type::DGRAM, Protocol::UDP), (Type::STREAM, Protocol::TCP)] {
            let later = Socket::new(Domain::IPV4, kind, Some(protocol)).unwrap();
            later.set_reuse_port(true).unwrap();
            later.bind(&SocketAddr::new(free, PORT).into()).unwrap();
            if kind == Type::STREAM {
                later.listen(1).unwrap();
            }
        }
        sockets.listen(&[taken], &[]);
        assert!(
            sockets
                .open
                .iter()
                .all(|((address, ..), _)| *address == taken)
        );
    }

    #[tokio::test]
    async fn who_is_asked_first_and_does_not_answer_is_noted_and_nobody_else() {
        let [dead, well, later] =
            [(); 3].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let upstreams =
            [&dead, &well, &later].map(|one| Upstream::Plain(one.local_addr().unwrap()));
        well.set_nonblocking(true).unwrap();
        let answers = UdpSocket::from_std(well).unwrap();
        tokio::spawn(async move {
            let mut buffer = vec![0; 512];
            while let Ok((len, from)) = answers.recv_from(&mut buffer).await {
                // The bit that makes an answer of it.
                buffer[2] |= 0x80;
                answers.send_to(&buffer[..len], from).await.unwrap();
            }
        });
        let silent = Silent::default();
        let question: Arc<[u8]> = Arc::from(question("w.example", RecordType::A).unwrap());
        let began = crate::driver::clock::now();
        let long_ago = began.checked_sub(Duration::from_secs(9)).unwrap();
        for upstream in &upstreams {
            // One more question that is not answered tells.
            silent.note(long_ago, upstream, false);
            silent.note(long_ago, upstream, false);
        }
        let told = silent.subscribe();
        let answer = forward(Arc::from(upstreams.clone()), question, Over::Udp, &silent).await;
        assert!(answer.is_ok());
        assert_eq!(*told.borrow(), [upstreams[0].clone()].into());
        // Who answered begins anew.
        silent.note(began, &upstreams[1], false);
        assert_eq!(told.borrow().len(), 1);
    }

    #[tokio::test]
    async fn slow_resolvers_leave_room_for_others() {
        let slow = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolver = passing_on(slow.local_addr().unwrap());
        let upstreams: Arc<[Upstream]> = Arc::clone(&resolver.settings.borrow().host);
        let pass_on = |number: usize, to: &Arc<[Upstream]>| {
            let name = format!("n{number}.example");
            let question = question(&name, RecordType::A).unwrap();
            let asked = Asked {
                upstreams: Arc::clone(to),
                for_peer: false,
            };
            resolver.under_way(asked, &question, Over::Udp)
        };
        let of_peer = |number: usize| {
            let question = question(&format!("n{number}.example"), RecordType::A);
            let asked = Asked {
                upstreams: Arc::clone(&upstreams),
                for_peer: true,
            };
            resolver.under_way(asked, &question.unwrap(), Over::Udp)
        };
        let taken = (0..FORWARDED_ALIKE_MAX).filter(|n| of_peer(*n).is_some());
        assert_eq!(taken.count(), FORWARDED_OF_PEERS_MAX, "peers leave room");
        for number in 0..FORWARDED_ALIKE_MAX {
            assert!(pass_on(number, &upstreams).is_some());
        }
        assert!(pass_on(FORWARDED_ALIKE_MAX, &upstreams).is_none());
        assert!(pass_on(0, &upstreams).is_some(), "that one is under way");
        let other: Arc<[Upstream]> = Arc::from([Upstream::Plain("127.0.0.1:9".parse().unwrap())]);
        assert!(pass_on(FORWARDED_ALIKE_MAX, &other).is_some());
    }
}
