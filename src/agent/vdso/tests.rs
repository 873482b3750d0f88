//! There is one kernel only, so another one's vdso is made of this one's: its functions
//! are spoilt (they trap), it lies at another address, and some symbols are missing.

use super::*;
use crate::agent::clock;
use ckpt_sys::syscall;

fn own() -> (u64, Vec<u8>) {
    let (start, end) = clock::kernel_vdso();
    assert!(start != 0 && start < end);
    // SAFETY: the kernel's mapping.
    let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) };
    (start, bytes.to_vec())
}

/// All its code traps.
fn spoilt(elf: &[u8]) -> Vec<u8> {
    let mut spoilt = elf.to_vec();
    for f in functions(elf).unwrap() {
        spoilt[f.at as usize..(f.at + f.size) as usize].fill(0xcc);
    }
    spoilt
}

/// Executable memory with these bytes.
fn placed(bytes: &[u8]) -> u64 {
    // SAFETY: a new mapping, never removed.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let at = syscall!(libc::SYS_mmap, 0, bytes.len(), prot, flags, -1i32, 0);
        assert!(at > 0);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len());
        let prot = libc::PROT_READ | libc::PROT_EXEC;
        assert_eq!(syscall!(libc::SYS_mprotect, at, bytes.len(), prot), 0);
        at as u64
    }
}

/// Calls a function of the vdso at `base`.
fn call(base: u64, elf: &[u8], name: &str, args: [u64; 5]) -> i64 {
    let at = base + find(&functions(elf).unwrap(), name).expect(name);
    // SAFETY: C functions of at most five integers.
    let function: extern "C" fn(u64, u64, u64, u64, u64) -> i64 =
        unsafe { std::mem::transmute(at) };
    let result = function(args[0], args[1], args[2], args[3], args[4]);
    if name == "time" {
        result
    } else {
        i64::from(result as i32)
    }
}

fn clock_ns(base: u64, elf: &[u8], clock: i32) -> i64 {
    let mut time = [0i64; 2];
    let at = &raw mut time as u64;
    assert_eq!(
        call(base, elf, "clock_gettime", [clock as u64, at, 0, 0, 0]),
        0
    );
    time[0] * 1_000_000_000 + time[1]
}

fn kernel_ns(clock: i32) -> i64 {
    let mut time = [0i64; 2];
    // SAFETY: the kernel fills two words.
    unsafe { syscall!(libc::SYS_clock_gettime, clock, &mut time) };
    time[0] * 1_000_000_000 + time[1]
}

/// Every function does what it should.
fn check(base: u64, elf: &[u8], shift_ns: i64) {
    let has = |name: &str| find(&functions(elf).unwrap(), name).is_some();
    for (clock, shift) in [(libc::CLOCK_MONOTONIC, shift_ns), (libc::CLOCK_REALTIME, 0)] {
        let before = kernel_ns(clock);
        let shown = clock_ns(base, elf, clock) - shift;
        let after = kernel_ns(clock);
        assert!(before <= shown && shown <= after, "clock {clock}");
    }
    let mut value = [0i64; 2];
    let at = &raw mut value as u64;
    assert_eq!(call(base, elf, "gettimeofday", [at, 0, 0, 0, 0]), 0);
    let now = kernel_ns(libc::CLOCK_REALTIME) / 1_000_000_000;
    assert!((now - value[0]).abs() <= 1);
    assert!((call(base, elf, "time", [at, 0, 0, 0, 0]) - now).abs() <= 1);
    assert!((value[0] - now).abs() <= 1);
    let mut cpu = [u32::MAX; 2];
    let (first, second) = (&raw mut cpu[0] as u64, &raw mut cpu[1] as u64);
    assert_eq!(call(base, elf, "getcpu", [first, second, 0, 0, 0]), 0);
    assert!(cpu[0] < 4096 && cpu[1] < 4096);
    value = [7; 2];
    assert_eq!(call(base, elf, "clock_getres", [1, at, 0, 0, 0]), 0);
    assert!(value[0] == 0 && value[1] >= 1);
    if has("getrandom") {
        let mut random = [0u8; 64];
        let mut state = [0u8; 256];
        let into = (random.as_mut_ptr() as u64, state.as_mut_ptr() as u64);
        assert_eq!(
            call(base, elf, "getrandom", [into.0, 64, 0, into.1, 256]),
            64
        );
        assert!(random.iter().any(|&b| b != 0));
        assert_eq!(state, [0; 256], "the state is nobody's");
        let asked = call(base, elf, "getrandom", [0, 0, 0, into.1, u64::MAX]);
        assert_eq!(asked, -i64::from(libc::ENOSYS));
    }
}

