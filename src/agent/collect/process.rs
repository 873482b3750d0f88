//! Process-wide state: ids, working directory, limits, prctl, mm fields.

use crate::agent::collect::descriptors::sys;
use crate::agent::hooks::{self, ids};
use crate::agent::procfs::{OwnFd, field, number, read_file, read_link, stat_fields, task_file};
use crate::agent::settings;
use crate::agent::state::AGENT;
use crate::image::state::{MmFields, ProcessState};
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// What the kernel refused to tell.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {what} of the process: errno {errno}")]
pub struct ProcessError {
    pub what: &'static str,
    pub errno: i32,
}

fn octal(text: &[u8]) -> u32 {
    text.iter()
        .take_while(|b| (b'0'..=b'7').contains(b))
        .fold(0, |v, &b| v * 8 + (b - b'0') as u32)
}

/// `tid` is a live thread of the program (the leader may have exited).
pub fn collect(tid: i32) -> Result<ProcessState, ProcessError> {
    let fail = |what| move |errno| ProcessError { what, errno };
    let stat = read_file(b"/proc/thread-self/stat").map_err(fail("stat"))?;
    let fields = stat_fields(&stat);
    // Field numbers as in proc(5), which counts from 1; ours start at field 3.
    let at = |n: usize| fields.get(n - 3).and_then(|f| number(f)).unwrap_or(0);
    let status = task_file(tid, "status").map_err(fail("status"))?;
    let link = |leaf: &str| read_link(format!("/proc/self/task/{tid}/{leaf}").as_bytes());
    let prctl = |option: i32| -> isize {
        let mut word = 0u32;
        // SAFETY: options that return a value or fill one int.
        unsafe {
            match option {
                libc::PR_GET_CHILD_SUBREAPER => {
                    syscall!(libc::SYS_prctl, option, &mut word);
                    word as isize
                }
                _ => syscall!(libc::SYS_prctl, option, 0, 0, 0, 0),
            }
        }
    };
    // Limits that were given from outside are the new start's business.
    let given = settings::get().map_or(&[][..], |s| &s.limits);
    let mut rlimits = limits();
    rlimits.retain(|limit| !given.contains(limit));
    let mm = MmFields {
        start_code: at(26) as u64,
        end_code: at(27) as u64,
        start_stack: at(28) as u64,
        start_data: at(45) as u64,
        end_data: at(46) as u64,
        start_brk: at(47) as u64,
        arg_start: at(48) as u64,
        arg_end: at(49) as u64,
        env_start: at(50) as u64,
        env_end: at(51) as u64,
        // SAFETY: brk(0) only asks.
        brk: unsafe { syscall!(libc::SYS_brk, 0) } as u64,
    };
    Ok(ProcessState {
        pid: AGENT.pid.load(Ordering::Relaxed),
        ppid: at(4) as i32,
        // As the program knows them.
        pgid: ids::group_to_virtual(at(5) as i32),
        sid: ids::session_to_virtual(at(6) as i32),
        cwd: link("cwd").map_err(fail("working directory"))?,
        umask: field(&status, "Umask").map_or(0o022, octal),
        exe: link("exe").map_err(fail("executable"))?,
        cmdline: read_file(b"/proc/thread-self/cmdline").unwrap_or_default(),
        rlimits,
        dumpable: prctl(libc::PR_GET_DUMPABLE) as i32,
        no_new_privs: field(&status, "NoNewPrivs").and_then(number) == Some(1),
        child_subreaper: prctl(libc::PR_GET_CHILD_SUBREAPER) != 0,
        thp_disable: prctl(libc::PR_GET_THP_DISABLE) == 1,
        personality: read_file(b"/proc/thread-self/personality")
            .ok()
            .and_then(|t| crate::agent::procfs::hex(&t))
            .unwrap_or(0) as u32,
        oom_score_adj: read_file(b"/proc/self/oom_score_adj")
            .ok()
            .and_then(|t| number(&t))
            .unwrap_or(0) as i32,
        // Of each thread: `Privileges`.
        keepcaps: false,
        mm,
        auxv: read_file(b"/proc/thread-self/auxv").map_err(fail("auxv"))?,
        mlockall: hooks::memory::locked_in_future(),
        xcomp_perm: xcomp_perm(),
    })
}

/// Device and inode of a thread's working directory.
pub fn cwd_object(tid: i32) -> (u64, u64) {
    let link = format!("/proc/self/task/{tid}/cwd");
    sys::stat(link.as_bytes()).map_or((0, 0), |st| (st.st_dev, st.st_ino))
}

/// Resource limits: (resource, soft, hard).
pub fn limits() -> Vec<(u32, u64, u64)> {
    let limit = |resource: u32| {
        let mut pair = [0u64; 2];
        // SAFETY: the kernel fills two words.
        let ret = unsafe { syscall!(libc::SYS_prlimit64, 0, resource, 0, &mut pair) };
        (ret == 0).then_some((resource, pair[0], pair[1]))
    };
    (0..16u32).filter_map(limit).collect()
}

/// May this user read the memory of the process by /proc? Not what PR_SET_DUMPABLE protects
/// from him, and the images that he would get are no less readable than that.
pub fn may_be_read() -> bool {
    // SAFETY: no pointers.
    let dumpable = unsafe { syscall!(libc::SYS_prctl, libc::PR_GET_DUMPABLE) };
    dumpable == 1 || OwnFd::open(b"/proc/thread-self/pagemap").is_ok()
}

/// prctl(2), of Linux 6.3: the program forbids itself memory that becomes executable.
const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;

/// Its switch (PR_MDWE_*); an errno where the kernel does not know it.
pub fn mdwe() -> Result<u32, i32> {
    // SAFETY: no pointers.
    let ret = unsafe { syscall!(libc::SYS_prctl, PR_GET_MDWE, 0, 0, 0, 0) };
    ckpt_sys::raw::check(ret).map(|bits| bits as u32)
}

/// Sets the switch, for good.
pub fn set_mdwe(bits: u32) -> Result<(), i32> {
    // SAFETY: no pointers.
    let ret = unsafe { syscall!(libc::SYS_prctl, PR_SET_MDWE, u64::from(bits), 0, 0, 0) };
    ckpt_sys::raw::check(ret).map(|_| ())
}

/// Permitted dynamic XSAVE features (AMX), ARCH_GET_XCOMP_PERM.
pub fn xcomp_perm() -> u64 {
    let mut bits = 0u64;
    // SAFETY: the kernel fills one word.
    let ret = unsafe { syscall!(libc::SYS_arch_prctl, 0x1022, &mut bits) };
    if ret == 0 { bits } else { 0 }
}
