//! Names: what is answered for, what is passed on, and what the host's resolver is to ask.
//!
//! Rooms: `zones` decides what becomes of a question, `upstream` is whom it is passed on to, `message` the
//! bytes, `wish` what the network wants of all this; `host` is how the host's resolver is told.

pub mod host;
pub mod message;
mod upstream;
mod wish;
mod zones;

pub use message::{MESSAGE_LEN_MAX, Question, Read};
pub use upstream::Upstream;
pub use wish::{HostDns, Wish};
pub use zones::{Decision, Exit, Own, Zones};
