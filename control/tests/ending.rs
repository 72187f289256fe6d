//! How the program begins where little is allowed, and ends: in time, orderly, and with a word when it
//! must. Each program runs in a network namespace of its own, which goes with it.
#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test ends by panicking, and has to wait"
)]

mod address;

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;

/// Longer than anything takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// True where TUN devices and namespaces can be made; fails under `RINGTAIL_NO_SKIP=1` elsewhere.
fn can_run(test: &str) -> bool {
    let can = nix::unistd::geteuid().is_root() && Path::new("/dev/net/tun").exists();
    if !can {
        assert!(
            std::env::var("RINGTAIL_NO_SKIP").as_deref() != Ok("1"),
            "{test} needs root and /dev/net/tun"
        );
        eprintln!("{test} skipped: it needs root and /dev/net/tun");
    }
    can
}

/// A name for an interface that nobody else has: sockets of all namespaces are in one place.
fn name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("re{}x{count}", std::process::id())
}

fn socket_of(name: &str) -> PathBuf {
    Path::new("/var/run/wireguard").join(format!("{name}.sock"))
}

/// What the program may not do.
#[derive(Clone, Copy, Debug)]
enum Forbidden {
    Nothing,
    /// To lock more than 64 KiB.
    Memory,
    /// A system call: it fails with `EPERM`.
    Call(libc::c_long),
}

impl Forbidden {
    /// Makes it so for the calling process and its children; called between fork and exec.
    fn apply(self) -> std::io::Result<()> {
        match self {
            Forbidden::Nothing => Ok(()),
            Forbidden::Memory => {
                const CAP_IPC_LOCK: libc::c_ulong = 14;
                let limit = libc::rlimit {
                    rlim_cur: 64 << 10,
                    rlim_max: 64 << 10,
                };
                // SAFETY: `limit` is valid for the call.
                done(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) })?;
                // SAFETY: no pointers are passed.
                done(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) })
            }
            Forbidden::Call(number) => {
                const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
                const JUMP: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
                const GIVE: u32 = libc::BPF_RET | libc::BPF_K;
                // All three are below 256.
                let [load, jump, give] =
                    [LOAD, JUMP, GIVE].map(|code| code.to_le_bytes()[0].into());
                let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
                let refusal = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
                let number = u32::try_from(number).map_err(std::io::Error::other)?;
                let mut steps = [
                    step(load, 0, 0, 0),
                    step(jump, 0, 1, number),
                    step(give, 0, 0, refusal),
                    step(give, 0, 0, libc::SECCOMP_RET_ALLOW),
                ];
                let program = libc::sock_fprog {
                    len: 4,
                    filter: steps.as_mut_ptr(),
                };
                // SAFETY: no pointers are passed.
                done(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
                let mode = libc::SECCOMP_MODE_FILTER;
                // SAFETY: `program` and its steps are valid for the call.
                done(unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) })
            }
        }
    }
}

fn done(result: libc::c_int) -> std::io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// The program in a network namespace of its own.
fn program(args: &[&str], forbidden: Forbidden) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    command.args(args).env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::piped());
    let before = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        forbidden.apply()
    };
    // SAFETY: only system calls are made between fork and exec.
    unsafe { command.pre_exec(before) };
    command
}

