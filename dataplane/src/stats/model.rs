//! The sequence lock under loom, which tries every order of loads and stores the memory model
//! allows: the very file, compiled against loom's atomics.

mod sync {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering, fence};
}

#[expect(clippy::duplicate_mod, reason = "the point of this module")]
#[path = "seqlock.rs"]
mod seqlock;

use seqlock::SeqBlock;

#[test]
fn no_order_of_loads_and_stores_gives_a_torn_read() {
    loom::model(|| {
        let block = loom::sync::Arc::new(SeqBlock::<2>::new());
        let writer = {
            let block = block.clone();
            loom::thread::spawn(move || {
                block.publish(&[1, 10]);
                block.publish(&[2, 20]);
            })
        };
        if let Some([a, b]) = block.try_read() {
            assert_eq!(b, a * 10, "of two publications");
        }
        writer.join().unwrap();
        assert_eq!(block.try_read(), Some([2, 20]));
        assert_eq!(block.read_torn(), [2, 20]);
    });
}
