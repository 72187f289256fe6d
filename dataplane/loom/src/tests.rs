//! One owner and two guests, each with a flow of its own.

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;

use crate::loan::{Borrowed, Lent, Loan};
use crate::queue::ArrayQueue;
use crate::shim;
use crate::wake::Wake;

/// Tries every order with at most so many switches away from a thread that could go on.
fn check(switches: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(switches);
    builder.check(model);
}

/// What is read into. The bytes have no lock, and loom fails where two threads touch them without an order
/// between them.
type Buffer = Arc<UnsafeCell<u8>>;

/// The buffers of a shard's driver that are at home.
type Pool = Arc<ArrayQueue<Buffer>>;

fn pool(count: usize) -> Pool {
    let pool = ArrayQueue::new(count);
    (0..count).for_each(|_| assert!(pool.push(Arc::new(UnsafeCell::new(0))).is_ok()));
    Arc::new(pool)
}

/// An owned buffer, which goes home, if it has one, when it is dropped.
struct Packet {
    flow: usize,
    buffer: Buffer,
    home: Option<Pool>,
}

impl Packet {
    /// One is read into a free buffer.
    fn read(flow: usize, number: u8, home: Option<&Pool>) -> Option<Packet> {
        let buffer = match home {
            Some(pool) => pool.pop()?,
            None => Arc::new(UnsafeCell::new(0)),
        };
        // SAFETY: what the model shows: nobody else is at it.
        buffer.with_mut(|bytes| unsafe { *bytes = number });
        let home = home.map(Arc::clone);
        Some(Packet { flow, buffer, home })
    }

    fn number(&self) -> u8 {
        // SAFETY: what the model shows: nobody else is at it.
        self.buffer.with(|bytes| unsafe { *bytes })
    }
}

impl Drop for Packet {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            assert!(home.push(Arc::clone(&self.buffer)).is_ok(), "room for all");
        }
    }
}

/// A peer, its owner's inbox, and what has been sent.
struct World {
    loan: Loan<u8>,
    handed: ArrayQueue<Packet>,
    wake: Wake,
    stop: AtomicBool,
    /// Of each flow. No lock here either.
    sent: [UnsafeCell<Vec<u8>>; 2],
    refused: AtomicUsize,
}

impl World {
    fn new(room: usize) -> Arc<World> {
        Arc::new(World {
            loan: Loan::default(),
            handed: ArrayQueue::new(room),
            wake: Wake::new().expect("it is no descriptor"),
            stop: AtomicBool::new(false),
            sent: [(); 2].map(|()| UnsafeCell::new(Vec::new())),
            refused: AtomicUsize::new(0),
        })
    }

    fn send(&self, packet: &Packet) {
        let number = packet.number();
        // SAFETY: what the model shows: nobody else is at it.
        self.sent[packet.flow].with_mut(|sent| unsafe { &mut *sent }.push(number));
    }

    fn sent(&self, flow: usize) -> Vec<u8> {
        // SAFETY: as in `send`.
        self.sent[flow].with(|sent| unsafe { &*sent }.clone())
    }

    /// `Shard::handed`: what was handed over is sent, and counted as arrived after that.
    fn turn(&self) -> usize {
        let packets: Vec<Packet> = std::iter::from_fn(|| self.handed.pop()).collect();
        packets.iter().for_each(|packet| self.send(packet));
        packets.iter().for_each(|_| self.loan.arrived());
        packets.len()
    }

    /// The loop of a shard, for as long as it is to go on.
    fn run(&self, mut goes_on: impl FnMut(&World, usize) -> bool) {
        let mut count = 0;
        while goes_on(self, count) {
            self.wake.about_to_sleep();
            // `Shard::wait`, and the driver.
            if self.handed.is_empty() && !self.stop.load(Ordering::SeqCst) {
                shim::sleep();
            }
            self.wake.awake();
            self.wake.clear();
            let sent = self.turn();
            if sent == 0 {
                // What made it awake is not to be seen yet: others go on first.
                thread::yield_now();
            }
            count += sent;
        }
    }

    /// `Hub::stop`.
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake.ring();
    }
}

/// A shard that reads packets of the peer.
struct Guest {
    world: Arc<World>,
    pool: Option<Pool>,
    flow: usize,
    borrowed: Borrowed<u8>,
    run: Vec<Packet>,
}

impl Guest {
    /// `Shard::outbound`: sealed into a run, or handed over after what is in the run.
    fn packet(&mut self, number: u8) {
        let Some(packet) = Packet::read(self.flow, number, self.pool.as_ref()) else {
            return;
        };
        if self.borrowed.take_up(&self.world.loan, |_| true) {
            self.run.push(packet);
            return;
        }
        self.flush();
        let World {
            loan,
            handed,
            wake,
            refused,
            ..
        } = &*self.world;
        loan.hand(|| {
            let room = handed.push(packet).is_ok();
            if room {
                wake.ring();
            } else {
                refused.fetch_add(1, Ordering::Relaxed);
            }
            room
        });
    }

