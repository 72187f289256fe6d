//! A counting allocator proves that a shard that is warm allocates nothing.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};

use ringtail_dataplane::DriverChoice;
use ringtail_dataplane::stats::Meter;
use support::{End, Pair, Setup, lab_or_skip};

/// The threads that are watched: the shards of both ends.
static WATCHED: [AtomicI32; 4] = [const { AtomicI32::new(0) }; 4];
static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn count() {
    if COUNTING.load(SeqCst) {
        // SAFETY: no arguments, no memory.
        let thread = unsafe { libc::gettid() };
        if WATCHED.iter().any(|watched| watched.load(SeqCst) == thread) {
            ALLOCATIONS.fetch_add(1, SeqCst);
        }
    }
}

// SAFETY: everything is passed to the system's allocator unchanged; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Finds the shards among our threads; returns how many.
fn watch_shards() -> usize {
    let mut found = 0;
    for task in std::fs::read_dir("/proc/self/task")
        .expect("procfs")
        .flatten()
    {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with("rt-shard") {
            let thread = task
                .file_name()
                .to_string_lossy()
                .parse()
                .expect("a thread id");
            WATCHED[found].store(thread, SeqCst);
            found += 1;
        }
    }
    found
}

/// Rounds without a single allocation that are wanted on end.
const STILL_ROUNDS: usize = 3;
/// What two shards allocate at most until their memory has its size: each has two sets of about twenty
/// slabs and a list of what lies in them, and a few queues that double. A round that sees the last of
/// it is none of those that are wanted; but whatever allocates again and again comes to more than this.
const GROWTH_MAX: u64 = 2 * 64;

/// How full a batch gets is the machine's to say, so the growth may take its time; but it ends.
#[test]
fn a_warm_shard_allocates_nothing() {
    lab_or_skip!();
    for driver in [DriverChoice::IoUring, DriverChoice::Epoll] {
        let pair = Pair::new(Setup {
            driver,
            ..Setup::default()
        });
        pair.direct();
        assert_eq!(watch_shards(), 2);
        pair.transfer(End::A, End::B.inner4(), 16 << 20);
        pair.transfer(End::B, End::A.inner4(), 16 << 20);
        let mut rounds = Vec::new();
        while !rounds.ends_with(&[0; STILL_ROUNDS]) {
            let packets = || pair.a.stats().total().get(Meter::TunPacketsIn);
            let before = packets();
            ALLOCATIONS.store(0, SeqCst);
            COUNTING.store(true, SeqCst);
            pair.transfer(End::A, End::B.inner4(), 4 << 20);
            pair.transfer(End::B, End::A.inner4(), 2 << 20);
            COUNTING.store(false, SeqCst);
            support::soon("they went through here", || packets() - before > 2500);
            rounds.push(ALLOCATIONS.load(SeqCst));
            let all: u64 = rounds.iter().sum();
            assert!(all <= GROWTH_MAX, "allocations per round: {rounds:?}");
        }
    }
}
