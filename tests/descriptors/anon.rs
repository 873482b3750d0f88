//! eventfd, timerfd, signalfd, inotify, pidfd, epoll, and what is refused.

use crate::harness::*;
use crate::pipes::pipe;
use ckpt::agent::restore::descriptors::Restored;

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("eventfds", eventfd_setup, eventfd_check),
        Case::new("timerfds", timerfd_setup, timerfd_check),
        Case::new("signalfds", signalfd_setup, signalfd_check),
        Case::new("inotify", inotify_setup, inotify_check),
        Case::new("pidfds", pidfd_setup, pidfd_check),
        Case::new("epoll_levels", levels_setup, levels_check),
        Case::new("epoll_edges", edges_setup, edges_check),
        Case::new("epoll_stale_entries", stale_setup, stale_check),
        Case::new("epoll_oneshot", oneshot_setup, oneshot_check),
    ];
    cases.push(Case {
        refused: Some("descriptor 5 (anon_inode:[userfaultfd])"),
        ..Case::new(
            "refusals",
            || {
                // UFFD_USER_MODE_ONLY = 1
                // SAFETY: no memory is involved.
                at(5, unsafe { libc::syscall(libc::SYS_userfaultfd, 1) } as i32);
            },
            |_| {},
        )
    });
    cases
}

fn eventfd_setup() {
    // SAFETY: no memory is involved.
    unsafe {
        at(5, libc::eventfd(3, libc::EFD_NONBLOCK));
        at(
            6,
            libc::eventfd(2, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK),
        );
        at(7, libc::eventfd(0, 0));
    }
    dup(5, 8);
    write(7, &(u64::MAX - 1).to_ne_bytes());
}

fn number(fd: i32) -> Result<u64, i32> {
    read(fd, 8).map(|b| u64::from_ne_bytes(b.try_into().unwrap()))
}

fn eventfd_check(_: &Restored) {
    assert_eq!(number(8), Ok(3));
    assert_eq!(number(5), Err(libc::EAGAIN));
    assert_eq!((number(6), number(6)), (Ok(1), Ok(1)));
    assert_eq!(number(6), Err(libc::EAGAIN));
    assert_eq!(number(7), Ok(u64::MAX - 1));
}

fn timer(fd: i32, flags: i32, first: (i64, i64), every: (i64, i64)) {
    let time = |(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec };
    let spec = libc::itimerspec {
        it_interval: time(every),
        it_value: time(first),
    };
    // SAFETY: a live spec.
    let ret = unsafe { libc::timerfd_settime(fd, flags, &raw const spec, std::ptr::null_mut()) };
    assert_eq!(ret, 0);
}

fn left(fd: i32) -> (f64, f64) {
    // SAFETY: a live, plain struct.
    let spec = unsafe {
        let mut spec: libc::itimerspec = std::mem::zeroed();
        assert_eq!(libc::timerfd_gettime(fd, &raw mut spec), 0);
        spec
    };
    let seconds = |t: libc::timespec| t.tv_sec as f64 + t.tv_nsec as f64 / 1e9;
    (seconds(spec.it_value), seconds(spec.it_interval))
}

fn timerfd_setup() {
    let make = |fd, clock| {
        // SAFETY: no memory is involved.
        at(fd, unsafe {
            libc::timerfd_create(clock, libc::TFD_NONBLOCK)
        });
    };
    for fd in 5..=7 {
        make(fd, libc::CLOCK_MONOTONIC);
    }
    make(8, libc::CLOCK_REALTIME);
    make(9, libc::CLOCK_BOOTTIME);
    timer(5, 0, (100, 0), (7, 0));
    // Expired several times, not read.
    timer(6, 0, (0, 1_000_000), (0, 400_000_000));
    // Expired once for all.
    timer(7, 0, (0, 1_000_000), (0, 0));
    // SAFETY: the time of day is asked.
    let now = unsafe { libc::time(std::ptr::null_mut()) };
    let flags = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
    timer(8, flags, (now + 1000, 0), (0, 0));
    std::thread::sleep(std::time::Duration::from_millis(1000));
}

fn timerfd_check(_: &Restored) {
    let (remaining, every) = left(5);
    assert!(
        (98.0..99.1).contains(&remaining) && every == 7.0,
        "{remaining}"
    );
    assert_eq!(number(5), Err(libc::EAGAIN));
    let ticks = number(6).unwrap();
    assert!((3..=4).contains(&ticks), "{ticks}");
    let (remaining, every) = left(6);
    assert!(remaining <= 0.4 && every == 0.4);
    assert_eq!(number(7), Ok(1));
    assert_eq!(number(7), Err(libc::EAGAIN));
    assert_eq!(left(7).0, 0.0);
    let (remaining, _) = left(8);
    assert!((997.0..1000.0).contains(&remaining), "{remaining}");
    assert_eq!(left(9), (0.0, 0.0));
}

