//! For tests: a kernel that refuses.

use super::bpf::{EQUAL, LOAD, RETURN, op};

/// Makes the system calls with these numbers fail with an errno where their argument of this number, from 0,
/// compares so (`BPF_JEQ`, `BPF_JGT`) with a value, in this thread from now on, and in those that it starts.
pub(crate) fn refuse(
    calls: &[libc::c_long],
    (argument, compare, value): (u32, u32, u32),
    errno: i32,
) {
    let errno = u32::try_from(errno).expect("an errno");
    let compare = libc::BPF_JMP | compare | libc::BPF_K;
    // `struct seccomp_data`: the call's number at 0, its arguments of 8 bytes each from 16.
    let low = 16 + 8 * argument + if cfg!(target_endian = "little") { 0 } else { 4 };
    for call in calls {
        let call = u32::try_from(*call).expect("a call");
        let mut steps = [
            op(LOAD, 0, 0, 0),
            op(EQUAL, 0, 3, call),
            op(LOAD, 0, 0, low),
            op(compare, 0, 1, value),
            op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
            op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog {
            len: u16::try_from(steps.len()).expect("six"),
            filter: steps.as_mut_ptr(),
        };
        // SAFETY: no memory is passed.
        let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        assert_eq!(result, 0);
        // SAFETY: the program and its steps are readable for the length of the call, which copies them.
        let result = unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            )
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}
