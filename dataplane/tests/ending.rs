//! The end of a data plane. One test, because a program that another test starts holds a copy of every
//! descriptor for a moment.
#![expect(clippy::disallowed_methods, reason = "tests of drivers sleep")]

mod support;

use std::ffi::CStr;
use std::time::Duration;

use ringtail_dataplane::DriverChoice;
use support::{End, Lab, lab_or_skip, start_another};

/// Whoever ends a node may at once start another with the same name and port.
#[test]
fn interface_and_port_are_free_once_it_has_ended() {
    lab_or_skip!();
    let lab = Lab::new();
    for driver in [DriverChoice::IoUring, DriverChoice::Epoll] {
        lab.inside(End::A, || {
            let mut port = 0;
            for round in 0..20 {
                let dataplane = start_another(driver, port)
                    .unwrap_or_else(|error| panic!("{driver:?}, round {round}: {error}"));
                port = dataplane.local_port();
                // The shards are to sleep, with every request armed.
                std::thread::sleep(Duration::from_millis(20));
                assert!(interface_exists(c"rt1"));
                drop(dataplane);
                assert!(!interface_exists(c"rt1"), "{driver:?}, round {round}");
            }
        });
    }
}

/// In the namespace of the thread that calls.
fn interface_exists(name: &CStr) -> bool {
    // SAFETY: the name ends with a NUL and is readable during the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}
