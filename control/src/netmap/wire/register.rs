//! JSON of `/machine/register`, both directions, and of `GET /key`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::WireTime;
use crate::key::{MachinePublic, NodePublic};
use crate::netmap::derp_map::{is_default, null_is_default};

/// The credential of a registration.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegisterAuth {
    /// A pre-auth key; opaque.
    #[serde(deserialize_with = "null_is_default")]
    pub auth_key: zeroize::Zeroizing<String>,
}

impl std::fmt::Debug for RegisterAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegisterAuth(secret)")
    }
}

/// Request to be let into the network.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegisterRequest {
    /// Capability version; never 0.
    pub version: i64,
    /// The key we want to use.
    pub node_key: NodePublic,
    /// The previous key while rotating.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old_node_key: Option<NodePublic>,
    /// A pre-auth key, if one is used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<RegisterAuth>,
    /// In the past: log out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiry: Option<WireTime>,
    /// The URL a human was sent to; the call then blocks until that is settled.
    #[serde(deserialize_with = "null_is_default")]
    pub followup: String,
    /// Must be present.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostinfo: Option<Value>,
    /// Ask to be forgotten when gone. Headscale does not listen.
    #[serde(skip_serializing_if = "is_default")]
    pub ephemeral: bool,
}

/// The owner as the register answer names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegisterUser {
    /// Positive when registered.
    #[serde(rename = "ID")]
    pub id: i64,
    /// Name for display.
    #[serde(deserialize_with = "null_is_default")]
    pub display_name: String,
}

/// The log-in as the register answer names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegisterLogin {
    /// Positive when registered.
    #[serde(rename = "ID")]
    pub id: i64,
    /// Identity provider.
    #[serde(deserialize_with = "null_is_default")]
    pub provider: String,
    /// Name at log-in.
    #[serde(deserialize_with = "null_is_default")]
    pub login_name: String,
    /// Name for display.
    #[serde(deserialize_with = "null_is_default")]
    pub display_name: String,
}

/// Answer to a [`RegisterRequest`]; evaluated in the order `error`, `node_key_expired`,
/// `auth_url`, success.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegisterResponse {
    /// The owner.
    #[serde(deserialize_with = "null_is_default")]
    pub user: RegisterUser,
    /// The log-in.
    #[serde(deserialize_with = "null_is_default")]
    pub login: RegisterLogin,
    /// A new node key is needed.
    pub node_key_expired: bool,
    /// False with an empty `auth_url`: waiting for an administrator.
    pub machine_authorized: bool,
    /// A human must visit it.
    #[serde(rename = "AuthURL", deserialize_with = "null_is_default")]
    pub auth_url: String,
    /// Tailnet lock, which is not supported.
    pub node_key_signature: Option<Value>,
    /// Not empty: refused.
    #[serde(deserialize_with = "null_is_default")]
    pub error: String,
}

/// Answer to `GET /key`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KeyResponse {
    /// Zero; unused.
    pub legacy_public_key: MachinePublic,
    /// The server's Noise key.
    pub public_key: MachinePublic,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recorded_answer_of_headscale_parses() {
        let text = include_str!("../../../tests/vectors/coordination/headscale-register.json");
        let recorded: Value = serde_json::from_str(text).unwrap();
        let mut answers = 0;
        for exchange in recorded["exchanges"].as_array().unwrap() {
            if exchange["status"] != 200 {
                continue;
            }
            let answer: RegisterResponse =
                serde_json::from_value(exchange["response"].clone()).unwrap();
            assert_eq!(answer.user.id, answer.login.id);
            answers += 1;
        }
        assert_eq!(answers, 21);
    }
}
