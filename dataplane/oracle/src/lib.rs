//! Our sessions against boringtun's, thousands of them, under virtual time.
//!
//! boringtun reads a clock of its own. Its feature `mock-instant` puts one in its place that tests
//! move; a feature is switched on for all who share a build, so this crate is a workspace of its
//! own. `scripts/test.sh` runs it.
//!
//! Each session is two ends ([`ringtail_dataplane::fuzzing::End`]): ours, and the one that
//! `--engine boringtun` uses. [`network`] carries their messages, and keeps a model beside each end
//! that says of every single message whether it must be taken: [`tunn`] for boringtun's, and the one
//! that the data plane's own tests use for ours. What is opened is compared with what was sealed.

#[cfg(test)]
mod network;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tunn;