/// A program that runs, and is killed if the test ends before it.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> Running {
        Running(command.spawn().unwrap())
    }

    fn signal(&self, signal: libc::c_int) {
        let pid = i32::try_from(self.0.id()).unwrap();
        // SAFETY: no memory is passed; the child is not waited for yet, so the id is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for the end, and gives what was said on standard error.
    fn end(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + SOON;
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut said = String::new();
        let mut stderr = self.0.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        (status, said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended, as a rule.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Tries until it works.
fn soon<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn connected(socket: &Path) -> UnixStream {
    soon("nobody listens", || UnixStream::connect(socket).ok())
}

/// What a node's status socket is asked.
const STATUS: &str = "{\"request\":\"status\"}\n";

/// Asks on a configuration or status socket.
fn ask(socket: &Path, request: &str) -> String {
    let mut stream = connected(socket);
    stream.write_all(request.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

const KEY: &str =
    "set=1\nprivate_key=0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n\n";

#[test]
fn where_io_uring_may_not_do_all_that_is_needed_every_shard_uses_epoll() {
    if !can_run("where_io_uring_may_not_do_all_that_is_needed_every_shard_uses_epoll") {
        return;
    }
    for forbidden in [
        Forbidden::Nothing,
        Forbidden::Memory,
        Forbidden::Call(libc::SYS_io_uring_setup),
        Forbidden::Call(libc::SYS_io_uring_enter),
        Forbidden::Call(libc::SYS_io_uring_register),
    ] {
        let name = name();
        let socket = socket_of(&name);
        let args = ["device", "-f", &name, "--shards", "4"];
        let device = Running::start(program(&args, forbidden));
        let status = ask(&socket, "get=1\n\n");
        let allowed = matches!(forbidden, Forbidden::Nothing);
        let driver = if allowed { "io_uring" } else { "epoll" };
        let wanted = format!("ringtail_driver={driver}\n");
        assert!(status.contains(&wanted), "{forbidden:?}: {status}");
        assert!(ask(&socket, KEY).contains("errno=0"));
        device.signal(libc::SIGTERM);
        let (ended, said) = device.end();
        assert!(ended.success(), "{forbidden:?}: {said}");
        let why = said.matches("using the epoll driver").count();
        assert_eq!(why, usize::from(!allowed), "{forbidden:?}: {said}");
        assert!(!socket.exists());

        // Who demands io_uring is told what is missing.
        if !allowed {
            let args = [&args[..], &["--driver", "io-uring"]].concat();
            let (ended, said) = Running::start(program(&args, forbidden)).end();
            assert_eq!(ended.code(), Some(1));
            let last = said.lines().last().unwrap();
            assert!(
                last.starts_with("ringtail: cannot start: io_uring is not usable"),
                "{said}"
            );
        }
    }
}

#[test]
fn a_second_device_under_the_same_limit_starts_too() {
    if !can_run("a_second_device_under_the_same_limit_starts_too") {
        return;
    }
    let devices: Vec<_> = (0..4)
        .map(|_| {
            let name = name();
            let args = ["device", "-f", &name, "--shards", "2"];
            let device = Running::start(program(&args, Forbidden::Memory));
            assert!(ask(&socket_of(&name), "get=1\n\n").contains("errno=0"));
            device
        })
        .collect();
    for device in devices {
        device.signal(libc::SIGTERM);
        let (ended, said) = device.end();
        assert!(ended.success(), "{said}");
    }
}

#[test]
fn a_node_without_io_uring_enter_works() {
    if !can_run("a_node_without_io_uring_enter_works") {
        return;
    }
    let (name, dir) = (name(), tempfile::tempdir().unwrap());
    let forbidden = Forbidden::Call(libc::SYS_io_uring_enter);
    let node = Running::start(node(&name, dir.path(), forbidden));
    let status = ask(&dir.path().join("ringtail.sock"), STATUS);
    assert!(status.contains("\"driver\":\"epoll\""), "{status}");
    node.signal(libc::SIGTERM);
    let (ended, said) = node.end();
    assert!(ended.success(), "{said}");
}

/// A node of a network of its own.
fn node(name: &str, dir: &Path, forbidden: Forbidden) -> Command {
    let network = dir.join("network.toml");
    std::fs::write(&network, "addresses = [\"100.64.0.1/32\"]\n").unwrap();
    let (dir, network) = (dir.to_str().unwrap(), network.to_str().unwrap());
    let args = [
        "up",
        "--tun",
        name,
        "--state-dir",
        dir,
        "--network",
        network,
    ];
    program(&args, forbidden)
}

/// The policy rules of a network namespace.
fn rules(namespace: &std::fs::File) -> String {
    let namespace = namespace.try_clone().unwrap();
    let mut command = Command::new("ip");
    command.arg("rule");
    let enter = move || {
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(())
    };
    // SAFETY: only a system call is made between fork and exec.
    unsafe { command.pre_exec(enter) };
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

/// The keeper of the node on a state directory, if it has one.
fn keeper_of(dir: &Path) -> Option<nix::unistd::Pid> {
    let wanted = format!("ringtail\0keeper\0--state-dir\0{}\0", dir.display());
    let processes = std::fs::read_dir("/proc").unwrap();
    processes.flatten().find_map(|process| {
        let words = std::fs::read(process.path().join("cmdline")).ok()?;
        let pid = process.file_name().to_str()?.parse().ok()?;
        (words == wanted.as_bytes()).then(|| nix::unistd::Pid::from_raw(pid))
    })
}

#[test]
fn what_a_killed_node_leaves_is_taken_away_by_its_keeper_or_by_restore() {
    if !can_run("what_a_killed_node_leaves_is_taken_away_by_its_keeper_or_by_restore") {
        return;
    }
    let (name, dir) = (name(), tempfile::tempdir().unwrap());
    let start = || {
        let node = Running::start(node(&name, dir.path(), Forbidden::Nothing));
        let status = ask(&dir.path().join("ringtail.sock"), STATUS);
        assert!(status.contains("100.64.0.1"), "{status}");
        let namespace = format!("/proc/{}/ns/net", node.0.id());
        let namespace = std::fs::File::open(namespace).unwrap();
        soon("no rules", || {
            rules(&namespace).contains("lookup 52").then_some(())
        });
        (node, namespace)
    };
    let is_clean = |namespace: &std::fs::File| !rules(namespace).contains("lookup 52");

    let (killed, namespace) = start();
    let first = soon("no keeper", || keeper_of(dir.path()));
    nix::sys::signal::kill(first, nix::sys::signal::Signal::SIGKILL).unwrap();
    let other = |pid: &nix::unistd::Pid| *pid != first;
    soon("no other keeper", || keeper_of(dir.path()).filter(other));
    killed.signal(libc::SIGKILL);
    let (_, said) = killed.end();
    assert!(said.contains("the keeper ended"), "{said}");
    soon("the rules stay", || is_clean(&namespace).then_some(()));
    soon("the keeper stays", || {
        keeper_of(dir.path()).is_none().then_some(())
    });

    // Both at once: who is asked to does it.
    let (killed, namespace) = start();
    killed.signal(libc::SIGSTOP);
    let keeper = soon("no keeper", || keeper_of(dir.path()));
    let args = ["restore", "--state-dir", dir.path().to_str().unwrap()];
    let early = Running::start(program(&args, Forbidden::Nothing)).end();
    assert!(
        !early.0.success() && early.1.contains("another ringtail node runs"),
        "{early:?}"
    );
    nix::sys::signal::kill(keeper, nix::sys::signal::Signal::SIGKILL).unwrap();
    killed.signal(libc::SIGKILL);
    drop(killed.end());
    assert!(!is_clean(&namespace));
    let mut restore = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    restore.args(args).stderr(Stdio::piped());
    let entered = namespace.try_clone().unwrap();
    let enter = move || {
        nix::sched::setns(&entered, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(())
    };
    // SAFETY: only a system call is made between fork and exec.
    unsafe { restore.pre_exec(enter) };
    let (ended, said) = Running::start(restore).end();
    assert!(ended.success(), "{said}");
    assert!(is_clean(&namespace), "{said}");

    // After a tidy end no keeper is left, and nothing to restore.
    let (node, namespace) = start();
    node.signal(libc::SIGTERM);
    let (ended, said) = node.end();
    assert!(ended.success(), "{said}");
    assert!(
        keeper_of(dir.path()).is_none() && is_clean(&namespace),
        "{said}"
    );
    let ledger = std::fs::read_to_string(dir.path().join("host.json")).unwrap();
    assert!(ledger.contains("\"entries\": []"), "{ledger}");
}

/// Without a network of its own: it tells a server of here.
#[test]
fn a_keeper_that_left_the_server_to_a_new_node_tells_it_itself_when_that_one_fails() {
    let dir = tempfile::tempdir().unwrap();
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ledger = format!(
        r#"{{"boot": "", "netns": 0, "entries": [{{"what": "announced", "url": "http://{}", "hostname": "a",
            "fwmark": 0, "ca_file": null}}]}}"#,
        server.local_addr().unwrap()
    );
    for (name, text) in [("host.json", ledger.as_str()), ("lock", "")] {
        let mut how = OpenOptions::new();
        let file = how.write(true).create_new(true).mode(0o600);
        let file = file.open(dir.path().join(name));
        file.unwrap().write_all(text.as_bytes()).unwrap();
    }
    let lock = std::fs::File::open(dir.path().join("lock")).unwrap();
    let begun = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
    let (node, theirs) = UnixStream::pair().unwrap();
    let mut keeper = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    let keeper = keeper.args(["keeper", "--state-dir"]).arg(dir.path());
    let stdin = std::os::fd::OwnedFd::from(theirs);
    let mut keeper = Running(keeper.stdin(stdin).spawn().unwrap());
    drop(node);
    // It waits two seconds for a process that does not end, and gives up at once.
    std::thread::sleep(Duration::from_millis(2500));
    assert!(keeper.0.try_wait().unwrap().is_none());
    drop(begun);
    server.set_nonblocking(true).unwrap();
    soon("the server is not told", || server.accept().ok());
}

/// The signal comes as soon as somebody listens, which is before there is anybody to answer.
#[test]
fn a_signal_that_comes_with_the_socket_leaves_nothing_behind() {
    if !can_run("a_signal_that_comes_with_the_socket_leaves_nothing_behind") {
        return;
    }
    for round in 0..10 {
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let name = name();
            let socket = socket_of(&name);
            let device = Running::start(program(&["device", "-f", &name], Forbidden::Nothing));
            drop(connected(&socket));
            // Somewhere within the start.
            std::thread::sleep(Duration::from_millis(2 * round));
            device.signal(signal);
            let (ended, said) = device.end();
            assert!(ended.success(), "{ended} after {round} rounds: {said}");
            assert!(!socket.exists(), "{said}");
        }
    }
}

#[test]
fn a_device_in_the_background_takes_its_socket_along_however_early_the_signal() {
    if !can_run("a_device_in_the_background_takes_its_socket_along_however_early_the_signal") {
        return;
    }
    for round in 0..4 {
        let name = name();
        let socket = socket_of(&name);
        let mut parent = Running::start(program(&["device", &name], Forbidden::Nothing));
        let stream = connected(&socket);
        let peer = nix::sys::socket::sockopt::PeerCredentials;
        let child = nix::sys::socket::getsockopt(&stream, peer).unwrap().pid();
        drop(stream);
        if round % 2 == 0 {
            assert!(parent.0.wait().unwrap().success());
        }
        // SAFETY: no memory is passed.
        assert_eq!(unsafe { libc::kill(child, libc::SIGTERM) }, 0);
        soon("the socket stays", || (!socket.exists()).then_some(()));
    }
}

/// Starts a device in the background and ends it; gives what its start said.
fn started_and_ended(command: Command, socket: &Path) -> (ExitStatus, String) {
    let (status, said) = Running::start(command).end();
    if status.success() {
        std::fs::remove_file(socket).unwrap();
    }
    (status, said)
}

#[test]
fn a_device_in_the_background_keeps_its_state_from_where_the_caller_stands() {
    if !can_run("a_device_in_the_background_keeps_its_state_from_where_the_caller_stands") {
        return;
    }
    let variable = "RINGTAIL_DEVICE_STATE_DIR";
    for by_variable in [false, true] {
        let (name, dir) = (name(), tempfile::tempdir().unwrap());
        let args = ["device", &name, "--state-dir", "state/here"];
        let mut command = program(&args[..if by_variable { 2 } else { 4 }], Forbidden::Nothing);
        command.current_dir(dir.path()).env_remove(variable);
        if by_variable {
            command.env(variable, "state/here");
        }
        let (status, said) = started_and_ended(command, &socket_of(&name));
        assert!(status.success(), "{said}");
        // It is there as soon as the device is.
        let file = dir.path().join(format!("state/here/{name}.timestamp"));
        assert!(file.exists());
    }
}

#[test]
fn a_device_that_cannot_keep_its_state_does_not_start() {
    if !can_run("a_device_that_cannot_keep_its_state_does_not_start") {
        return;
    }
    // The one cannot be made; in the other there can be no file of ours, not even for root.
    for (dir, complaint) in [
        (
            "/dev/null/state",
            "cannot make the state directory /dev/null/state",
        ),
        ("/proc", "cannot write /proc/"),
    ] {
        for background in [false, true] {
            let name = name();
            let args = ["device", &name, "--state-dir", dir, "-f"];
            let command = program(&args[..if background { 4 } else { 5 }], Forbidden::Nothing);
            let (status, said) = started_and_ended(command, &socket_of(&name));
            assert_eq!(status.code(), Some(1), "{said}");
            assert!(said.contains(complaint), "{said}");
            assert!(!socket_of(&name).exists());
        }
    }
}

#[test]
fn a_node_that_is_ended_early_leaves_no_socket() {
    if !can_run("a_node_that_is_ended_early_leaves_no_socket") {
        return;
    }
    for round in 0..4 {
        let (name, dir) = (name(), tempfile::tempdir().unwrap());
        let node = Running::start(node(&name, dir.path(), Forbidden::Nothing));
        let sockets = [dir.path().join("ringtail.sock"), socket_of(&name)];
        drop(connected(&sockets[round % 2]));
        node.signal([libc::SIGTERM, libc::SIGINT][round / 2]);
        let (ended, said) = node.end();
        assert!(ended.success(), "{said}");
        for socket in sockets {
            assert!(!socket.exists(), "{}: {said}", socket.display());
        }
    }
}

/// On loopback, in the test's own namespace: who connects is here.
#[test]
fn servers_end_with_success_however_early_the_signal() {
    let addr = address::of_this_process(10_000).to_string();
    for what in ["derp", "coord"] {
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path().to_str().unwrap();
            let mut args = vec![what, "--state-dir", dir, "--addr", &addr];
            if what == "derp" {
                args.extend(["--hostname", "127.0.0.1", "--no-stun"]);
            }
            let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
            command
                .args(args)
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            let server = Running::start(command);
            drop(soon("nobody listens", || TcpStream::connect(&addr).ok()));
            server.signal(signal);
            let (ended, said) = server.end();
            assert!(ended.success(), "{what} {ended}: {said}");
        }
    }
}