fn signalfd_setup() {
    // SAFETY: a live set; the signal is blocked before it is raised.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGUSR2);
        libc::sigaddset(&raw mut set, libc::SIGRTMIN() + 3);
        at(5, libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK));
    }
}

fn signalfd_check(_: &Restored) {
    // SAFETY: a live set; the signal is blocked before it is raised.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2);
    }
    assert_eq!(
        read(5, 128).unwrap()[..4],
        (libc::SIGUSR2 as u32).to_ne_bytes()
    );
    assert_eq!(read(5, 128), Err(libc::EAGAIN));
}

fn watch(fd: i32, path: &std::ffi::CStr, mask: u32) -> i32 {
    // SAFETY: a live path.
    unsafe { libc::inotify_add_watch(fd, path.as_ptr(), mask) }
}

fn inotify_setup() {
    std::fs::create_dir("watched").unwrap();
    std::fs::create_dir("other").unwrap();
    std::fs::write("file", "x").unwrap();
    // SAFETY: no memory is involved.
    at(5, unsafe { libc::inotify_init1(libc::IN_NONBLOCK) });
    assert_eq!(watch(5, c"other", libc::IN_CREATE), 1);
    // SAFETY: no memory is involved.
    unsafe { libc::inotify_rm_watch(5, 1) };
    assert_eq!(watch(5, c"watched", libc::IN_CREATE | libc::IN_DELETE), 2);
    assert_eq!(watch(5, c"other", libc::IN_CREATE), 3);
    // SAFETY: no memory is involved.
    unsafe { libc::inotify_rm_watch(5, 3) };
    assert_eq!(watch(5, c"file", libc::IN_MODIFY | libc::IN_ONESHOT), 4);
    while read(5, 4096).is_ok() {}
}

fn inotify_check(_: &Restored) {
    assert_eq!(read(5, 4096), Err(libc::EAGAIN));
    std::fs::write("watched/new", "").unwrap();
    let event = read(5, 4096).unwrap();
    assert_eq!(event[..8], [2, 0, 0, 0, 0, 1, 0, 0]);
    std::fs::write("file", "yy").unwrap();
    let event = read(5, 4096).unwrap();
    assert_eq!(event[..8], [4, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(watch(5, c"other", libc::IN_CREATE), 5);
}

fn pidfd_setup() {
    // SAFETY: the child ends at once.
    unsafe {
        at(
            5,
            libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) as i32,
        );
        let child = libc::fork();
        if child == 0 {
            libc::_exit(0);
        }
        at(6, libc::syscall(libc::SYS_pidfd_open, child, 0) as i32);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
}

fn pidfd_check(_: &Restored) {
    let send = |fd: i32, sig: i32| {
        // SAFETY: no memory is involved.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, sig, 0, 0) }
    };
    assert_eq!(send(5, 0), 0);
    assert_eq!(poll(5), 0);
    assert_eq!(send(6, 0), -1);
    assert!(poll(6) & libc::POLLIN != 0);
    let info = std::fs::read_to_string("/proc/self/fdinfo/5").unwrap();
    assert!(info.contains(&format!("Pid:\t{}\n", std::process::id())));
    // SAFETY: no child may be left behind.
    assert_eq!(
        // SAFETY: waits for any child; no status is asked for.
        unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL) },
        -1
    );
}

fn epoll(number: i32) {
    // SAFETY: no memory is involved.
    at(number, unsafe { libc::epoll_create1(0) });
}

const ET: u32 = libc::EPOLLET as u32;
const IN: u32 = libc::EPOLLIN as u32;
const OUT: u32 = libc::EPOLLOUT as u32;
const ONESHOT: u32 = libc::EPOLLONESHOT as u32;

fn control(set: i32, op: i32, fd: i32, events: u32, data: u64) {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: a live event.
    let ret = unsafe { libc::epoll_ctl(set, op, fd, &raw mut event) };
    assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
}

fn add(set: i32, fd: i32, events: u32, data: u64) {
    control(set, libc::EPOLL_CTL_ADD, fd, events, data);
}

/// The events that are there now, by data.
fn wait(set: i32) -> Vec<(u64, u32)> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 32];
    // SAFETY: room for 32 events.
    let n = unsafe { libc::epoll_wait(set, events.as_mut_ptr(), 32, 0) };
    let mut out: Vec<_> = events[..n as usize]
        .iter()
        .map(|e| (e.u64, e.events))
        .collect();
    out.sort_unstable();
    out
}

