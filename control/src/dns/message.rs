//! Messages of DNS as bytes: what is asked, and answers of our own. A question that is passed on, and the
//! answer to it, stay as they are but for the number in front.

use std::net::IpAddr;

use hickory_proto::op::{
    Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode,
};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record};
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder};

use super::zones::{Decision, Zones};

/// Longest message in bytes.
pub const MESSAGE_LEN_MAX: usize = 65_535;
/// Longest message in bytes over UDP to whoever does not say how much he takes (RFC 1035 §4.2.1).
const UDP_LEN: u16 = 512;
/// What we say that we take by UDP: no fragment on any path (DNS flag day 2020).
const UDP_LEN_OURS: u16 = 1232;
/// Header of a message in bytes.
const HEADER_LEN: usize = 12;
/// How long an answer of ours may be kept, in seconds; tailscaled's.
const TTL: u32 = 600;
/// The same of a name that does not exist: it may in a moment.
const NEGATIVE_TTL: u32 = 30;

/// What somebody asks.
#[derive(Clone, Debug)]
pub struct Question {
    message: Box<Message>,
    /// What is asked for.
    pub query: Query,
}

/// What comes of bytes that somebody sent.
#[derive(Debug)]
pub enum Read {
    /// A question.
    Question(Question),
    /// None that is dealt with: this is to be said to it.
    Answer(Vec<u8>),
    /// Nothing that is answered: an answer itself, or no message.
    Nothing,
}

/// Reads a question.
pub fn read(bytes: &[u8]) -> Read {
    // The first bit of the third octet says that it is an answer.
    let Some(&[id_high, id_low, flags, _]) =
        bytes.first_chunk().filter(|_| bytes.len() >= HEADER_LEN)
    else {
        return Read::Nothing;
    };
    if flags & 0x80 != 0 {
        return Read::Nothing;
    }
    let id = u16::from_be_bytes([id_high, id_low]);
    let refused = |op_code, code| {
        let answer = Message::error_msg(id, op_code, code);
        answer.to_vec().map_or(Read::Nothing, Read::Answer)
    };
    let Ok(message) = Message::from_vec(bytes) else {
        return refused(OpCode::Query, ResponseCode::FormErr);
    };
    if message.metadata.op_code != OpCode::Query {
        return refused(message.metadata.op_code, ResponseCode::NotImp);
    }
    match message.queries.as_slice() {
        [query] if query.query_class() == DNSClass::IN => Read::Question(Question {
            query: query.clone(),
            message: Box::new(message),
        }),
        [_] => refused(OpCode::Query, ResponseCode::Refused),
        _ => refused(OpCode::Query, ResponseCode::FormErr),
    }
}

impl Question {
    /// Longest answer in bytes that whoever asked by UDP takes.
    pub fn udp_len_max(&self) -> usize {
        self.message.max_payload().max(UDP_LEN).into()
    }

    /// What is answered here; nothing if somebody else is to be asked.
    pub fn answer(&self, zones: &Zones, decision: &Decision) -> Option<Message> {
        let name = self.query.name();
        let records = |found: Vec<RData>| {
            let records = found
                .into_iter()
                .map(|data| Record::from_rdata(name.clone(), TTL, data));
            let mut answer = self.response(ResponseCode::NoError);
            answer.answers = records.collect();
            answer
        };
        let nothing = |code| {
            let mut answer = self.response(code);
            answer.authorities = zones
                .zone(name)
                .map(start_of_authority)
                .into_iter()
                .collect();
            answer
        };
        Some(match decision {
            Decision::Addresses(found) => records(found.iter().copied().map(address).collect()),
            Decision::Pointer(to) => records(vec![RData::PTR(PTR(to.clone()))]),
            Decision::NoData => nothing(ResponseCode::NoError),
            Decision::NoName => nothing(ResponseCode::NXDomain),
            Decision::NotImplemented => self.response(ResponseCode::NotImp),
            Decision::Forward(_) | Decision::ForwardToHost => return None,
        })
    }

    /// That it cannot be answered.
    pub fn failed(&self, code: ResponseCode) -> Message {
        let mut answer = self.response(code);
        answer.metadata.authoritative = false;
        answer
    }

    /// That the answer is too long for the way it came.
    pub fn truncated(&self) -> Message {
        let mut answer = self.failed(ResponseCode::NoError);
        answer.metadata.truncation = true;
        answer
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut answer = Message::new(0, MessageType::Response, OpCode::Query);
        answer.metadata = Metadata::response_from_request(&self.message.metadata);
        answer.metadata.authoritative = true;
        answer.metadata.recursion_available = true;
        answer.metadata.response_code = code;
        answer.add_query(self.query.clone());
        if self.message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_LEN_OURS);
            answer.set_edns(edns);
        }
        answer
    }
}

/// Whether `answer` is one to the question `asked`: by number, kind and what is asked for. The rest is for
/// whoever asked to read.
pub fn answers(asked: &[u8], answer: &[u8]) -> bool {
    let (Some((ours, question)), Some((theirs, repeated))) = (front(asked), front(answer)) else {
        return false;
    };
    let same = match repeated.as_slice() {
        // A server that failed or refused may leave the question out.
        [] => theirs.response_code != ResponseCode::NoError,
        _ => question == repeated,
    };
    ours.id == theirs.id && theirs.message_type == MessageType::Response && same
}

fn front(message: &[u8]) -> Option<(Metadata, Vec<Query>)> {
    let mut decoder = BinDecoder::new(message);
    let header = Header::read(&mut decoder).ok()?;
    let count = usize::from(header.counts.queries);
    let questions = Message::read_queries(&mut decoder, count).ok()?;
    Some((header.metadata, questions))
}

