//! Joins what single relays say of themselves into one DERP map.

#![forbid(unsafe_code)]

use anyhow::{Context, bail};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// `derp-map`: state directories of relays.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// State directories, each with a derp-node.json.
    #[arg(required = true)]
    directories: Vec<PathBuf>,
}

/// Prints the map as JSON.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut regions = Map::new();
    for directory in &args.directories {
        let path = directory.join("derp-node.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        add(&mut regions, serde_json::from_str(&text)?)
            .with_context(|| format!("in {}", path.display()))?;
    }
    println!("{:#}", json!({ "Regions": regions }));
    Ok(())
}

/// Takes a whole map, one region, or regions by id.
fn add(regions: &mut Map<String, Value>, entry: Value) -> anyhow::Result<()> {
    let Value::Object(mut entry) = entry else {
        bail!("an object was expected")
    };
    if let Some(Value::Object(inner)) = entry.remove("Regions") {
        regions.extend(inner);
        return Ok(());
    }
    match entry.get("RegionID").and_then(Value::as_u64) {
        Some(id) => {
            regions.insert(id.to_string(), Value::Object(entry));
        }
        None => regions.extend(entry),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_regions_and_regions_by_id_all_join() -> anyhow::Result<()> {
        let mut regions = Map::new();
        add(&mut regions, json!({"RegionID": 900, "RegionCode": "nyc"}))?;
        add(&mut regions, json!({"901": {"RegionID": 901}}))?;
        add(&mut regions, json!({"Regions": {"902": {"RegionID": 902}}}))?;
        assert_eq!(regions.keys().collect::<Vec<_>>(), ["900", "901", "902"]);
        assert!(add(&mut regions, json!(1)).is_err());
        Ok(())
    }
}
