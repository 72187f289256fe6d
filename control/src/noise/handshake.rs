//! Both roles of the handshake.

use ringtail_dataplane::SymmetricState;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use super::{
    Error, HEADER_LEN, INITIATION_LEN, Opener, RESPONSE_LEN, Sealer, TAG_LEN, TYPE_ERROR,
    TYPE_INITIATION, TYPE_RESPONSE,
};
use crate::key::{KEY_LEN, MachinePrivate, MachinePublic};

const PROTOCOL_NAME: &[u8] = b"Noise_IK_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &str = "Tailscale Control Protocol v";
const INITIATION_HEADER_LEN: usize = 5;

/// Text of a refusal kept at most, in bytes.
const REFUSAL_LEN_MAX: usize = 256;

/// Keys of both directions, ready for records.
#[derive(Debug)]
pub struct Session {
    /// Seals what we send.
    pub sealer: Sealer,
    /// Opens what we receive.
    pub opener: Opener,
    /// The final hash: the same on both sides, and unique to the session.
    pub handshake_hash: [u8; KEY_LEN],
}

/// What a server learns from message 1.
#[derive(Debug)]
pub struct Accepted {
    /// Capability version the client speaks.
    pub version: u16,
    /// Who it is; proven.
    pub machine: MachinePublic,
    /// The keys.
    pub session: Session,
}

/// The client between its message and the server's.
#[derive(Debug)]
pub struct Initiator {
    state: SymmetricState,
    ephemeral: MachinePrivate,
    machine: MachinePrivate,
}

impl Initiator {
    /// Starts a handshake and gives message 1: version u16, type, length u16, ephemeral 32,
    /// encrypted static 48, tag 16; big-endian. `ephemeral` must be fresh for every handshake.
    ///
    /// # Errors
    /// [`Error::LowOrder`] when the server's key is no usable point.
    pub fn new(
        version: u16,
        machine: &MachinePrivate,
        control: &MachinePublic,
        ephemeral: MachinePrivate,
    ) -> Result<(Self, [u8; INITIATION_LEN]), Error> {
        let mut state = start(version, control);
        let mut message = [0; INITIATION_LEN];
        message[..2].copy_from_slice(&version.to_be_bytes());
        message[2] = TYPE_INITIATION;
        message[3..5].copy_from_slice(&be_len(INITIATION_LEN - INITIATION_HEADER_LEN));
        let (e, rest) = message[INITIATION_HEADER_LEN..].split_at_mut(KEY_LEN);
        let (s, tag) = rest.split_at_mut(KEY_LEN + TAG_LEN);
        e.copy_from_slice(&ephemeral.public().0);
        state.mix_hash(e);
        let key = state.mix_key(&*dh(&ephemeral, control)?);
        s[..KEY_LEN].copy_from_slice(&machine.public().0);
        state.seal(&key, s);
        let key = state.mix_key(&*dh(machine, control)?);
        state.seal(&key, tag);
        let initiator = Self {
            state,
            ephemeral,
            machine: machine.clone(),
        };
        Ok((initiator, message))
    }

    /// Takes message 2 whole, or an error message of the server.
    ///
    /// # Errors
    /// Whatever makes the session impossible; [`Error::Refused`] carries the server's text.
    pub fn finish(mut self, message: &[u8]) -> Result<Session, Error> {
        let (header, body) = message
            .split_first_chunk()
            .ok_or(Error::Length(message.len()))?;
        let body_len = Self::answer_body_len(*header)?;
        if body.len() != body_len {
            return Err(Error::Length(body.len()));
        }
        if header[0] == TYPE_ERROR {
            let text = &body[..body.len().min(REFUSAL_LEN_MAX)];
            return Err(Error::Refused(String::from_utf8_lossy(text).into_owned()));
        }
        let e = public(body);
        self.state.mix_hash(&e.0);
        self.state.mix_secret(&*dh(&self.ephemeral, &e)?);
        let key = self.state.mix_key(&*dh(&self.machine, &e)?);
        let mut tag = [0; TAG_LEN];
        tag.copy_from_slice(&body[KEY_LEN..]);
        open(&mut self.state, &key, &mut tag)?;
        let (handshake_hash, _) = self.state.to_parts();
        let [ours, theirs] = self.state.split();
        Ok(Session {
            sealer: Sealer::new(&ours),
            opener: Opener::new(&theirs),
            handshake_hash,
        })
    }

