//! Names of the infrastructure, coordination and relays, past the tunnel: from the hosts file, or by
//! marked sockets from the servers that the host asked before it asked us. While the way out is through
//! the tunnel, and the tunnel needs these names to come up, no other way is sure to lead anywhere.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, RecordType};
use socket2::{Domain, Protocol, Socket, Type};

use super::question;
use crate::dns::message;

/// An answer is waited for so long.
const WAIT: Duration = Duration::from_millis(1500);
/// Each server is asked so often.
const ROUNDS: usize = 2;
/// Datagrams that are no answer, before we stop listening.
const LIES_MAX: usize = 16;
/// What an answer may be long; longer ones are cut off by the kernel, and are none.
const ANSWER_LEN_MAX: usize = 4096;
const HOSTS: &str = "/etc/hosts";

/// Looks a name up; blocks. One without a dot is looked for in the domains of `search` first.
///
/// # Errors
/// Nobody knows it.
pub(in crate::driver) fn look_up(
    name: &str,
    search: &[String],
    servers: &[SocketAddr],
    fwmark: u32,
) -> io::Result<Vec<IpAddr>> {
    let hosts = std::fs::read_to_string(HOSTS).unwrap_or_default();
    let found = in_hosts(&hosts, name);
    if !found.is_empty() {
        return Ok(found);
    }
    let domains = search.iter().filter(|_| !name.contains('.'));
    for domain in domains {
        if let Ok(found) = ask_for_all(&format!("{name}.{domain}"), servers, fwmark) {
            return Ok(found);
        }
    }
    ask_for_all(name, servers, fwmark)
}

fn ask_for_all(name: &str, servers: &[SocketAddr], fwmark: u32) -> io::Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    let mut failed = io::Error::from(io::ErrorKind::HostUnreachable);
    for kind in [RecordType::A, RecordType::AAAA] {
        match ask_in_turn(name, kind, servers, fwmark) {
            Ok(addresses) => found.extend(addresses),
            Err(error) => failed = error,
        }
    }
    if found.is_empty() {
        Err(failed)
    } else {
        Ok(found)
    }
}

/// Addresses of a name in a hosts(5) file.
fn in_hosts(text: &str, name: &str) -> Vec<IpAddr> {
    let name = name.trim_end_matches('.');
    let lines = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default());
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = words.next()?.parse().ok()?;
            words
                .any(|word| word.eq_ignore_ascii_case(name))
                .then_some(address)
        })
        .collect()
}

fn ask_in_turn(
    name: &str,
    kind: RecordType,
    servers: &[SocketAddr],
    fwmark: u32,
) -> io::Result<Vec<IpAddr>> {
    let question = question(name, kind).map_err(io::Error::other)?;
    let mut failed = io::Error::from(io::ErrorKind::HostUnreachable);
    for _ in 0..ROUNDS {
        let mut all_say_no = true;
        for server in servers {
            match ask(*server, &question, fwmark) {
                Ok(answer) => {
                    let code = answer.metadata.response_code;
                    if code == ResponseCode::NoError {
                        return Ok(addresses(&answer));
                    }
                    // Another may know it: one of another link.
                    all_say_no &= code == ResponseCode::NXDomain;
                    failed = io::Error::other(code.to_string());
                }
                Err(error) => (all_say_no, failed) = (false, error),
            }
        }
        if all_say_no {
            break;
        }
    }
    Err(failed)
}

