//! Vectors and recorded sessions, for tests.

use serde_json::Value;

use crate::key::{NodePrivate, NodePublic};

pub(crate) struct Vectors(Value);

pub(crate) fn vectors() -> Vectors {
    Vectors(serde_json::from_str(include_str!("../../tests/vectors/p2p-vectors.json")).unwrap())
}

fn unhex(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

impl Vectors {
    pub(crate) fn derp(&self, name: &str) -> Vec<u8> {
        unhex(&self.0["derp"][name])
    }

    pub(crate) fn private(&self, name: &str) -> NodePrivate {
        NodePrivate::clamped(unhex(&self.0["keys"][name]["private"]).try_into().unwrap())
    }

    pub(crate) fn public(&self, name: &str) -> NodePublic {
        NodePublic(unhex(&self.0["keys"][name]["public"]).try_into().unwrap())
    }

    pub(crate) fn mesh_key(&self) -> [u8; 32] {
        unhex(&self.0["mesh_key"]).try_into().unwrap()
    }

    pub(crate) fn http(&self, name: &str) -> String {
        self.0["http"][name].as_str().unwrap().to_owned()
    }

    pub(crate) fn meta_certificate(&self) -> Vec<u8> {
        unhex(&self.0["derp_meta_certificate_der"])
    }
}

pub(crate) struct Live(Value);

pub(crate) fn live(name: &str) -> Live {
    let text = match name {
        "derp-session" => include_str!("../../tests/vectors/derp-session.json"),
        "tailscaled-as-client" => include_str!("../../tests/vectors/tailscaled-as-client.json"),
        other => panic!("no recording {other}"),
    };
    Live(serde_json::from_str(text).unwrap())
}

impl Live {
    pub(crate) fn sessions(&self) -> Vec<Session> {
        let list = self.0.get("sessions").or_else(|| self.0.get("connections"));
        let list = list.unwrap().as_array().unwrap();
        list.iter().cloned().map(Session).collect()
    }

    /// The frames of every direction of every session.
    pub(crate) fn frame_streams(&self) -> Vec<Vec<Vec<u8>>> {
        let mut streams = Vec::new();
        for session in self.sessions() {
            for direction in ["c2s", "s2c"] {
                streams.push(session.direction(direction));
            }
        }
        streams
    }

    pub(crate) fn chain(&self) -> Vec<Vec<u8>> {
        let list = self.0["tls_chain_der"].as_array().unwrap();
        list.iter().map(unhex).collect()
    }
}

pub(crate) struct Session(Value);

impl Session {
    fn records(&self) -> impl Iterator<Item = &Value> {
        self.0["records"].as_array().unwrap().iter()
    }

    pub(crate) fn direction(&self, direction: &str) -> Vec<Vec<u8>> {
        self.records()
            .filter(|r| r["dir"] == direction && r["what"] != "http")
            .map(|r| unhex(&r["hex"]))
            .collect()
    }

    pub(crate) fn http(&self, direction: &str) -> Option<Vec<u8>> {
        self.records()
            .find(|r| r["dir"] == direction && r["what"] == "http")
            .map(|r| unhex(&r["hex"]))
    }

    pub(crate) fn frames(&self, what: &str) -> Vec<Vec<u8>> {
        self.records()
            .filter(|r| r["what"] == what)
            .map(|r| unhex(&r["hex"]))
            .collect()
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        unhex(&self.0[name])
    }

    pub(crate) fn key(&self, name: &str) -> NodePrivate {
        NodePrivate::clamped(self.bytes(name).try_into().unwrap())
    }

    pub(crate) fn text(&self, name: &str) -> &str {
        self.0[name].as_str().unwrap()
    }
}