#[test]
fn the_kernels_own_functions_are_found() {
    let (_, elf) = own();
    let all = functions(&elf).unwrap();
    for name in ["clock_gettime", "gettimeofday", "time", "getcpu"] {
        assert!(find(&all, name).is_some(), "{name}");
    }
    assert_eq!(mapped_len(&elf), Some(elf.len() as u64));
}

#[test]
fn another_kernels_functions_lead_to_this_ones() {
    let (base, elf) = own();
    let here = functions(&elf).unwrap();
    let old = spoilt(&elf);
    let led = lead(&old, |name| find(&here, name).map(|at| base + at)).unwrap();
    check(placed(&led), &led, 0);
    // Led once more, as under a third kernel: from the copy, not through it.
    let again = lead(&led, |name| find(&here, name).map(|at| base + at)).unwrap();
    assert_eq!(again, led);
}

#[test]
fn functions_that_this_kernel_lacks_become_system_calls() {
    let (base, elf) = own();
    let here = functions(&elf).unwrap();
    let old = spoilt(&elf);
    for gone in [
        "clock_gettime",
        "gettimeofday",
        "time",
        "getcpu",
        "clock_getres",
    ] {
        let target = |name: &str| (name != gone).then(|| find(&here, name).map(|at| base + at));
        let led = lead(&old, |name| target(name).flatten()).unwrap();
        check(placed(&led), &led, 0);
    }
    let led = lead(&old, |_| None).unwrap();
    check(placed(&led), &led, 0);
}

#[test]
fn the_clock_may_lead_to_the_one_with_an_offset() {
    let (base, elf) = own();
    let here = functions(&elf).unwrap();
    let target = |name: &str| match name {
        "clock_gettime" => Some(ckpt_sys::clock::gettime()),
        name => find(&here, name).map(|at| base + at),
    };
    let led = lead(&spoilt(&elf), target).unwrap();
    let place = placed(&led);
    ckpt_sys::clock::set_real(base + find(&here, "clock_gettime").unwrap());
    for offset in [0, 5_000_000_123, 86_400_000_000_000] {
        ckpt_sys::clock::set_offset(1, offset);
        check(place, &led, offset as i64);
    }
    ckpt_sys::clock::set_offset(1, 0);
}

/// A function of which nothing is known.
#[test]
fn an_unknown_function_says_that_it_is_not_there() {
    let (_, elf) = own();
    let mut odd = spoilt(&elf);
    // Both names of getcpu are spelt otherwise.
    let (from, to) = (b"getcpu", b"gotcpu");
    for k in 0..odd.len() - 6 {
        if &odd[k..k + 6] == from {
            odd[k..k + 6].copy_from_slice(to);
        }
    }
    let led = lead(&odd, |_| None).unwrap();
    let result = call(placed(&led), &led, "gotcpu", [0; 5]);
    assert_eq!(result, -i64::from(libc::ENOSYS));
}

#[test]
fn where_there_is_no_room_it_is_refused() {
    let (_, elf) = own();
    let mut small = elf.clone();
    let table = dynamic(&elf).unwrap();
    for k in 1..table.count {
        let at = (table.symbols + 24 * k) as usize;
        let f = functions(&elf).unwrap();
        let value = u64_at(&elf, at as u64 + 8).unwrap();
        if find(&f, "getcpu") == Some(value) {
            small[at + 16..at + 24].copy_from_slice(&4u64.to_le_bytes());
        }
    }
    let error = lead(&small, |_| Some(1)).unwrap_err();
    assert!(matches!(error, VdsoError::Room { room: 4, .. }), "{error}");
    assert!(error.to_string().contains("getcpu"));
}

#[test]
fn damaged_bytes_are_an_error_and_nothing_worse() {
    let (_, elf) = own();
    assert_eq!(functions(b""), Err(VdsoError::Elf));
    assert_eq!(functions(&[0; 8192]), Err(VdsoError::Elf));
    for len in (0..elf.len()).step_by(37) {
        let _ = lead(&elf[..len], |_| None);
        let _ = mapped_len(&elf[..len]);
    }
    let mut seed = 0x1234_5678_9abc_def1u64;
    for _ in 0..20_000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let mut damaged = elf.clone();
        // Where the tables are.
        let at = (seed >> 20) as usize % 0x800;
        damaged[at..at + 2].copy_from_slice(&(seed as u16).to_le_bytes());
        let _ = lead(&damaged, |_| Some(1));
        let _ = mapped_len(&damaged);
    }
}