fn ask(server: SocketAddr, question: &[u8], fwmark: u32) -> io::Result<Message> {
    let question = message::with_id(question, rand::random());
    let socket = std::net::UdpSocket::from(connect(server, Type::DGRAM, Protocol::UDP, fwmark)?);
    socket.send(&question)?;
    let mut buffer = vec![0; ANSWER_LEN_MAX];
    for _ in 0..LIES_MAX {
        let len = socket.recv(&mut buffer)?;
        if message::answers(&question, &buffer[..len]) {
            let answer = Message::from_vec(&buffer[..len]).map_err(io::Error::other)?;
            if !answer.metadata.truncation {
                return Ok(answer);
            }
            return ask_by_tcp(server, &question, fwmark);
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

fn ask_by_tcp(server: SocketAddr, question: &[u8], fwmark: u32) -> io::Result<Message> {
    let mut stream = TcpStream::from(connect(server, Type::STREAM, Protocol::TCP, fwmark)?);
    let len = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&len.to_be_bytes(), question].concat())?;
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut answer = vec![0; u16::from_be_bytes(len).into()];
    stream.read_exact(&mut answer)?;
    if message::answers(question, &answer) {
        Message::from_vec(&answer).map_err(io::Error::other)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn connect(to: SocketAddr, kind: Type, protocol: Protocol, fwmark: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), kind, Some(protocol))?;
    if fwmark != 0 {
        socket.set_mark(fwmark)?;
    }
    socket.set_read_timeout(Some(WAIT))?;
    socket.set_write_timeout(Some(WAIT))?;
    socket.connect_timeout(&to.into(), WAIT)?;
    Ok(socket)
}

/// All addresses of an answer, at whatever end of a chain of aliases.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "there are dozens of types of records"
)]
fn addresses(answer: &Message) -> Vec<IpAddr> {
    let records = answer.answers.iter();
    records
        .filter_map(|record| match &record.data {
            RData::A(ip) => Some(IpAddr::V4(ip.0)),
            RData::AAAA(ip) => Some(IpAddr::V6(ip.0)),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use hickory_proto::op::{MessageType, OpCode, Query};
    use hickory_proto::rr::rdata::{A, CNAME};
    use hickory_proto::rr::{Name, Record};

    use super::*;

    #[test]
    fn the_hosts_file_counts_first() {
        let text = "127.0.0.1 localhost\n# 192.0.2.9 relay\n192.0.2.1\tRelay.example relay # 192.0.2.2 x\n\
                    fd00::1 relay\nnonsense relay\n";
        let found: Vec<String> = in_hosts(text, "relay")
            .iter()
            .map(IpAddr::to_string)
            .collect();
        assert_eq!(found, ["192.0.2.1", "fd00::1"]);
        assert_eq!(in_hosts(text, "relay.EXAMPLE.").len(), 1);
        assert!(in_hosts(text, "x").is_empty());
    }

    #[test]
    fn a_server_that_is_away_is_passed_over_and_a_lie_is_not_taken() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let there = server.local_addr().unwrap();
        let away = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let serve = std::thread::spawn(move || {
            let mut buffer = [0; 512];
            for _ in 0..2 {
                let (len, from) = server.recv_from(&mut buffer).unwrap();
                let asked = Message::from_vec(&buffer[..len]).unwrap();
                let query = asked.queries[0].clone();
                let mut answer =
                    Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
                let alias: Name = "other.example.".parse().unwrap();
                if query.query_type() == RecordType::A {
                    let target = RData::CNAME(CNAME(alias.clone()));
                    answer.add_answer(Record::from_rdata(query.name().clone(), 5, target));
                    let ip = RData::A(A::new(192, 0, 2, 7));
                    answer.add_answer(Record::from_rdata(alias.clone(), 5, ip));
                }
                let mut lie = answer.clone();
                lie.add_query(Query::query(alias, RecordType::A));
                server.send_to(&lie.to_vec().unwrap(), from).unwrap();
                answer.add_query(query);
                server.send_to(&answer.to_vec().unwrap(), from).unwrap();
            }
        });
        let found = ask_for_all("relay.example", &[away, there], 0).unwrap();
        assert_eq!(found, [IpAddr::from([192, 0, 2, 7])]);
        serve.join().unwrap();
    }

    #[test]
    fn a_name_without_a_dot_is_found_where_the_second_server_knows_it_by_tcp() {
        let first = UdpSocket::bind("127.0.0.1:0").unwrap();
        let second = UdpSocket::bind("127.0.0.1:0").unwrap();
        let servers = [&first, &second].map(|server| server.local_addr().unwrap());
        let long = TcpListener::bind(servers[1]).unwrap();
        let answer_to = |bytes: &[u8]| {
            let asked = Message::from_vec(bytes).unwrap();
            let mut answer = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
            answer.add_query(asked.queries[0].clone());
            (asked.queries[0].name().to_ascii(), answer)
        };
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((len, from)) = first.recv_from(&mut buffer) {
                let (_, mut answer) = answer_to(&buffer[..len]);
                answer.metadata.response_code = ResponseCode::NXDomain;
                first.send_to(&answer.to_vec().unwrap(), from).unwrap();
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((len, from)) = second.recv_from(&mut buffer) {
                let (name, mut answer) = answer_to(&buffer[..len]);
                if name == "relay.corp.lan." {
                    answer.metadata.truncation = true;
                } else {
                    answer.metadata.response_code = ResponseCode::NXDomain;
                }
                second.send_to(&answer.to_vec().unwrap(), from).unwrap();
            }
        });
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = long.accept() {
                let mut len = [0; 2];
                stream.read_exact(&mut len).unwrap();
                let mut asked = vec![0; u16::from_be_bytes(len).into()];
                stream.read_exact(&mut asked).unwrap();
                let (name, mut answer) = answer_to(&asked);
                let ip = RData::A(A::new(192, 0, 2, 7));
                answer.add_answer(Record::from_rdata(name.parse().unwrap(), 5, ip));
                let answer = answer.to_vec().unwrap();
                let len = u16::try_from(answer.len()).unwrap().to_be_bytes();
                stream.write_all(&[&len, &answer[..]].concat()).unwrap();
            }
        });
        let search = ["other.lan".to_owned(), "corp.lan".to_owned()];
        let found = look_up("relay", &search, &servers, 0).unwrap();
        assert!(found.contains(&IpAddr::from([192, 0, 2, 7])), "{found:?}");
        assert!(look_up("relay.example", &search, &servers, 0).is_err());
    }
}
