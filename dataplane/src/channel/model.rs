//! The loan under loom, which tries every order of loads and stores the memory model allows: the very
//! file, compiled against loom's atomics and locks.

mod sync {
    pub(super) use std::sync::PoisonError;

    pub(super) use loom::sync::Mutex;
    pub(super) use loom::sync::atomic::{AtomicUsize, Ordering};
}

#[expect(clippy::duplicate_mod, reason = "the point of this module")]
#[path = "loan.rs"]
mod loan;

use loan::Loan;
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Mutex};

/// One flow on its way: what was handed over, and what has been sent. The latter has no lock, and loom
/// fails where two threads touch it without an order between them.
struct Flow {
    loan: Loan<bool>,
    lane: Mutex<Vec<u8>>,
    sent: UnsafeCell<Vec<u8>>,
}

impl Flow {
    fn send(&self, packet: u8) {
        self.sent.with_mut(|sent| {
            // SAFETY: what the model shows: nobody else is at it.
            unsafe { &mut *sent }.push(packet);
        });
    }

    /// The owner's turn.
    fn owner(&self) {
        let handed = std::mem::take(&mut *self.lane.lock().unwrap());
        for packet in handed {
            self.send(packet);
            self.loan.arrived();
        }
    }

    /// A packet read by another shard.
    fn guest(&self, packet: u8) {
        if !self.loan.busy() && self.loan.get() {
            self.send(packet);
        } else {
            self.loan.hand();
            self.lane.lock().unwrap().push(packet);
        }
    }
}

/// The owner begins to lend while packets are handed to it: none overtakes another.
#[test]
fn no_order_reorders_a_flow_when_a_loan_begins() {
    loom::model(|| {
        let flow = Arc::new(Flow {
            loan: Loan::default(),
            lane: Mutex::new(Vec::new()),
            sent: UnsafeCell::new(Vec::new()),
        });
        let guest = {
            let flow = Arc::clone(&flow);
            loom::thread::spawn(move || (1..=3).for_each(|packet| flow.guest(packet)))
        };
        flow.loan.set(true);
        flow.owner();
        flow.owner();
        guest.join().unwrap();
        flow.owner();
        flow.sent.with(|sent| {
            // SAFETY: the other thread has ended.
            assert_eq!(unsafe { &*sent }, &[1, 2, 3]);
        });
    });
}
