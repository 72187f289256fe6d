//! Who imports whom, drawn from the sources of both crates: a room takes from those alone that its
//! crate's page names before it, so that there is no circle. `cargo test -p ringtail-dataplane --lib rooms -- --nocapture` shows it.
//!
//! Tests may look anywhere, and macros that a crate exports are its root's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const MACROS: [&str; 1] = ["named"];

/// Every source file below `dir`.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let (dirs, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files
        .into_iter()
        .filter(|path| path.extension().is_some_and(|ext| ext == "rs"));
    files
        .chain(dirs.iter().flat_map(|dir| sources(dir)))
        .collect()
}

/// A text without comments and modules of tests, and the names of such modules that are files.
fn product(text: &str) -> (String, Vec<String>) {
    let lines = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or(line));
    let text = lines.collect::<Vec<_>>().join("\n");
    let mut parts = text.split("#[cfg(test)]");
    let mut product = parts.next().unwrap_or_default().to_owned();
    let mut files = Vec::new();
    for part in parts {
        let item = part.trim_start().trim_start_matches("pub(crate) ");
        match item
            .strip_prefix("mod ")
            .and_then(|module| module.split_once([' ', ';']))
        {
            Some((_, body)) if body.starts_with('{') => {
                let rest = body.split_once("\n}").map_or("", |(_, rest)| rest);
                product.push_str(rest);
            }
            Some((name, rest)) => {
                files.push(name.to_owned());
                product.push_str(rest);
            }
            None => product.push_str(part),
        }
    }
    (product, files)
}

/// The first names after every `crate::`, also of groups.
fn imports(text: &str) -> BTreeSet<String> {
    let name = |text: &str| -> String {
        let text = text.trim_start().chars();
        text.take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let mut found = BTreeSet::new();
    for after in text.split("crate::").skip(1) {
        let Some(group) = after.strip_prefix('{') else {
            found.insert(name(after));
            continue;
        };
        let mut depth = 0;
        let mut start = Some(group);
        for (at, c) in group.char_indices() {
            if depth == 0
                && let Some(group) = start.take()
            {
                found.insert(name(group));
            }
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => start = Some(&group[at + 1..]),
                _ => {}
            }
        }
    }
    found.remove("");
    found
}

#[test]
fn no_room_takes_from_one_above_it() {
    // Asked for when it runs, so that other sources can be drawn.
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let mut wrong = Vec::new();
    for name in ["dataplane", "control"] {
        let src = here.parent().unwrap().join(name).join("src");
        let page = fs::read_to_string(src.join("lib.rs")).unwrap();
        let entries = page
            .lines()
            .filter_map(|l| l.strip_prefix("//! - `")?.split_once("`:"));
        let order: Vec<&str> = entries.map(|(room, _)| room).collect();
        let texts: Vec<_> = sources(&src)
            .into_iter()
            .map(|path| (product(&fs::read_to_string(&path).unwrap()), path))
            .collect();
        let of_tests: BTreeSet<PathBuf> = texts
            .iter()
            .flat_map(|((_, tests), path)| {
                let stem = path.file_stem().unwrap();
                let dir = match stem.to_str() {
                    Some("mod" | "lib") => path.parent().unwrap().to_owned(),
                    _ => path.with_extension(""),
                };
                tests.iter().map(move |test| dir.join(test))
            })
            .collect();
        let mut picture: BTreeMap<usize, BTreeSet<String>> = BTreeMap::new();
        for ((text, _), path) in &texts {
            let tests = path.with_extension("");
            let module = path.strip_prefix(&src).unwrap();
            let room = module.iter().next().unwrap().to_str().unwrap();
            let room = room.trim_end_matches(".rs");
            if ["lib", "main"].contains(&room) || tests.ancestors().any(|at| of_tests.contains(at))
            {
                continue;
            }
            let Some(place) = order.iter().position(|at| *at == room) else {
                wrong.push(format!("{}: {room} has no place", path.display()));
                continue;
            };
            let taken = picture.entry(place).or_default();
            for from in imports(text) {
                if from == room || MACROS.contains(&from.as_str()) {
                    continue;
                }
                if !order[..place].contains(&from.as_str()) {
                    wrong.push(format!("{}: {room} takes {from}", path.display()));
                }
                taken.insert(from);
            }
        }
        println!("{name}, from above:");
        for (place, taken) in picture.iter().rev() {
            let taken: Vec<_> = taken.iter().map(String::as_str).collect();
            println!("  {} <- {}", order[*place], taken.join(" "));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
