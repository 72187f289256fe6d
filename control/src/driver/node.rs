//! A running node: the loop that feeds the agent from the outside and carries out what it says.

use crate::config::NodeConfig;

/// Runs a node until it is told to stop.
///
/// # Errors
/// Always, until the rooms it joins have landed.
pub fn run(_config: NodeConfig) -> anyhow::Result<()> {
    anyhow::bail!("the agent has not landed yet")
}