/// Stands between the program and the C library: once the file named by `FAIL_FILE` is there, calls of
/// the thread named by `FAIL_THREAD` fail. A driver that is told of more events than there can be
/// panics.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(const char *call) {
    char name[16] = "";
    const char *file = getenv("FAIL_FILE"), *thread = getenv("FAIL_THREAD");
    if (!file || strcmp(getenv("FAIL_CALL"), call) != 0) return 0;
    prctl(PR_GET_NAME, name);
    return strcmp(name, thread) == 0 && access(file, F_OK) == 0;
}

int poll(struct pollfd *fds, nfds_t count, int timeout) {
    static int (*real)(struct pollfd *, nfds_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "poll");
    if (fails("poll")) { errno = EBADF; return -1; }
    return real(fds, count, timeout);
}

int epoll_wait(int epfd, struct epoll_event *events, int max, int timeout) {
    static int (*real)(int, struct epoll_event *, int, int);
    if (!real) real = dlsym(RTLD_NEXT, "epoll_wait");
    if (fails("epoll")) { errno = EBADF; return -1; }
    if (fails("lie")) return 1000;
    return real(epfd, events, max, timeout);
}

long syscall(long number, ...) {
    static long (*real)(long, ...);
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (!real) real = dlsym(RTLD_NEXT, "syscall");
    if (number == SYS_io_uring_enter && fails("uring")) { errno = EBADF; return -1; }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"#;

#[test]
fn what_cannot_go_on_ends_with_a_word_and_takes_its_socket_along() {
    if !can_run("what_cannot_go_on_ends_with_a_word_and_takes_its_socket_along") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, shim) = (dir.path().join("shim.c"), dir.path().join("shim.so"));
    std::fs::write(&source, SHIM).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(&shim).arg(&source);
    assert!(cc.status().unwrap().success());
    for (call, thread, driver, words) in [
        (
            "uring",
            "rt-shard-1",
            "io-uring",
            "rt-shard-1: the driver failed",
        ),
        (
            "epoll",
            "rt-shard-1",
            "epoll",
            "rt-shard-1: the driver failed",
        ),
        ("lie", "rt-shard-1", "epoll", "rt-shard-1"),
        ("poll", "rt-handshake", "auto", "rt-handshake: Bad file"),
    ] {
        for what in ["device", "up"] {
            let (name, state) = (name(), tempfile::tempdir().unwrap());
            let trigger = dir.path().join(&name);
            let (mut command, mut sockets) = if what == "up" {
                let command = node(&name, state.path(), Forbidden::Nothing);
                (command, vec![state.path().join("ringtail.sock")])
            } else {
                let args = ["device", "-f", &name];
                (program(&args, Forbidden::Nothing), vec![])
            };
            sockets.push(socket_of(&name));
            command
                .args(["--shards", "2", "--driver", driver])
                .env("LD_PRELOAD", &shim)
                .env("FAIL_FILE", &trigger)
                .env("FAIL_CALL", call)
                .env("FAIL_THREAD", thread);
            let running = Running::start(command);
            let case = format!("{what}, {call} {thread}");
            // Each wakes every thread.
            if what == "up" {
                let status = ask(&sockets[0], STATUS);
                assert!(status.contains("100.64.0.1"), "{case}: {status}");
                std::fs::write(&trigger, "").unwrap();
                let more = format!(
                    "addresses = [\"100.64.0.1/32\"]\n[[peer]]\nname = \"b\"\nnode_key = \"nodekey:{}\"\naddresses = [\"100.64.0.2/32\"]\n",
                    "0123456789abcdef".repeat(4)
                );
                std::fs::write(state.path().join("network.toml"), more).unwrap();
                running.signal(libc::SIGHUP);
            } else {
                assert!(ask(&sockets[0], "get=1\n\n").contains("errno=0"));
                std::fs::write(&trigger, "").unwrap();
                let mut stream = connected(&sockets[0]);
                stream.write_all(KEY.as_bytes()).unwrap();
            }
            let (ended, said) = running.end();
            assert_eq!(ended.code(), Some(1), "{case}: {said}");
            let last = said.lines().last().unwrap();
            assert!(
                last.starts_with("ringtail: ") && last.contains(words),
                "{case}: {said}"
            );
            for socket in sockets {
                assert!(!socket.exists(), "{case}: {said}");
            }
        }
    }
}
