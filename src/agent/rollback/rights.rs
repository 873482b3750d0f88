//! What an ordinary user cannot take back: no_new_privs, and limits that he has lowered and
//! that are in the way of what must be made again (threads, locked memory). Found before
//! anything is touched; helper thread, the program stopped and its limits lifted.

use super::limits;
use crate::agent::procfs::{self, OwnFd};
use crate::agent::state::AGENT;
use crate::image::state::{Manifest, vma_flag};
use std::sync::atomic::Ordering;

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// An errno and the reason. `given`: the limits of the start.
pub fn check(manifest: &Manifest, given: &[(u32, u64, u64)]) -> Result<(), (i32, String)> {
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    let status = procfs::task_file(leader, "status").unwrap_or_default();
    privileges(manifest, &status)?;
    locked(manifest, &status)?;
    threads(manifest, given, &status)
}

fn privileges(manifest: &Manifest, status: &[u8]) -> Result<(), (i32, String)> {
    let now = procfs::field(status, "NoNewPrivs").and_then(procfs::number) == Some(1);
    match now && !manifest.process.no_new_privs {
        true => Err((
            libc::EPERM,
            "PR_SET_NO_NEW_PRIVS, set since the checkpoint, cannot be taken back".into(),
        )),
        false => Ok(()),
    }
}

fn has(status: &[u8], capability: u32) -> bool {
    let effective = procfs::field(status, "CapEff").and_then(procfs::hex);
    effective.is_some_and(|set| set & 1 << capability != 0)
}

/// What was locked is locked again.
fn locked(manifest: &Manifest, status: &[u8]) -> Result<(), (i32, String)> {
    let vmas = manifest.memory.vmas.iter();
    let wanted: u64 = vmas
        .filter(|vma| vma.flags & vma_flag::LOCKED != 0)
        .map(|vma| vma.end - vma.start)
        .sum();
    let limit = limits::now(libc::RLIMIT_MEMLOCK).0;
    if wanted <= limit || has(status, CAP_IPC_LOCK) {
        return Ok(());
    }
    let reason = format!(
        "{wanted} bytes of memory were locked at the checkpoint, the process may lock {limit} now (RLIMIT_MEMLOCK)"
    );
    Err((libc::EIO, reason))
}

/// All threads but the first are born again. The kernel counts the tasks of the user, those of
/// his other processes too; they are only looked at where there may be too many.
fn threads(
    manifest: &Manifest,
    given: &[(u32, u64, u64)],
    status: &[u8],
) -> Result<(), (i32, String)> {
    let limit = limits::now(libc::RLIMIT_NPROC).0;
    let lowered = limit < limits::then(manifest, given, libc::RLIMIT_NPROC).0;
    // And a helper.
    let wanted = manifest.threads.len() as u64 + 1;
    let own = procfs::thread_count().unwrap_or(1) as u64;
    if limit == u64::MAX || !lowered && wanted <= own {
        return Ok(());
    }
    let Some(uid) = uid(status) else {
        return Ok(());
    };
    if uid == 0 || has(status, CAP_SYS_ADMIN) || has(status, CAP_SYS_RESOURCE) {
        return Ok(());
    }
    let others = tasks_of(uid).saturating_sub(own);
    if others + wanted <= limit {
        return Ok(());
    }
    let reason = format!(
        "{wanted} threads are needed on the way back beside {others} others of the user, who may have {limit} (RLIMIT_NPROC)"
    );
    Err((libc::EIO, reason))
}

/// The real user id, which counts.
fn uid(status: &[u8]) -> Option<i64> {
    procfs::field(status, "Uid").and_then(procfs::number)
}

fn tasks_of(user: i64) -> u64 {
    let mut tasks = 0;
    let Ok(proc) = OwnFd::open(b"/proc") else {
        return tasks;
    };
    let mut buf = vec![0u8; 32768];
    let _ = procfs::for_each_entry(&proc, &mut buf, |name| {
        if !name.iter().all(u8::is_ascii_digit) {
            return;
        }
        let path = [b"/proc/", name, b"/status"].concat();
        let status = procfs::read_file(&path).unwrap_or_default();
        if uid(&status) == Some(user) {
            let threads = procfs::field(&status, "Threads").and_then(procfs::number);
            tasks += threads.unwrap_or(0) as u64;
        }
    });
    tasks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::state::{VmaKind, VmaState};

    const STATUS: &[u8] =
        b"Uid:\t1000\t0\t0\t0\nThreads:\t3\nCapEff:\t0000000000004000\nNoNewPrivs:\t1\n";

    #[test]
    fn what_the_status_says() {
        assert_eq!(uid(STATUS), Some(1000));
        assert!(has(STATUS, CAP_IPC_LOCK) && !has(STATUS, CAP_SYS_ADMIN));
        let mut manifest = Manifest::default();
        assert_eq!(privileges(&manifest, STATUS).unwrap_err().0, libc::EPERM);
        manifest.process.no_new_privs = true;
        assert_eq!(privileges(&manifest, STATUS), Ok(()));
        manifest.process.no_new_privs = false;
        assert_eq!(privileges(&manifest, b"NoNewPrivs:\t0\n"), Ok(()));
    }

    #[test]
    fn locked_memory_needs_its_limit() {
        let mut manifest = Manifest::default();
        let area = |end, flags| VmaState {
            start: 0x1000,
            end,
            prot: 3,
            kind: VmaKind::Anon,
            flags,
        };
        manifest.memory.vmas = vec![area(u64::MAX, 0)];
        assert_eq!(locked(&manifest, b""), Ok(()));
        manifest.memory.vmas = vec![area(u64::MAX, vma_flag::LOCKED)];
        assert_eq!(locked(&manifest, STATUS), Ok(()), "who may lock anything");
        if limits::now(libc::RLIMIT_MEMLOCK).0 < u64::MAX / 2 {
            assert_eq!(locked(&manifest, b"").unwrap_err().0, libc::EIO);
        }
    }

    #[test]
    fn tasks_are_counted() {
        let status = procfs::read_file(b"/proc/self/status").unwrap();
        let uid = uid(&status).unwrap();
        assert!(tasks_of(uid) >= procfs::thread_count().unwrap_or(1) as u64);
        assert_eq!(tasks_of(-1), 0);
    }
}