    /// From the first three bytes of the server's answer, how many bytes follow them: 48, or those of
    /// the text when it refuses.
    ///
    /// # Errors
    /// Another type, or a length no such message has.
    pub fn answer_body_len([kind, high, low]: [u8; HEADER_LEN]) -> Result<usize, Error> {
        let len = usize::from(u16::from_be_bytes([high, low]));
        match kind {
            TYPE_RESPONSE if len == RESPONSE_LEN - HEADER_LEN => Ok(len),
            TYPE_RESPONSE => Err(Error::Length(len)),
            TYPE_ERROR => Ok(len),
            kind => Err(Error::Type(kind)),
        }
    }
}

/// Answers message 1 with message 2: type, length u16, ephemeral 32, tag 16. `ephemeral` must be
/// fresh for every handshake.
///
/// # Errors
/// A wrong length or type, a key of low order, or failed authentication, which also means that
/// the client believes in another server key.
pub fn respond(
    control: &MachinePrivate,
    message: &[u8],
    ephemeral: &MachinePrivate,
) -> Result<(Accepted, [u8; RESPONSE_LEN]), Error> {
    let message: &[u8; INITIATION_LEN] = message
        .try_into()
        .map_err(|_| Error::Length(message.len()))?;
    let version = u16::from_be_bytes([message[0], message[1]]);
    if message[2] != TYPE_INITIATION {
        return Err(Error::Type(message[2]));
    }
    if message[3..5] != be_len(INITIATION_LEN - INITIATION_HEADER_LEN) {
        let len = u16::from_be_bytes([message[3], message[4]]);
        return Err(Error::Length(usize::from(len)));
    }
    let mut state = start(version, &control.public());
    let (e, rest) = message[INITIATION_HEADER_LEN..].split_at(KEY_LEN);
    let (s, tag) = rest.split_at(KEY_LEN + TAG_LEN);
    state.mix_hash(e);
    let e = public(e);
    let key = state.mix_key(&*dh(control, &e)?);
    let mut sealed = [0; KEY_LEN + TAG_LEN];
    sealed.copy_from_slice(s);
    open(&mut state, &key, &mut sealed)?;
    let machine = public(&sealed[..KEY_LEN]);
    let key = state.mix_key(&*dh(control, &machine)?);
    let mut empty = [0; TAG_LEN];
    empty.copy_from_slice(tag);
    open(&mut state, &key, &mut empty)?;

    let mut answer = [0; RESPONSE_LEN];
    answer[0] = TYPE_RESPONSE;
    answer[1..3].copy_from_slice(&be_len(RESPONSE_LEN - HEADER_LEN));
    let (e_out, tag_out) = answer[HEADER_LEN..].split_at_mut(KEY_LEN);
    e_out.copy_from_slice(&ephemeral.public().0);
    state.mix_hash(e_out);
    state.mix_secret(&*dh(ephemeral, &e)?);
    let key = state.mix_key(&*dh(ephemeral, &machine)?);
    state.seal(&key, tag_out);
    let (handshake_hash, _) = state.to_parts();
    let [theirs, ours] = state.split();
    let accepted = Accepted {
        version,
        machine,
        session: Session {
            sealer: Sealer::new(&ours),
            opener: Opener::new(&theirs),
            handshake_hash,
        },
    };
    Ok((accepted, answer))
}

/// Name, prologue and the responder's static key, which the initiator knows beforehand.
fn start(version: u16, control: &MachinePublic) -> SymmetricState {
    let mut state = SymmetricState::new(PROTOCOL_NAME);
    state.mix_hash(format!("{PROLOGUE}{version}").as_bytes());
    state.mix_hash(&control.0);
    state
}

