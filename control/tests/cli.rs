//! The program from the outside: what people type and what they get.
#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

fn ringtail(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ringtail"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments need not read.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn help_teaches_the_first_network() {
    let out = ringtail(&["--help"], "");
    assert!(out.status.success());
    for word in [
        "up",
        "device",
        "status",
        "ping",
        "netcheck",
        "genkey",
        "pubkey",
        "--auth-key-file",
    ] {
        assert!(
            text(&out.stdout).contains(word),
            "{word} is missing:\n{}",
            text(&out.stdout)
        );
    }
}

#[test]
fn a_generated_key_has_a_public_half() {
    let private = ringtail(&["genkey"], "");
    let private = text(&private.stdout);
    assert!(private.starts_with("privkey:"), "{private}");
    let public = ringtail(&["pubkey"], private);
    assert!(
        text(&public.stdout).starts_with("nodekey:"),
        "{}",
        text(&public.stdout)
    );
    let disco = ringtail(&["pubkey", "--type", "disco"], private);
    assert!(
        text(&disco.stdout).starts_with("discokey:"),
        "{}",
        text(&disco.stdout)
    );
}

#[test]
fn a_key_that_is_none_is_refused_without_being_repeated() {
    let out = ringtail(&["pubkey"], "privkey:not-a-key-but-maybe-a-secret");
    assert_eq!(out.status.code(), Some(1));
    let error = text(&out.stderr);
    assert!(
        error.contains("genkey") && !error.contains("maybe-a-secret"),
        "{error}"
    );
}

#[test]
fn errors_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().to_str().unwrap();
    for (args, words) in [
        (vec!["up", "--state-dir", state], "--network FILE"),
        (vec!["up", "--network", "n.toml", "--mtu", "100"], "1280"),
        (
            vec!["up", "--config", "/nonexistent/ringtail.toml"],
            "/nonexistent/ringtail.toml",
        ),
        (vec!["device", "much-too-long-a-name"], "15 characters"),
        (vec!["device", "a/b"], "15 characters"),
        (vec!["device", "wg%d%s"], "only one %d"),
        (vec!["device", "wg0", "--mtu", "100"], "at least 576"),
        (vec!["device", "wg0", "--shards", "0"], "1 to 64"),
        (vec!["status", "--state-dir", state], "ringtail up"),
        (vec!["ping", "b", "--state-dir", state], "ringtail up"),
    ] {
        let out = ringtail(&args, "");
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        let error = text(&out.stderr);
        assert!(
            error.starts_with("ringtail: ") && error.contains(words),
            "{args:?}: {error}"
        );
    }
}

/// SQLite refuses one of two processes that make a file at a time; neither of ours may fail by it.
#[test]
fn many_processes_may_make_the_coordination_state_at_the_same_time() {
    for _ in 0..75 {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().to_str().unwrap();
        let create = || ringtail(&["coord", "keys", "create", "--state-dir", dir], "");
        let made = std::thread::scope(|scope| {
            let started: Vec<_> = (0..4).map(|_| scope.spawn(create)).collect();
            started
                .into_iter()
                .map(|one| one.join().unwrap())
                .collect::<Vec<_>>()
        });
        for output in made {
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        let list = ringtail(&["coord", "keys", "list", "--state-dir", dir], "");
        let keys = text(&list.stdout).matches("single-use").count();
        assert_eq!(keys, 4, "{}", text(&list.stdout));
    }
}