fn levels_setup() {
    pipe(0, 5, 6);
    write(6, b"x");
    epoll(10);
    add(10, 5, IN, 55);
    add(10, 6, OUT, u64::MAX);
    // A set in a set, and the standard input of the same kind.
    epoll(11);
    add(11, 10, IN, 1);
    pipe(0, 20, 21);
    add(10, 20, IN, 20);
    dup(10, 12);
}

fn levels_check(_: &Restored) {
    let all = [(55, IN), (u64::MAX, OUT)];
    assert_eq!(wait(10), all);
    assert_eq!(wait(12), all);
    assert_eq!(wait(11), [(1, IN)]);
    assert_eq!(read(5, 10).unwrap(), b"x");
    assert_eq!(wait(10), [(u64::MAX, OUT)]);
    write(21, b"y");
    assert_eq!(wait(10), [(20, IN), (u64::MAX, OUT)]);
    control(10, libc::EPOLL_CTL_DEL, 20, 0, 0);
}

fn edges_setup() {
    // 10: everything consumed. 11: an edge is pending.
    pipe(0, 5, 6);
    write(6, b"x");
    epoll(10);
    add(10, 5, IN | ET, 5);
    add(10, 6, OUT | ET, 6);
    assert_eq!(wait(10), [(5, IN), (6, OUT)]);
    assert_eq!(wait(10), []);
    epoll(11);
    add(11, 5, IN | ET, 5);
    assert_eq!(wait(11), [(5, IN)]);
    write(6, b"y");
    // The same write is a new edge for 10 as well: consume it there.
    wait(10);
}

fn edges_check(_: &Restored) {
    assert_eq!(wait(10), [], "an edge that had been consumed");
    assert_eq!(wait(11), [(5, IN)], "an edge that was pending");
    assert_eq!(wait(11), []);
    write(6, b"z");
    assert_eq!(wait(10), [(5, IN)]);
    assert_eq!(wait(11), [(5, IN)]);
    assert_eq!(read(5, 10).unwrap(), b"xyz");
}

fn stale_setup() {
    epoll(10);
    for i in 0..3 {
        // SAFETY: no memory is involved.
        unsafe { at(20 + i, libc::eventfd(0, 0)) };
        add(10, 20 + i, IN, 20 + i as u64);
    }
    // 20 lives on as 30, its number is another eventfd's, watched as well.
    dup(20, 30);
    // SAFETY: no memory is involved.
    unsafe { at(20, libc::eventfd(0, 0)) };
    add(10, 20, IN, 99);
    // 21 lives on as 31, its number is closed.
    dup(21, 31);
    // SAFETY: no memory is involved.
    unsafe { libc::close(21) };
    // 22 was dup'ed over by a file that is not watched, and is gone.
    at(22, open("/dev/null", libc::O_RDONLY));
}

fn stale_check(_: &Restored) {
    assert_eq!(wait(10), []);
    write(30, &1u64.to_ne_bytes());
    assert_eq!(wait(10), [(20, IN)]);
    write(31, &1u64.to_ne_bytes());
    assert_eq!(wait(10), [(20, IN), (21, IN)]);
    write(20, &1u64.to_ne_bytes());
    assert_eq!(wait(10), [(20, IN), (21, IN), (99, IN)]);
    assert_eq!(stat(22).st_mode & libc::S_IFMT, libc::S_IFCHR);
}

fn oneshot_setup() {
    pipe(0, 5, 6);
    write(6, b"x");
    pipe(0, 7, 8);
    epoll(10);
    add(10, 5, IN | ONESHOT, 5);
    assert_eq!(wait(10), [(5, IN)]);
    add(10, 6, OUT | ONESHOT | ET, 6);
    assert_eq!(wait(10), [(6, OUT)]);
    // Fired, and not ready any more.
    write(8, b"y");
    add(10, 7, IN | ONESHOT, 7);
    assert_eq!(wait(10), [(7, IN)]);
    read(7, 1).unwrap();
    // Armed.
    pipe(0, 20, 21);
    add(10, 20, IN | ONESHOT, 20);
}

fn oneshot_check(_: &Restored) {
    assert_eq!(wait(10), []);
    write(8, b"z");
    assert_eq!(wait(10), []);
    control(10, libc::EPOLL_CTL_MOD, 5, IN | ONESHOT, 5);
    control(10, libc::EPOLL_CTL_MOD, 7, IN | ONESHOT, 7);
    assert_eq!(wait(10), [(5, IN), (7, IN)]);
    write(21, b"x");
    assert_eq!(wait(10), [(20, IN)]);
    assert_eq!(wait(10), []);
}
