//! What somebody else changes while the kernel tells of it is asked for again.

use std::io;

/// Times that it is asked for.
const TRIES: usize = 8;

/// Asks once more where the answer was torn (`EINTR`, for a dump) or the question had become stale (`ERESTART`, for a
/// batch of nftables that names a generation); the last answer counts.
pub(super) fn again<T>(mut ask: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let changed = |error: &io::Error| {
        error.kind() == io::ErrorKind::Interrupted
            || error.raw_os_error() == Some(nix::libc::ERESTART)
    };
    for _ in 1..TRIES {
        match ask() {
            Err(error) if changed(&error) => {}
            result => return result,
        }
    }
    ask()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_while_it_is_told_is_asked_for_again_but_not_for_ever() {
        let mut asked = 0;
        let told = again(|| {
            asked += 1;
            match asked {
                1 => Err(io::ErrorKind::Interrupted.into()),
                2 => Err(io::Error::from_raw_os_error(nix::libc::EINTR)),
                3 => Err(io::Error::from_raw_os_error(nix::libc::ERESTART)),
                _ => Ok(asked),
            }
        });
        assert_eq!(told.unwrap(), 4);
        for (kind, tries) in [
            (io::ErrorKind::Interrupted, TRIES),
            (io::ErrorKind::NotFound, 1),
        ] {
            let mut asked = 0;
            let told: io::Result<()> = again(|| {
                asked += 1;
                Err(kind.into())
            });
            assert_eq!((told.is_err(), asked), (true, tries));
        }
    }
}