/// Whether a message says that it is not whole.
pub fn is_truncated(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & 0x02 != 0)
}

/// The number in front of a message.
pub fn id(message: &[u8]) -> [u8; 2] {
    message.first_chunk().copied().unwrap_or_default()
}

/// The message with another number in front.
pub fn with_id(message: &[u8], id: [u8; 2]) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(front) = message.first_chunk_mut() {
        *front = id;
    }
    message
}

/// The number of how it went (RCODE) in a message.
pub fn code(message: &[u8]) -> Option<u8> {
    message.get(3).map(|flags| flags & 0x0f)
}

fn address(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    }
}

/// Says whoever keeps answers how long one that there is nothing stays true.
fn start_of_authority(zone: Name) -> Record {
    let seconds = i32::try_from(NEGATIVE_TTL).unwrap_or(i32::MAX);
    let soa = SOA::new(
        zone.clone(),
        zone.clone(),
        1,
        seconds,
        seconds,
        seconds,
        NEGATIVE_TTL,
    );
    Record::from_rdata(zone, NEGATIVE_TTL, RData::SOA(soa))
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::RecordType;

    use super::*;

    fn asked(kind: RecordType) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query("bob.lab.example.".parse().unwrap(), kind));
        message
    }

    fn question(message: &Message) -> Question {
        match read(&message.to_vec().unwrap()) {
            Read::Question(question) => question,
            other @ (Read::Answer(_) | Read::Nothing) => panic!("{other:?}"),
        }
    }

    /// What is said to bytes: the code, or nothing.
    fn said(bytes: &[u8]) -> Option<ResponseCode> {
        match read(bytes) {
            Read::Question(question) => panic!("{question:?}"),
            Read::Answer(answer) => {
                Some(Message::from_vec(&answer).unwrap().metadata.response_code)
            }
            Read::Nothing => None,
        }
    }

    #[test]
    fn what_is_no_question_is_told_so_or_passed_over() {
        let bytes = asked(RecordType::A).to_vec().unwrap();
        assert_eq!(said(&bytes[..11]), None);
        assert_eq!(said(&bytes[..20]), Some(ResponseCode::FormErr));
        let with = |change: fn(&mut Message)| {
            let mut message = asked(RecordType::A);
            change(&mut message);
            said(&message.to_vec().unwrap())
        };
        let answer = with(|message| message.metadata.message_type = MessageType::Response);
        assert_eq!(answer, None, "two servers would talk for ever");
        let update = with(|message| message.metadata.op_code = OpCode::Update);
        assert_eq!(update, Some(ResponseCode::NotImp));
        assert_eq!(
            with(|message| message.queries.clear()),
            Some(ResponseCode::FormErr)
        );
        let chaos = with(|message| _ = message.queries[0].set_query_class(DNSClass::CH));
        assert_eq!(chaos, Some(ResponseCode::Refused));
    }

    #[test]
    fn an_answer_repeats_number_and_question_and_says_how_long_it_is_true() {
        let zones = Zones::default();
        let mut message = asked(RecordType::A);
        assert_eq!(question(&message).udp_len_max(), 512);
        message
            .set_edns(Edns::new())
            .edns
            .as_mut()
            .unwrap()
            .set_max_payload(4096);
        let question = question(&message);
        assert_eq!(question.udp_len_max(), 4096);
        let found = Decision::Addresses(vec![[100, 64, 0, 2].into()]);
        let answer = question.answer(&zones, &found).unwrap();
        assert_eq!(answer.metadata.id, 7);
        assert!(answer.metadata.recursion_desired && answer.metadata.authoritative);
        assert_eq!(answer.queries, message.queries);
        assert_eq!(answer.answers[0].ttl, TTL);
        assert!(answer.edns.is_some());
        assert!(answers(
            &message.to_vec().unwrap(),
            &answer.to_vec().unwrap()
        ));
        let none = question.answer(&zones, &Decision::NoName).unwrap();
        assert_eq!(none.metadata.response_code, ResponseCode::NXDomain);
        assert!(question.answer(&zones, &Decision::ForwardToHost).is_none());
        let cut = question.truncated().to_vec().unwrap();
        assert!(is_truncated(&cut) && cut.len() < 100);
    }

    #[test]
    fn an_answer_to_something_else_is_none() {
        let question = asked(RecordType::A);
        let bytes = question.to_vec().unwrap();
        let answer = |change: fn(&mut Message)| {
            let mut answer = question.clone();
            answer.metadata.message_type = MessageType::Response;
            change(&mut answer);
            answers(&bytes, &answer.to_vec().unwrap())
        };
        assert!(answer(|_| {}));
        let upper = |answer: &mut Message| {
            let name = "BOB.Lab.example.".parse().unwrap();
            answer.queries[0].set_name(name);
        };
        assert!(answer(upper));
        assert!(!answer(|answer| answer.metadata.id ^= 1));
        assert!(!answer(
            |answer| answer.metadata.message_type = MessageType::Query
        ));
        assert!(!answer(
            |answer| _ = answer.queries[0].set_query_type(RecordType::AAAA)
        ));
        assert!(!answer(|answer| answer.queries.clear()));
        assert!(answer(|answer| {
            answer.queries.clear();
            answer.metadata.response_code = ResponseCode::ServFail;
        }));
        assert!(!answers(&bytes, &[0, 7]));
        let again = with_id(&bytes, [9, 9]);
        assert_eq!((id(&again), &again[2..]), ([9, 9], &bytes[2..]));
    }
}
