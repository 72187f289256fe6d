//! Limits: heads, frames, rates, memory, and whom the relay serves.

use std::path::PathBuf;
use std::sync::atomic::AtomicU8;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

#[tokio::test(flavor = "local")]
async fn all_heads_of_a_connection_are_no_longer_than_one_may_be() {
    let lab = Lab::start();
    let (stream, mut tls) = lab.tls().await;
    let padding = "p".repeat(1000);
    let head = format!("GET /derp/probe HTTP/1.1\r\nA: {padding}\r\n\r\n");
    for _ in 0..40 {
        if !say(&stream, &mut tls, head.as_bytes()).await {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    lab.wait_count("http_failures", 1).await;
    let answered = lab.count("http_requests");
    assert!((10..=16).contains(&answered), "{answered}");
    // Small ones are answered, as many as anybody needs.
    let (stream, mut tls) = lab.tls().await;
    let pipelined = "GET /derp/probe HTTP/1.1\r\n\r\n".repeat(99);
    assert!(say(&stream, &mut tls, pipelined.as_bytes()).await);
    lab.wait_count("http_requests", answered + 99).await;
}

#[tokio::test(flavor = "local")]
async fn a_head_that_comes_byte_by_byte_is_served() {
    let lab = Lab::start();
    let (stream, mut tls) = lab.tls().await;
    for byte in b"GET /derp/latency-check HTTP/1.1\r\nHost: x\r\n\r\n" {
        assert!(say(&stream, &mut tls, &[*byte]).await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    lab.wait_count("http_requests", 1).await;
}

#[tokio::test(flavor = "local")]
async fn a_frame_that_does_not_end_ends_its_connection() {
    let lab = Lab::start();
    let mut slow = lab.raw(key(1)).await;
    let mut good = lab.raw(key(2)).await;
    lab.wait_count("clients", 2).await;
    let begin = now();
    // A byte now and then is no end.
    let mut part = vec![4, 0, 1, 0, 0];
    while lab.count("frame_timeouts") == 0 {
        assert!(now() - begin < FRAME_LIMIT * 3, "{}", (lab.vars)());
        slow.send(&part).await;
        part = vec![0; 100];
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(now() - begin >= FRAME_LIMIT - Duration::from_secs(1));
    good.is_served().await;
}

#[tokio::test(flavor = "local")]
async fn the_last_ping_is_answered_however_many_came() {
    let lab = Lab::start();
    let mut raw = lab.raw(key(1)).await;
    let pings: Vec<u8> = (0..=1000_u64)
        .flat_map(|n| frame(FrameType::PING, &n.to_be_bytes()))
        .collect();
    raw.client.ping(1000_u64.to_be_bytes(), PATIENCE, now());
    raw.send(&pings).await;
    raw.wait_for("Pong").await;
    lab.wait_count("got_ping", 1001).await;
    let (sent, ignored) = (lab.count("sent_pong"), lab.count("pings_ignored"));
    assert!(sent < 100 && sent + ignored >= 1001, "{sent} {ignored}");
}

#[tokio::test(flavor = "local")]
async fn who_sends_more_than_his_rate_is_read_later_and_nothing_is_lost() {
    let rate = Rate {
        per_second: 400_000,
        burst: BURST_MIN,
    };
    let lab = Lab::start_with(|options| options.client_rate = Some(rate));
    let mut sender = lab.raw(key(1)).await;
    let mut receiver = lab.raw(key(2)).await;
    lab.wait_count("clients", 2).await;
    let frames = packets(400, 2, &[5; 1400]);
    let begin = now();
    let send = async {
        sender.send(&frames).await;
        sender.send(&frames).await;
    };
    tokio::join!(receiver.wait_packets(800), send);
    // 1.15 MB, of which 66 kB are the burst: 2.7 s.
    let took = now() - begin;
    assert!(took >= Duration::from_millis(2300), "{took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(lab.count("rate_pauses") > 0);
    // A limit that is lifted is no limit any more.
    lab.handle.set_client_rate(None);
    let begin = now();
    sender.send(&frames).await;
    receiver.wait_packets(400).await;
    assert!(now() - begin < took, "{:?}", now() - begin);
}

#[tokio::test(flavor = "local")]
async fn who_owes_for_hours_is_read_again_soon_after_the_limit_is_lifted() {
    let lab = Lab::start_with(|options| {
        options.client_rate = Some(Rate {
            per_second: 1,
            burst: BURST_MIN,
        });
    });
    let mut sender = lab.raw(key(1)).await;
    let mut receiver = lab.raw(key(2)).await;
    lab.wait_count("clients", 2).await;
    let frames = packets(200, 2, &[5; 1400]);
    let begin = now();
    let count = async {
        lab.wait_count("rate_pauses", 1).await;
        lab.handle.set_client_rate(None);
        receiver.wait_packets(200).await;
    };
    tokio::join!(count, sender.send(&frames));
    assert!(now() - begin < KEEP_ALIVE / 2, "{:?}", now() - begin);
}

#[tokio::test(flavor = "local")]
async fn connections_over_the_rate_are_closed_at_once() {
    let lab = Lab::start_with(|options| {
        options.accept_rate = Some(Rate {
            per_second: 1,
            burst: 5000,
        });
    });
    let mut held = Vec::new();
    for _ in 0..20 {
        held.push(lab.connect().await);
    }
    lab.wait_count("accepts_limited", 15).await;
    assert_eq!(lab.count("accepts_limited"), 15);
    assert_eq!(lab.count("gauge_connections"), 5);
}

#[tokio::test(flavor = "local")]
async fn what_waits_for_all_is_bounded_and_who_holds_little_loses_nothing() {
    let most = 4 << 20;
    let lab = Lab::start_with(|options| options.memory_max = most);
    let mut slow = Vec::new();
    for n in 10..30 {
        slow.push(lab.raw(key(n)).await);
    }
    let mut sender = lab.raw(key(1)).await;
    let mut good = lab.raw(key(2)).await;
    lab.wait_count("clients", 22).await;
    let floods: Vec<_> = (10..30).map(|n| packets(40, n, &[4; 1400])).collect();
    let frame = packets(1, 2, b"on we go");
    let begin = now();
    let mut held_most = 0;
    while lab.count("dropped_memory") < 2000 {
        for flood in &floods {
            sender.send(flood).await;
        }
        sender.send(&frame).await;
        good.wait_for("Packet").await;
        held_most = held_most.max(lab.count("gauge_memory_bytes"));
        assert!(now() - begin < Duration::from_secs(60), "{}", (lab.vars)());
    }
    assert!(held_most > 500_000, "{held_most}");
    assert!(held_most <= most as u64, "{held_most}");
    drop(slow);
    drop(sender);
    drop(good);
    lab.wait_until("gauge_memory_bytes", |held| held == 0).await;
}

#[tokio::test(flavor = "local")]
async fn half_sent_frames_of_many_are_cut_where_memory_is_short() {
    let most = 1 << 20;
    let lab = Lab::start_with(|options| options.memory_max = most);
    let mut good = lab.raw(key(1)).await;
    let mut half = Vec::new();
    for n in 10..40 {
        let mut raw = lab.raw(key(n)).await;
        let mut frame = vec![4, 0, 1, 0, 0];
        frame.resize(60_000, 0);
        raw.send(&frame).await;
        half.push(raw);
    }
    lab.wait_count("memory_cuts", 5).await;
    let enough = |held| held <= most as u64 * 3 / 4;
    lab.wait_until("gauge_memory_bytes", enough).await;
    good.is_served().await;
}

/// What a verifier of the test says.
const YES: u8 = 0;
const NO: u8 = 1;
const BROKEN: u8 = 2;
const NOTHING: u8 = 3;

/// A verifier that says what it is told to, and what it was asked last.
struct Judge {
    url: String,
    says: Arc<AtomicU8>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Judge {
    async fn start(says: u8) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/verify", listener.local_addr().unwrap());
        let says = Arc::new(AtomicU8::new(says));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, heard) = (says.clone(), asked.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (answer, heard) = (answer.clone(), heard.clone());
                tokio::spawn(async move {
                    let mut text = Vec::new();
                    while stream.read_buf(&mut text).await.unwrap_or(0) > 0 {
                        let said = String::from_utf8_lossy(&text).into_owned();
                        let Some((_, body)) = said.split_once("\r\n\r\n") else {
                            continue;
                        };
                        if !body.ends_with('}') {
                            continue;
                        }
                        heard.lock().unwrap().push(said);
                        text.clear();
                        let (status, body) = match answer.load(Ordering::Relaxed) {
                            YES => ("200 OK", r#"{"Allow":true}"#),
                            NO => ("200 OK", r#"{"Allow":false}"#),
                            BROKEN => ("500 Oh", ""),
                            _ => continue,
                        };
                        let len = body.len();
                        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\n\r\n");
                        let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
                    }
                });
            }
        });
        Self { url, says, asked }
    }

    fn options(&self, fail_open: bool) -> Option<VerifyOptions> {
        Some(VerifyOptions {
            by: VerifyBy::Url(self.url.clone()),
            fail_open,
            ca_file: None,
            every: Duration::from_millis(300),
        })
    }

    fn say(&self, what: u8) {
        self.says.store(what, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "local")]
async fn the_verifier_says_who_is_served_and_who_stays() {
    let judge = Judge::start(YES).await;
    let lab = Lab::start_with(|options| options.verify = judge.options(false));
    let mut raw = lab.raw(key(1)).await;
    lab.wait_count("clients", 1).await;
    let asked = judge.asked.lock().unwrap()[0].clone();
    assert!(asked.starts_with("POST /verify HTTP/1.1\r\n"), "{asked}");
    let hex = key(1).public().to_hex();
    let body = format!(r#"{{"NodePublic":"nodekey:{hex}","Source":"127.0.0.1"}}"#);
    assert!(asked.ends_with(&body), "{asked}");
    // A verifier that fails ends nobody's connection, but lets nobody in.
    judge.say(BROKEN);
    lab.raw(key(2)).await.wait_closed().await;
    lab.wait_count("verify_failures", 2).await;
    raw.is_served().await;
    // A node that was removed has to go, and does not come back.
    judge.say(NO);
    raw.wait_closed().await;
    lab.wait_count("verify_removed", 1).await;
    lab.raw(key(1)).await.wait_closed().await;
    lab.wait_count("verify_refused", 1).await;
    assert_eq!(lab.count("clients"), 1);
    // Unless it is let in again, which takes as long as a no is kept.
    judge.say(YES);
    tokio::time::sleep(crate::derp::admission::NO_KEPT).await;
    lab.raw(key(1)).await;
    lab.wait_count("clients", 2).await;
}

#[tokio::test(flavor = "local")]
async fn a_verifier_that_is_silent_or_away_lets_nobody_in_unless_it_fails_open() {
    let judge = Judge::start(NOTHING).await;
    for fail_open in [false, true] {
        let lab = Lab::start_with(|options| options.verify = judge.options(fail_open));
        let begin = now();
        let mut raw = lab.raw(key(1)).await;
        if fail_open {
            lab.wait_count("clients", 1).await;
            assert_eq!(lab.count("verify_failed_open"), 1);
            raw.is_served().await;
        } else {
            raw.wait_closed().await;
            lab.wait_count("verify_failures", 1).await;
            assert_eq!(lab.count("clients"), 0);
        }
        let took = now() - begin;
        assert!(took >= Duration::from_secs(4), "{took:?}");
    }
    // Nobody listens there.
    let lab = Lab::start_with(|options| {
        let by = VerifyBy::Url("http://127.0.0.1:1".to_owned());
        let verify = judge.options(false);
        options.verify = verify.map(|verify| VerifyOptions { by, ..verify });
    });
    lab.raw(key(1)).await.wait_closed().await;
    lab.wait_count("verify_failures", 1).await;
}

#[tokio::test(flavor = "local")]
async fn a_list_of_keys_says_who_is_served_and_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let list: PathBuf = dir.path().join("keys");
    let line = |n| format!("{} # {n}\n", key(n).public());
    std::fs::write(&list, line(1) + &line(2)).unwrap();
    let verify = VerifyOptions {
        by: VerifyBy::File(list.clone()),
        fail_open: false,
        ca_file: None,
        every: Duration::from_secs(3600),
    };
    let lab = Lab::start_with(|options| options.verify = Some(verify.clone()));
    let mut first = lab.raw(key(1)).await;
    let mut second = lab.raw(key(2)).await;
    lab.wait_count("clients", 2).await;
    lab.raw(key(3)).await.wait_closed().await;
    lab.wait_count("verify_refused", 1).await;
    // A list that cannot be read changes nothing.
    std::fs::write(&list, "nodekey:123\n").unwrap();
    lab.handle.verify_again();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(lab.count("gauge_keys"), 2);
    // It is read again by itself.
    std::fs::write(&list, line(2) + &line(3)).unwrap();
    first.wait_closed().await;
    lab.wait_count("verify_removed", 1).await;
    lab.raw(key(3)).await;
    lab.wait_count("clients", 3).await;
    second.is_served().await;
    // A relay does not start with a list that is none.
    std::fs::write(&list, "not a key\n").unwrap();
    assert!(Verifier::new(verify).is_err());
}
