//! The program from the outside: what people type and what they get.
#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]
#![expect(clippy::disallowed_methods, reason = "a signal needs its time")]

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

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
        "down",
        "login",
        "logout",
        "set",
        "get",
        "device",
        "status",
        "whois",
        "ping",
        "netcheck",
        "dns",
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
        (vec!["up", "--network", "n.toml", "--mtu", "65535"], "65475"),
        (vec!["device", "wg0", "--mtu", "100"], "576 to 65475"),
        (vec!["device", "wg0", "--mtu", "65535"], "576 to 65475"),
        (vec!["device", "wg0", "--shards", "0"], "1 to 64"),
        (vec!["status", "--state-dir", state], "ringtail up"),
        (vec!["ping", "b", "--state-dir", state], "ringtail up"),
        (vec!["down", "--state-dir", state], "ringtail up"),
        (vec!["login", "--state-dir", state], "ringtail up"),
        (vec!["set", "--state-dir", state], "nothing to set"),
        (vec!["whois", "b", "--state-dir", state], "b is no address"),
        (
            vec!["up", "--network", "n.toml", "--hostname", "a b"],
            "without blanks",
        ),
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

#[test]
fn a_ca_file_that_is_none_is_told_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state").display().to_string();
    let empty = dir.path().join("empty.pem").display().to_string();
    std::fs::write(&empty, "").unwrap();
    let config = dir.path().join("node.toml").display().to_string();
    std::fs::write(&config, "ca_file = \"empty.pem\"\n").unwrap();
    let up = [
        "up",
        "--coord",
        "https://127.0.0.1:1",
        "--state-dir",
        &state,
    ];
    for (more, complaint) in [
        (["--ca-file", "/missing/ca.pem"], "/missing/ca.pem"),
        (["--ca-file", &empty], "holds no certificate"),
        (["--config", &config], "holds no certificate"),
    ] {
        let out = ringtail(&[&up[..], &more].concat(), "");
        let said = text(&out.stderr);
        assert!(!out.status.success() && said.contains(complaint), "{said}");
        assert!(!said.contains("data plane started"), "{said}");
    }
}

#[test]
fn routes_with_host_bits_are_refused_with_the_right_ones() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let settings = file(
        "n.toml",
        "coord = \"http://127.0.0.1:1\"\nadvertise_routes = [\"10.30.0.1/16\"]",
    );
    let network = file(
        "net.toml",
        "addresses = [\"10.7.0.1/24\"]\n[[peer]]\naddresses = [\"10.7.0.2/32\"]\n\
         allowed_ips = [\"fd00::1/64\"]\n\
         node_key = \"nodekey:0102030405060708091011121314151617181920212223242526272829303132\"",
    );
    let state = dir.path().join("state");
    let state = state.to_str().unwrap();
    let coord = "http://127.0.0.1:1";
    let offered = "10.1.0.0/16,10.20.0.1/16";
    for (args, right) in [
        (
            vec!["up", "--coord", coord, "--advertise-routes", offered],
            "write 10.20.0.0/16",
        ),
        (vec!["up", "--config", &settings], "write 10.30.0.0/16"),
        (
            vec!["up", "--network", &network, "--state-dir", state],
            "write fd00::/64",
        ),
        (
            vec!["coord", "routes", "approve", "r", "10.40.0.1/24"],
            "write 10.40.0.0/24",
        ),
        (
            vec!["coord", "--approve-route", "10.40.0.0/24"],
            "coord routes approve NODE 10.40.0.0/24",
        ),
    ] {
        let out = ringtail(&args, "");
        assert!(!out.status.success(), "{args:?}");
        let error = text(&out.stderr);
        assert!(error.contains(right), "{args:?}: {error}");
    }
}

#[test]
fn a_server_ends_by_the_signals_that_mean_it_and_by_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().to_str().unwrap();
    let derp = ["derp", "--hostname", "127.0.0.1", "--addr", "127.0.0.1:0"];
    for (args, end) in [
        (vec!["coord", "--addr", "127.0.0.1:0"], "TERM"),
        ([&derp[..], &["--no-stun"]].concat(), "INT"),
    ] {
        let mut server = Command::new(env!("CARGO_BIN_EXE_ringtail"))
            .args(&args)
            .args(["--state-dir", state])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = server.id();
        let signal = |name: &str| {
            let command = format!("kill -{name} {pid}");
            let sent = Command::new("sh").args(["-c", &command]).status().unwrap();
            assert!(sent.success(), "{args:?}: {name}");
        };
        // What it prints is the sign that it listens, to signals from then on at the latest.
        let mut first = [0; 1];
        server
            .stdout
            .take()
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        std::thread::sleep(Duration::from_millis(500));
        for name in ["HUP", "USR1", "USR2", "PIPE"] {
            signal(name);
        }
        std::thread::sleep(Duration::from_millis(500));
        signal(end);
        let ended = server.wait().unwrap();
        assert!(ended.success(), "{args:?}: {ended}");
    }
}

