//! The counter under loom, which tries every order of loads and stores the memory model allows: the
//! very file, compiled against loom's atomics.
//!
//! The counter is the only part of a session that threads may use at once without a lock, so it is
//! all that is modelled here. The owner shard makes, replaces and erases keypairs behind
//! `&mut Machine`; a sealing half is immutable but for its counter, and who borrows one holds the
//! standard library's `Arc` while it seals and a `Weak` otherwise, so that the key is erased with the
//! last who uses it. How it is lent is modelled in `crate::channel`.

mod sync {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
}

#[expect(clippy::duplicate_mod, reason = "the point of this module")]
#[path = "counter.rs"]
mod counter;

use counter::Counter;
use loom::sync::Arc;

/// Three threads take batches of two where there is room for three numbers: no number goes out
/// twice, none at or above the limit, and the sum never wraps.
#[test]
fn no_order_gives_a_number_twice_or_wraps() {
    const NEXT: u64 = LIMIT - 3;
    const LIMIT: u64 = u64::MAX - 6;
    loom::model(|| {
        let counter = Arc::new(Counter::new(NEXT, LIMIT));
        let take = |counter: Arc<Counter>| move || counter.reserve(2);
        let threads = [(), ()].map(|()| loom::thread::spawn(take(counter.clone())));
        let mut taken: Vec<u64> = take(counter.clone())().into_iter().collect();
        for thread in threads {
            taken.extend(thread.join().unwrap());
        }
        assert_eq!(taken, [NEXT], "all that fit, once");
        assert_eq!(counter.peek(), LIMIT);
        assert_eq!(counter.reserve(1), None, "and it stays used up");
    });
}

/// Batches of different threads never overlap.
#[test]
fn no_order_makes_batches_overlap() {
    loom::model(|| {
        let counter = Arc::new(Counter::new(0, 100));
        let take = |counter: Arc<Counter>, n| move || [counter.reserve(n), counter.reserve(n)];
        let other = loom::thread::spawn(take(counter.clone(), 3));
        let ours = take(counter.clone(), 2)().map(|first| (first, 2));
        let theirs = other.join().unwrap().map(|first| (first, 3));
        let mut batches = [ours, theirs].concat();
        batches.sort_unstable();
        let mut next = 0;
        for (first, len) in batches {
            assert_eq!(first, Some(next));
            next += len;
        }
    });
}

/// Who closes the counter and who takes from it never get the same number, nor leave one out.
#[test]
fn no_order_gives_a_number_again_after_the_counter_was_closed() {
    loom::model(|| {
        let counter = Arc::new(Counter::new(0, 5));
        let take = |counter: Arc<Counter>| move || counter.reserve(2);
        let threads = [(), ()].map(|()| loom::thread::spawn(take(counter.clone())));
        let rest = counter.close();
        let mut taken: Vec<u64> = Vec::new();
        for thread in threads {
            taken.extend(thread.join().unwrap());
        }
        taken.sort_unstable();
        let before: Vec<u64> = (0..rest).step_by(2).collect();
        assert_eq!(taken, before, "all below {rest}, and nothing else");
        assert_eq!((counter.reserve(1), counter.close()), (None, 5));
    });
}