fn open(state: &mut SymmetricState, key: &[u8; KEY_LEN], buffer: &mut [u8]) -> Result<(), Error> {
    let opened = state.open(key, buffer);
    opened.map_err(|_| Error::Authentication)
}

fn dh(private: &MachinePrivate, public: &MachinePublic) -> Result<Zeroizing<[u8; KEY_LEN]>, Error> {
    let secret = StaticSecret::from(*private.as_bytes());
    ringtail_dataplane::dh(&secret, &public.0).map_err(|_| Error::LowOrder)
}

/// The first 32 bytes as a key.
fn public(bytes: &[u8]) -> MachinePublic {
    let mut key = [0; KEY_LEN];
    key.copy_from_slice(&bytes[..KEY_LEN]);
    MachinePublic(key)
}

fn be_len(len: usize) -> [u8; 2] {
    u16::try_from(len)
        .expect("handshake messages are short")
        .to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::vectors::{self, Vectors};
    use super::*;

    /// The client of the vectors and its message.
    fn initiator(v: &Vectors) -> (Initiator, [u8; INITIATION_LEN]) {
        let control = v.private("control_static").public();
        let ephemeral = v.private("client_ephemeral");
        Initiator::new(130, &v.private("client_static"), &control, ephemeral).unwrap()
    }

    #[test]
    fn both_roles_reproduce_every_byte_of_the_vectors() {
        let v = Vectors::read();
        let (client, control) = (v.private("client_static"), v.private("control_static"));
        let (initiator, message) = initiator(&v);
        assert_eq!(hex::encode(message), v.text("initiation_message"));
        let ephemeral = v.private("control_ephemeral");
        let (accepted, answer) = respond(&control, &message, &ephemeral).unwrap();
        assert_eq!(hex::encode(answer), v.text("response_message"));
        assert_eq!((accepted.version, accepted.machine), (130, client.public()));
        let session = initiator.finish(&answer).unwrap();
        assert_eq!(
            hex::encode(session.handshake_hash),
            v.text("handshake_hash")
        );
        assert_eq!(session.handshake_hash, accepted.session.handshake_hash);
        let [up, down] = ["key_client_to_server", "key_server_to_client"].map(|name| v.bytes(name));
        assert!(session.sealer.has_key(&up) && session.opener.has_key(&down));
        assert!(accepted.session.opener.has_key(&up) && accepted.session.sealer.has_key(&down));
    }

    #[test]
    fn hash_and_chaining_key_match_after_every_step() {
        let v = Vectors::read();
        let (client, control) = (v.private("client_static"), v.private("control_static"));
        let (e_c, e_s) = (
            v.private("client_ephemeral"),
            v.private("control_ephemeral"),
        );
        let mut state = SymmetricState::new(PROTOCOL_NAME);
        let mut step = 0;
        let mut check = |state: &SymmetricState| {
            let expected = &v.json["steps"][step];
            let (hash, chain) = state.to_parts();
            assert_eq!(
                hex::encode(hash),
                expected["h"].as_str().unwrap(),
                "step {step}"
            );
            assert_eq!(
                hex::encode(*chain),
                expected["ck"].as_str().unwrap(),
                "step {step}"
            );
            step += 1;
        };
        let shared = |name: &str, a: &MachinePrivate, b: MachinePublic| {
            let secret = dh(a, &b).unwrap();
            assert_eq!(hex::encode(*secret), v.text(name));
            secret
        };
        check(&state);
        state.mix_hash(v.text("prologue_ascii").as_bytes());
        check(&state);
        state.mix_hash(&control.public().0);
        check(&state);
        state.mix_hash(&e_c.public().0);
        check(&state);
        let key = state.mix_key(&shared("dh_es", &e_c, control.public()));
        check(&state);
        let mut s = [0; 48];
        s[..32].copy_from_slice(&client.public().0);
        state.seal(&key, &mut s);
        check(&state);
        let key = state.mix_key(&shared("dh_ss", &client, control.public()));
        check(&state);
        state.seal(&key, &mut [0; 16]);
        check(&state);
        state.mix_hash(&e_s.public().0);
        check(&state);
        state.mix_secret(&shared("dh_ee", &e_s, e_c.public()));
        check(&state);
        let key = state.mix_key(&shared("dh_se", &e_s, client.public()));
        check(&state);
        state.seal(&key, &mut [0; 16]);
        check(&state);
        assert_eq!(step, v.json["steps"].as_array().unwrap().len());
    }

    #[test]
    fn every_single_bit_flip_and_every_truncation_is_refused() {
        let v = Vectors::read();
        let control = v.private("control_static");
        let ephemeral = v.private("control_ephemeral");
        let message = v.bytes("initiation_message");
        for bit in 0..message.len() * 8 {
            let mut bad = message.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(respond(&control, &bad, &ephemeral).is_err(), "bit {bit}");
        }
        for len in 0..message.len() {
            assert_eq!(
                respond(&control, &message[..len], &ephemeral).unwrap_err(),
                Error::Length(len)
            );
        }
        let answer = v.bytes("response_message");
        for bit in 0..answer.len() * 8 {
            let mut bad = answer.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(initiator(&v).0.finish(&bad).is_err(), "bit {bit}");
        }
        for len in 0..answer.len() {
            let cut = initiator(&v).0.finish(&answer[..len]);
            assert!(cut.is_err(), "length {len}");
        }
    }

    #[test]
    fn another_server_key_and_points_of_low_order_are_refused() {
        let v = Vectors::read();
        let other = MachinePrivate::clamped([9; 32]);
        let message = v.bytes("initiation_message");
        let refused = respond(&other, &message, &v.private("control_ephemeral"));
        assert_eq!(refused.unwrap_err(), Error::Authentication);
        let zero = MachinePublic([0; 32]);
        let client = v.private("client_static");
        let started = Initiator::new(130, &client, &zero, v.private("client_ephemeral"));
        assert_eq!(started.unwrap_err(), Error::LowOrder);
        let mut low = message.clone();
        low[5..37].fill(0);
        let refused = respond(
            &v.private("control_static"),
            &low,
            &v.private("control_ephemeral"),
        );
        assert_eq!(refused.unwrap_err(), Error::LowOrder);
    }

    #[test]
    fn a_refusal_carries_the_servers_text() {
        let (initiator, _) = initiator(&Vectors::read());
        let refused = initiator.finish(b"\x03\x00\x03no!").unwrap_err();
        assert_eq!(refused, Error::Refused("no!".to_owned()));
        assert_eq!(Initiator::answer_body_len([3, 1, 0]), Ok(256));
        assert_eq!(Initiator::answer_body_len([4, 0, 48]), Err(Error::Type(4)));
        assert_eq!(
            Initiator::answer_body_len([2, 0, 49]),
            Err(Error::Length(49))
        );
    }

    #[test]
    fn the_recorded_session_with_headscale_is_rebuilt_bit_for_bit() {
        let recorded = vectors::recorded();
        let text = |name: &str| recorded[name].as_str().unwrap();
        let client = vectors::private(text("client_static_private"));
        let control = vectors::private(text("control_static_private"));
        let ephemeral = vectors::private(text("client_ephemeral_private"));
        let (initiator, message) =
            Initiator::new(130, &client, &control.public(), ephemeral).unwrap();
        assert_eq!(hex::encode(message), text("initiation_message"));
        let answer = hex::decode(text("response_message")).unwrap();
        let session = initiator.finish(&answer).unwrap();
        assert_eq!(hex::encode(session.handshake_hash), text("handshake_hash"));
        let up = hex::decode(text("key_client_to_server")).unwrap();
        let down = hex::decode(text("key_server_to_client")).unwrap();
        assert!(session.sealer.has_key(&up) && session.opener.has_key(&down));
        let e = MachinePrivate::clamped([3; 32]);
        let (accepted, _) = respond(&control, &message, &e).unwrap();
        assert_eq!(accepted.machine, client.public());
    }
}