/// A program that runs beside the test; it ends with it.
struct Running(Child);

impl Running {
    fn start(args: &[&str], output: &Path) -> Self {
        let file = std::fs::File::create(output).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_ringtail"))
            .args(args)
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a file holds once it holds `wanted`.
fn read_when(path: &Path, wanted: &str) -> String {
    for _ in 0..600 {
        let found = std::fs::read_to_string(path).unwrap_or_default();
        if found.contains(wanted) {
            return found;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    panic!("{wanted:?} is missing in {}:\n{found}", path.display());
}

/// A coordination server that takes one key.
fn serve(state: &str, key: &str, log: &Path) -> Running {
    let args = ["coord", "--addr", "127.0.0.1:0", "--state-dir", state];
    Running::start(&[&args[..], &["--auth-key-file", key]].concat(), log)
}

/// Where a server listens, once it says so.
fn url_of(log: &Path) -> String {
    let said = read_when(log, "ringtail up");
    let url = said
        .split_whitespace()
        .find(|word| word.starts_with("http://"));
    url.unwrap().to_owned()
}

#[test]
fn the_coordination_server_says_who_is_refused_and_who_is_online() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let text_of = |name: &str| path(name).to_str().unwrap().to_owned();
    let (state, log, key) = (text_of("state"), path("log"), text_of("key"));
    let server = serve(&state, &key, &log);
    let url = &url_of(&log);
    std::fs::write(path("bad"), "not-the-key").unwrap();
    let join = |key: &str, name: &str| {
        [
            "coord",
            "watch",
            url,
            "--auth-key-file",
            key,
            "--hostname",
            name,
        ]
        .map(str::to_owned)
    };
    let bad = join(&text_of("bad"), "stranger");
    let out = ringtail(&bad.each_ref().map(String::as_str), "");
    assert_eq!(out.status.code(), Some(77), "{}", text(&out.stderr));
    let said = read_when(&log, "a join was refused");
    assert!(
        said.contains("stranger") && said.contains("127.0.0.1"),
        "{said}"
    );
    assert!(!said.contains("not-the-key"), "{said}");

    let nodes = || {
        let out = ringtail(&["coord", "nodes", "--state-dir", &state], "");
        text(&out.stdout).to_owned()
    };
    let until = |wanted: &str| {
        for _ in 0..600 {
            if nodes().contains(wanted) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{wanted:?} is missing in {}", nodes());
    };
    let good = join(&key, "member");
    let member = Running::start(&good.each_ref().map(String::as_str), &path("member"));
    until("online");
    drop(member);
    until("last seen 20");
    let member = Running::start(&good.each_ref().map(String::as_str), &path("member"));
    until("online");
    // What a killed server has written does not count.
    drop(server);
    assert!(!nodes().contains("online"), "{}", nodes());
    drop(member);
}

#[test]
fn a_derp_map_in_the_place_of_a_node_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let map = dir.path().join("map.json");
    let node = r#"{"Regions":{"900":{"RegionID":900,"Nodes":[{"Name":"a","HostName":"h"}]}}}"#;
    let wrapped = format!(r#"{{"Regions":{{"900":{{"RegionID":900,"Nodes":[{node}]}}}}}}"#);
    std::fs::write(&map, wrapped).unwrap();
    let (map, state) = (map.to_str().unwrap(), dir.path().to_str().unwrap());
    let args = [
        "coord",
        "--state-dir",
        state,
        "--addr",
        "127.0.0.1:0",
        "--derp-map",
        map,
    ];
    let out = ringtail(&args, "");
    assert_eq!(out.status.code(), Some(1));
    let error = text(&out.stderr);
    assert!(
        error.contains("map.json") && error.contains("whole map"),
        "{error}"
    );
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

/// What the administrator's verbs print, and whether they did it.
fn coord(state: &str, args: &[&str]) -> (bool, String) {
    let out = ringtail(&[&["coord"], args, &["--state-dir", state]].concat(), "");
    let said = format!("{}{}", text(&out.stdout), text(&out.stderr));
    (out.status.success(), said)
}

#[test]
fn an_administrator_deletes_and_expires_nodes_and_approves_their_routes_with_and_without_a_server()
{
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let text_of = |name: &str| path(name).to_str().unwrap().to_owned();
    let (state, log, key) = (text_of("state"), path("log"), text_of("key"));
    let serve = || serve(&state, &key, &log);
    let server = serve();
    let url = &url_of(&log);
    let watch = |name: &str| {
        let args = ["coord", "watch", url, "--auth-key-file", &key, "--hostname"];
        let keys = text_of(&format!("keys-{name}"));
        let args = [&args[..], &[name, "--state-dir", &keys]].concat();
        Running::start(&args, &path(name))
    };
    let mut web = watch("web");
    read_when(&path("web"), "\"netmap\"");
    // Its name is the id of the first.
    let _one = watch("1");
    read_when(&path("1"), "\"netmap\"");
    let _third = watch("third");
    read_when(&path("third"), "\"netmap\"");

    let (ok, said) = coord(&state, &["nodes", "delete", "nobody"]);
    assert!(
        !ok && said.contains("\"nobody\"") && said.contains("coord nodes"),
        "{said}"
    );
    let (ok, said) = coord(&state, &["nodes", "expire", "1"]);
    assert!(
        !ok && said.contains("(web)") && said.contains("node 2 (1)"),
        "{said}"
    );
    let (ok, said) = coord(&state, &["nodes", "delete", "100.64.0.99"]);
    assert!(!ok, "{said}");

    let (ok, said) = coord(&state, &["routes", "approve", "web", "10.20.0.0/16,::/0"]);
    assert!(
        ok && said.contains("10.20.0.0/16, ::/0") && said.contains("not announced"),
        "{said}"
    );
    let (ok, said) = coord(&state, &["routes", "revoke", "WEB", "::/0"]);
    assert!(ok, "{said}");
    let (ok, said) = coord(&state, &["routes", "revoke", "web", "10.0.0.0/8"]);
    assert!(
        !ok && said.contains("10.0.0.0/8 is not approved for web"),
        "{said}"
    );
    let (_, said) = coord(&state, &["routes"]);
    assert_eq!(said, "1  web  10.20.0.0/16  approved, not announced\n");

    // By key, while the server runs: peers hear of it, and so does the node.
    let (_, said) = coord(&state, &["nodes"]);
    let of_web = said.lines().find(|line| line.contains(" web ")).unwrap();
    let node_key = of_web.split_whitespace().nth(4).unwrap().to_owned();
    let (ok, said) = coord(&state, &["nodes", "expire", &node_key]);
    assert!(
        ok && said.contains("as the same node") && said.contains("keys expire"),
        "{said}"
    );
    read_when(&path("web"), "\"expired\":true");
    read_when(&path("third"), "\"expired\":true");
    let (_, said) = coord(&state, &["nodes", "list"]);
    assert_eq!(said.matches("key expired 20").count(), 1, "{said}");
    let (ok, said) = coord(&state, &["nodes", "delete", "web"]);
    assert!(ok && said.contains("node 1 (web) is deleted"), "{said}");
    assert!(
        said.contains("as a new node") && said.contains("keys expire"),
        "{said}"
    );
    let ended = web.0.wait().unwrap();
    assert_eq!(ended.code(), Some(77));
    let (_, said) = coord(&state, &["routes"]);
    assert_eq!(said, "");

    // No server: the state is changed, and the next one goes by it.
    drop(server);
    let (ok, said) = coord(&state, &["routes", "approve", "third", "10.30.0.0/16"]);
    assert!(ok, "{said}");
    let (ok, said) = coord(&state, &["nodes", "delete", "2"]);
    assert!(ok, "{said}");
    let server = serve();
    read_when(&log, "ringtail up");
    let (_, said) = coord(&state, &["nodes", "list"]);
    assert!(
        said.starts_with("3  third ") && said.lines().count() == 1,
        "{said}"
    );
    let (_, said) = coord(&state, &["routes"]);
    assert_eq!(said, "3  third  10.30.0.0/16  approved, not announced\n");
    drop(server);
}
