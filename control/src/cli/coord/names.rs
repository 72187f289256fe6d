//! What the server tells nodes of names beside their own: resolvers, suffixes, extra records.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;

use super::read_text;
use crate::netmap::wire::{DNS_NAME_LEN_MAX, DNS_RECORDS_MAX, DnsConfig, ExtraRecord, Resolver};

/// A file of extra records at most, in bytes.
const RECORDS_LEN_MAX: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct NamesArgs {
    /// Resolver for all other names, instead of each host's own; may be repeated.
    #[arg(long = "dns-server", value_name = "ADDR", value_parser = parse_resolver)]
    servers: Vec<String>,
    /// Resolver for names under a domain; may be repeated, also for one domain.
    #[arg(long = "split-dns", value_name = "DOMAIN=ADDR", value_parser = parse_split)]
    split: Vec<(String, String)>,
    /// Names beside those of nodes: a list of {"name", "type": "A" or "AAAA", "value"} in JSON. Read
    /// again on SIGHUP.
    #[arg(long, value_name = "FILE")]
    extra_records: Option<PathBuf>,
}

/// An address, with a port or without.
fn parse_resolver(text: &str) -> Result<String, String> {
    let is_one = text.parse::<IpAddr>().is_ok() || text.parse::<SocketAddr>().is_ok();
    let one = is_one.then(|| text.to_owned());
    one.ok_or_else(|| "write an address, such as 10.0.0.53 or [fd00::53]:5353".to_owned())
}

fn parse_split(text: &str) -> Result<(String, String), String> {
    let (domain, server) = text
        .split_once('=')
        .ok_or("write DOMAIN=ADDR, such as corp.example=10.0.0.53")?;
    Ok((name(domain)?, parse_resolver(server)?))
}

/// A name in lower case, without the dot at its end.
fn name(text: &str) -> Result<String, String> {
    let name = text.trim_end_matches('.').to_ascii_lowercase();
    let labels = || name.split('.').all(|label| (1..=63).contains(&label.len()));
    let letters = || name.bytes().all(|byte| byte.is_ascii_graphic());
    if name.len() > DNS_NAME_LEN_MAX || !labels() || !letters() {
        return Err(format!("{text:?} cannot be a name"));
    }
    Ok(name)
}

impl NamesArgs {
    /// Whether there is a file that may change.
    pub(super) fn has_file(&self) -> bool {
        self.extra_records.is_some()
    }

    /// Reads the file, if there is one.
    pub(super) fn config(&self) -> anyhow::Result<DnsConfig> {
        let resolver = |addr: &String| Resolver {
            addr: addr.clone(),
            ..Resolver::default()
        };
        let mut routes: BTreeMap<String, Vec<Resolver>> = BTreeMap::new();
        for (domain, server) in &self.split {
            routes
                .entry(domain.clone())
                .or_default()
                .push(resolver(server));
        }
        Ok(DnsConfig {
            resolvers: self.servers.iter().map(resolver).collect(),
            routes,
            extra_records: self
                .extra_records
                .as_deref()
                .map_or(Ok(Vec::new()), records)?,
            ..DnsConfig::default()
        })
    }
}

fn records(path: &Path) -> anyhow::Result<Vec<ExtraRecord>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Record {
        name: String,
        #[serde(default, rename = "type")]
        kind: String,
        value: IpAddr,
    }
    let text = read_text(path, RECORDS_LEN_MAX)?;
    let records: Vec<Record> = serde_json::from_str(&text)
        .with_context(|| format!("{} holds no extra records", path.display()))?;
    if records.len() > DNS_RECORDS_MAX {
        bail!("{} has more than {DNS_RECORDS_MAX} records", path.display());
    }
    let read = records.into_iter().map(|record| {
        let kind = if record.value.is_ipv4() { "A" } else { "AAAA" };
        if !record.kind.is_empty() && record.kind != kind {
            bail!("{}: {} is no {}", path.display(), record.value, record.kind);
        }
        let name = name(&record.name).map_err(anyhow::Error::msg)?;
        Ok(ExtraRecord {
            name,
            value: record.value,
        })
    });
    read.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_records_are_read_as_headscale_writes_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            records(file.path())
        };
        let found = read(
            r#"[{"name": "Grafana.tail.internal.", "type": "A", "value": "100.64.0.3"},
                {"name": "six.tail.internal", "value": "fd00::1"}]"#,
        )
        .unwrap();
        let record = |name: &str, value: &str| ExtraRecord {
            name: name.to_owned(),
            value: value.parse().unwrap(),
        };
        assert_eq!(
            found,
            [
                record("grafana.tail.internal", "100.64.0.3"),
                record("six.tail.internal", "fd00::1")
            ]
        );
        for bad in [
            "",
            "{}",
            r#"[{"name": "a", "type": "AAAA", "value": "100.64.0.3"}]"#,
            r#"[{"name": "a", "type": "CNAME", "value": "100.64.0.3"}]"#,
            r#"[{"name": "a..b", "value": "100.64.0.3"}]"#,
            r#"[{"name": "", "value": "100.64.0.3"}]"#,
            r#"[{"name": "a", "value": "b"}]"#,
            r#"[{"name": "a", "value": "100.64.0.3", "ttl": 1}]"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(
            parse_split("corp.example.=10.0.0.53").is_ok_and(|(name, _)| name == "corp.example")
        );
        for bad in [
            "corp.example",
            "=10.0.0.53",
            "corp.example=resolver",
            "a b=10.0.0.53",
        ] {
            assert!(parse_split(bad).is_err(), "{bad}");
        }
    }
}