    /// `Shard::flush_run`.
    fn flush(&mut self) {
        for packet in self.run.drain(..) {
            self.world.send(&packet);
        }
        self.borrowed.release();
    }
}

/// Starts two guests; each runs `turns` and ends.
fn guests(
    world: &Arc<World>,
    pool: Option<&Pool>,
    turns: impl Fn(&mut Guest) + Clone + Send + 'static,
) -> [thread::JoinHandle<()>; 2] {
    [0, 1].map(|flow| {
        let mut guest = Guest {
            world: Arc::clone(world),
            pool: pool.map(Arc::clone),
            flow,
            borrowed: Borrowed::default(),
            run: Vec::new(),
        };
        let turns = turns.clone();
        thread::spawn(move || turns(&mut guest))
    })
}

fn ended(guests: [thread::JoinHandle<()>; 2]) {
    for guest in guests {
        guest.join().expect("nobody panics");
    }
}

/// In order, none twice, and all that had room and were read.
fn in_order(world: &World, all: usize) {
    let sent = [0, 1].map(|flow| world.sent(flow));
    for sent in &sent {
        assert!(
            sent.is_sorted_by(|before, after| before < after),
            "{sent:?}"
        );
    }
    let count = sent.iter().map(Vec::len).sum::<usize>();
    assert_eq!(
        count + world.refused.load(Ordering::Relaxed),
        all,
        "{sent:?}"
    );
}

/// The owner begins to lend while packets of both are on their way to it: none overtakes another.
#[test]
fn no_order_reorders_two_flows_when_a_loan_begins() {
    check(2, || {
        let world = World::new(2);
        let both = guests(&world, None, |guest| {
            for number in 1..=2 {
                guest.packet(number);
                guest.flush();
            }
        });
        let lent = Lent::new(1);
        world.loan.set(&lent);
        world.turn();
        world.turn();
        ended(both);
        world.turn();
        in_order(&world, 4);
        assert!(!world.loan.busy(), "every packet is counted as arrived");
    });
}

/// The owner changes what it lends: nobody who knows of that opens a run on what was lent before, and what is
/// handed over in between is not overtaken.
#[test]
fn no_order_lets_a_guest_go_on_with_what_has_ended() {
    check(2, || {
        let world = World::new(2);
        let told = Arc::new(AtomicBool::new(false));
        let first = Lent::new(1);
        world.loan.set(&first);
        let both = {
            let told = Arc::clone(&told);
            guests(&world, None, move |guest| {
                for number in 1..=2 {
                    let told = told.load(Ordering::Acquire);
                    guest.packet(number);
                    let way = guest.borrowed.get().copied();
                    assert!(!told || way != Some(1), "that has ended");
                    guest.flush();
                }
            })
        };
        drop(first);
        told.store(true, Ordering::Release);
        world.turn();
        let second = Lent::new(2);
        world.loan.set(&second);
        world.turn();
        ended(both);
        world.turn();
        in_order(&world, 4);
        assert!(!world.loan.busy());
    });
}

/// An owner that sleeps hears of every packet: else it would sleep for ever, which loom finds.
#[test]
fn no_order_leaves_a_packet_with_an_owner_that_sleeps() {
    check(2, || {
        let world = World::new(2);
        let both = guests(&world, None, |guest| guest.packet(1));
        world.run(|_, count| count < 2);
        ended(both);
        in_order(&world, 2);
        assert!(!world.loan.busy());
    });
}

/// The data plane stops while both hand over: the owner ends, what it leaves behind is still counted, and goes
/// with the queue (loom finds a buffer that nobody frees).
#[test]
fn no_order_of_a_stop_loses_a_packet_or_keeps_an_owner() {
    check(2, || {
        let world = World::new(1);
        let both = guests(&world, None, |guest| {
            guest.packet(1);
            if guest.flow == 0 {
                guest.world.stop();
            }
        });
        world.run(|world, _| !world.stop.load(Ordering::SeqCst));
        ended(both);
        let left = world.handed.len();
        let sent = world.sent(0).len() + world.sent(1).len();
        let refused = world.refused.load(Ordering::Relaxed);
        assert_eq!(sent + left + refused, 2);
        assert_eq!(world.loan.busy(), left > 0);
    });
}

/// A buffer that comes home from the owner is read into again, by whichever guest is first.
#[test]
fn no_order_gives_a_buffer_to_two() {
    check(2, || {
        let (world, pool) = (World::new(2), pool(1));
        let read = Arc::new(AtomicUsize::new(0));
        let both = {
            let read = Arc::clone(&read);
            guests(&world, Some(&pool), move |guest| {
                for number in 1..=2 {
                    let free = Packet::read(guest.flow, number, guest.pool.as_ref());
                    if free.is_some() {
                        read.fetch_add(1, Ordering::Relaxed);
                        drop(free);
                    }
                    guest.packet(number);
                }
            })
        };
        world.turn();
        ended(both);
        world.turn();
        assert!(!world.loan.busy());
        assert_eq!(pool.len(), 1);
    });
}
