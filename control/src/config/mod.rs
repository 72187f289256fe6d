//! What people write: the node's own file and the static network file, both TOML.
//!
//! A node takes its settings from `--config FILE` and from flags; a flag wins over the file. Who
//! is in the network comes from a coordination server or from a static network file, never both.
//! Unknown keys are errors, so that a misspelt one is not silently ignored.

mod layers;
mod network;
mod node;
mod plain;
mod prefs;

pub use layers::Layers;
pub use network::{StaticNetwork, StaticPeer};
pub use node::{AuthKey, DriverName, EngineName, NodeConfig, Tags, ValidateMode};
pub use plain::{Endpoint, PLAIN_PEERS_MAX, PlainPeer};
pub use prefs::{Forwarding, HostFirewall, Prefs, PrefsChange, Routes, Snat};

use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer};

use crate::netmap::prefix::parse_route;

/// Why a file was refused, with the file's name and, for TOML, the line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The text is not of the wanted shape, or contradicts itself.
    #[error("{path}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where or what would be right.
        message: String,
    },
}

/// A list of prefixes that somebody wants routed.
fn routes<'de, D: Deserializer<'de>, R: FromIterator<IpNet>>(
    deserializer: D,
) -> Result<R, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let parsed = texts.iter().map(|text| parse_route(text));
    parsed
        .collect::<Result<_, _>>()
        .map_err(serde::de::Error::custom)
}

/// The same where there may be none.
fn optional_routes<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<IpNet>>, D::Error> {
    routes(deserializer).map(Some)
}

/// Reads a TOML file into its type.
fn read_toml<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|error| ConfigError::Invalid {
        path: path.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })
}
