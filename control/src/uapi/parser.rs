//! From bytes to requests, however the stream is cut.

use zeroize::Zeroizing;

use super::{Errno, Transaction};

/// Longest line in bytes, as in wireguard-go.
pub const LINE_LEN_MAX: usize = 64 << 10;
/// Bytes that [`Parser::handle_bytes`] takes at once at most.
pub const READ_LEN_MAX: usize = 64 << 10;

/// What a client asks for.
#[derive(Clone, Debug)]
pub enum Request {
    /// `get=1`: everything about the device.
    Get,
    /// `get=1` with something behind it that does not belong there.
    BadGet(Errno),
    /// `set=1`: these changes, or why they are refused.
    Set(Result<Transaction, Errno>),
}

/// The reading half of a connection. Push bytes with [`Parser::handle_bytes`], then take requests
/// with [`Parser::poll_request`] until there is none; only then push more.
///
/// At the end of the stream a `set` is taken as if the closing empty line were there, its last line
/// even without a newline, as wireguard-go does; anything else that is unfinished is forgotten.
pub struct Parser {
    /// Never grows past its first capacity, so that no copy of a secret is left behind.
    buffer: Zeroizing<Vec<u8>>,
    /// Where unread bytes begin.
    start: usize,
    /// Up to here there is no newline.
    scanned: usize,
    ended: bool,
    /// In a line that was too long, up to its newline.
    in_long_line: bool,
    state: State,
    resolve: fn(&str) -> Option<u32>,
}

enum State {
    /// Before the first line of a request.
    Idle,
    /// After `get=1`.
    Get,
    /// After a bad line of a `get`, which is answered already: up to the empty line.
    SkipGet,
    /// After `set=1`, all lines good so far.
    Set(Box<Transaction>),
    /// After a bad line of a `set`: up to the empty line.
    SkipSet(Errno),
    /// Out of step with the client for good.
    Closed,
}

impl Parser {
    /// The parser of a new connection. `resolve` gives the index of an interface by its name.
    pub fn new(resolve: fn(&str) -> Option<u32>) -> Self {
        Self {
            buffer: Zeroizing::new(Vec::with_capacity(LINE_LEN_MAX + READ_LEN_MAX)),
            start: 0,
            scanned: 0,
            ended: false,
            in_long_line: false,
            state: State::Idle,
            resolve,
        }
    }

    /// Takes bytes of the stream, [`READ_LEN_MAX`] at most.
    pub fn handle_bytes(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= READ_LEN_MAX);
        if self.is_closed() {
            return;
        }
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes note of the end of the stream.
    pub fn handle_end(&mut self) {
        self.ended = true;
    }

    /// Whether no more requests will come: the connection is to be closed.
    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// Whether nothing of a request is under way.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle) && self.start == self.buffer.len()
    }

    /// Bytes held.
    #[cfg(test)]
    pub(super) fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Takes the next whole request.
    pub fn poll_request(&mut self) -> Option<Request> {
        while !self.is_closed() {
            let end = self.line_end();
            let Some((end, terminated)) = end else {
                return if self.ended { self.finish() } else { None };
            };
            let at = self.start;
            self.start = end + usize::from(terminated);
            self.scanned = self.start;
            let too_long = std::mem::take(&mut self.in_long_line) || end - at > LINE_LEN_MAX;
            let line = if too_long {
                Err(Errno::IO)
            } else {
                Ok(&self.buffer[at..end])
            };
            if let Some(request) = take_line(&mut self.state, line, terminated, self.resolve) {
                return Some(request);
            }
        }
        None
    }

    /// Where the next line ends, and whether by a newline.
    fn line_end(&mut self) -> Option<(usize, bool)> {
        if let Some(at) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') {
            return Some((self.scanned + at, true));
        }
        self.scanned = self.buffer.len();
        if self.ended && (self.start < self.buffer.len() || self.in_long_line) {
            return Some((self.buffer.len(), false));
        }
        if self.buffer.len() - self.start > LINE_LEN_MAX {
            self.in_long_line = true;
        }
        if self.in_long_line {
            self.start = self.buffer.len();
            if matches!(self.state, State::Idle) {
                // No request begins like this: no need to hear it out.
                self.state = State::Closed;
            }
        }
        None
    }

    /// The stream ended between lines.
    fn finish(&mut self) -> Option<Request> {
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Set(transaction) => Some(Request::Set(Ok(*transaction))),
            State::SkipSet(errno) => Some(Request::Set(Err(errno))),
            State::Idle | State::Get | State::SkipGet | State::Closed => None,
        }
    }
}

/// One line, or why it cannot be read. `terminated` is false for the last one of a stream that ends
/// in mid-line.
fn take_line(
    state: &mut State,
    line: Result<&[u8], Errno>,
    terminated: bool,
    resolve: fn(&str) -> Option<u32>,
) -> Option<Request> {
    // As Go's line scanner does, which reads all lines but the first in wireguard-go.
    let inner = line.map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let empty = inner.is_ok_and(<[u8]>::is_empty);
    let (next, request) = match std::mem::replace(state, State::Closed) {
        State::Idle if line == Ok(b"get=1") && terminated => (State::Get, None),
        State::Idle if line == Ok(b"set=1") && terminated => (State::Set(Box::default()), None),
        State::Idle | State::Closed => (State::Closed, None),
        State::Get if empty => (State::Idle, Some(Request::Get)),
        State::Get => {
            let errno = inner.err().unwrap_or(Errno::INVALID);
            (State::SkipGet, Some(Request::BadGet(errno)))
        }
        State::SkipGet if empty => (State::Idle, None),
        State::SkipGet => (State::SkipGet, None),
        State::Set(transaction) if empty => (State::Idle, Some(Request::Set(Ok(*transaction)))),
        State::Set(mut transaction) => {
            match inner.and_then(|line| transaction.take_line(line, resolve)) {
                Ok(()) => (State::Set(transaction), None),
                Err(errno) => (State::SkipSet(errno), None),
            }
        }
        State::SkipSet(errno) if empty => (State::Idle, Some(Request::Set(Err(errno)))),
        State::SkipSet(errno) => (State::SkipSet(errno), None),
    };
    *state = next;
    request
}
