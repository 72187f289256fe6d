//! The path machine in simulated networks, under virtual time.
//!
//! A [`World`](world::World) has two nodes, each a real `Manager` and a real `Netcheck` with a model
//! of the shard's sending rule, hosts and NATs of every kind between them ([`net`]), two STUN servers
//! and a relay. Time jumps from one event to the next. The tests: every pair of NATs in every
//! starting order ([`matrix`]), a path that dies and comes back ([`blocks`], and [`recovery`] after
//! long times and to other addresses), or is too narrow ([`narrow`]), the timelines of
//! `protocol/paths.md` §17 with one scripted peer ([`timelines`], by [`script`]), hours of random
//! weather ([`weather`]) and junk ([`junk`]).

mod blocks;
mod junk;
mod matrix;
mod narrow;
mod net;
mod recovery;
mod script;
mod shard;
mod timelines;
mod weather;
mod world;
