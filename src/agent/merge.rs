//! Merging in the background: the helper thread copies in slices between its other work
//! (`store::merge` knows how), and steps aside for the program.
//!
//! A slice is a millisecond or two, then the helper pauses: shortly where a processor was
//! free for it, long where it had to wait for one. It runs as SCHED_IDLE where the kernel
//! lets a thread leave that class again (the right to raise one's priority), else as
//! SCHED_BATCH; input and output have the idle class.
//!
//! Helper thread only.

use crate::agent::collect::identity;
use crate::agent::snapshot::Outcome;
use crate::agent::snapshot::fork::{self, WriterError};
use crate::agent::stop::now_ns;
use crate::agent::{exit, headroom, log, procfs};
use crate::store::generation::{MergedMember, chain_length};
use crate::store::{Job, Merge, RawFs};
use ckpt_sys::syscall;

/// Work at a time, in wall time; and when the chain has nearly reached its limit.
const SLICE_NS: u64 = 2_000_000;
const URGENT_SLICE_NS: u64 = 10_000_000;
/// So little is copied without pauses.
const SMALL: u64 = 8 << 20;
/// A pause is so many times as long as the slice before it: with a free processor, and
/// without.
const PAUSE_FREE: u64 = 1;
const PAUSE_BUSY: u64 = 20;
/// Of a slice: more time than that on the run queue, and processors are scarce.
const WAITED: u64 = 5;
/// After a failure so many further generations are left alone.
const AFTER_FAILURE: u64 = 8;

/// The merge under way, if any.
#[derive(Debug)]
pub struct Merger {
    merge: Option<Merge<RawFs>>,
    /// CLOCK_MONOTONIC of the next slice.
    due_ns: u64,
    began_ns: u64,
    /// The time that slices took.
    work_ns: u64,
    /// No generation below this one is tried.
    not_below: u64,
    class: Class,
}

impl Merger {
    pub fn new() -> Merger {
        Merger {
            merge: None,
            due_ns: 0,
            began_ns: 0,
            work_ns: 0,
            not_below: 0,
            class: Class::find(),
        }
    }

    /// When [`Merger::slice`] wants to be called; `None`: there is nothing to do.
    pub fn due(&self) -> Option<u64> {
        self.merge.as_ref().map(|_| self.due_ns)
    }

    /// After a generation was published: has the chain become long enough to be merged?
    pub fn look(&mut self, job: &Job<RawFs>, longest: u32) {
        let records = job.generations();
        if let Some(merge) = &self.merge {
            if records.iter().any(|r| r.generation == merge.generation) {
                return;
            }
            // The program took a complete checkpoint, and the chain went.
            self.give_up();
        }
        let Some(newest) = records.last().map(|r| r.generation) else {
            return;
        };
        if newest < self.not_below
            || chain_length(&records, newest).unwrap_or(0) < longest.div_ceil(2).max(1)
        {
            return;
        }
        match job.begin_merge(newest) {
            Ok(merge) => {
                self.began_ns = now_ns();
                self.due_ns = self.began_ns;
                self.work_ns = 0;
                self.merge = Some(merge);
            }
            Err(error) => {
                log::line(format_args!("{error}"));
                self.not_below = newest + AFTER_FAILURE;
            }
        }
    }

    /// Works for a moment; `true`: a generation has become complete.
    pub fn slice(&mut self, job: &mut Job<RawFs>, longest: u32) -> bool {
        let Some(merge) = &mut self.merge else {
            return false;
        };
        if headroom::file_size_is_limited() && merge.members() == 1 {
            return self.by_child(job);
        }
        let started = now_ns();
        // The increments that the program makes meanwhile come near the limit.
        let records = job.generations();
        let newest = records.last().map_or(0, |r| r.generation);
        let urgent = chain_length(&records, newest).unwrap_or(0) * 4 >= longest * 3;
        drop(records);
        let waited = run_delay_ns();
        let most = if urgent { URGENT_SLICE_NS } else { SLICE_NS };
        let small = merge.progress().1 <= SMALL;
        let gentle = (!urgent).then(|| Gentle::new(self.class));
        let result = loop {
            match merge.slice(&RawFs) {
                Ok(false) if now_ns() - started < most => {}
                other => break other,
            }
        };
        drop(gentle);
        let took = now_ns() - started;
        self.work_ns += took;
        let busy = run_delay_ns().saturating_sub(waited) > took / WAITED;
        let pause = match (urgent, busy) {
            (true, _) => 0,
            _ if small => 0,
            (false, true) => PAUSE_BUSY,
            (false, false) => PAUSE_FREE,
        };
        self.due_ns = started + took + took * pause;
        match result {
            Ok(false) => false,
            Ok(true) => self.finish(job, None),
            Err(error) => {
                log::line(format_args!("{error}"));
                self.fail();
                false
            }
        }
    }

    /// RLIMIT_FSIZE is the program's, and holds for all its threads, ours included: a child whose
    /// limit is its own writes the image at one go. Meanwhile nothing else is done.
    fn by_child(&mut self, job: &mut Job<RawFs>) -> bool {
        let Some(merge) = &mut self.merge else {
            return false;
        };
        let class = self.class;
        let started = now_ns();
        let child = fork::fork(&mut || {
            let _gentle = Gentle::new(class);
            let members = merge.complete(&RawFs)?;
            let member = members.first().copied().unwrap_or_default();
            Ok(Outcome {
                bytes_stored: member.bytes,
                header_crc: member.header_crc,
                ..Outcome::default()
            })
        });
        let result = match child {
            Some(child) => child.wait(),
            None => Err(WriterError::Failed("merge: cannot fork".to_owned())),
        };
        self.work_ns += now_ns() - started;
        match result {
            Ok(outcome) => {
                let member = MergedMember {
                    bytes: outcome.bytes_stored,
                    header_crc: outcome.header_crc,
                };
                self.finish(job, Some(vec![member]))
            }
            Err(error) => {
                if !exit::exiting() {
                    log::line(format_args!("{error} (under the program's RLIMIT_FSIZE)"));
                }
                self.fail();
                false
            }
        }
    }

    /// The rest is one sync of what the disk mostly has by now.
    fn finish(&mut self, job: &mut Job<RawFs>, complete: Option<Vec<MergedMember>>) -> bool {
        let Some(merge) = self.merge.take() else {
            return false;
        };
        let (generation, (_, total)) = (merge.generation, merge.progress());
        match merge.finish_with(job, identity::realtime_ns(), complete) {
            Ok(_) => {
                log::line(format_args!(
                    "generation {generation}: merged, {} KiB, {} ms of work in {} ms",
                    total >> 10,
                    self.work_ns / 1_000_000,
                    (now_ns() - self.began_ns) / 1_000_000,
                ));
                true
            }
            Err(error) => {
                log::line(format_args!("{error}"));
                self.not_below = generation + AFTER_FAILURE;
                false
            }
        }
    }

    fn fail(&mut self) {
        if let Some(merge) = &self.merge {
            self.not_below = merge.generation + AFTER_FAILURE;
        }
        self.give_up();
    }

    fn give_up(&mut self) {
        if let Some(merge) = self.merge.take()
            && exit::enter_store()
        {
            merge.abort(&RawFs);
            exit::leave_store();
        }
    }
}

impl Default for Merger {
    fn default() -> Merger {
        Merger::new()
    }
}

/// The scheduling class of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Idle,
    Batch,
    /// The helper inherited a real-time class, say: left alone.
    Same,
}

const SCHED_OTHER: i32 = libc::SCHED_OTHER;

impl Class {
    /// A thread without privilege that has become SCHED_IDLE stays it: the kernel treats
    /// leaving it as raising the nice value above the lowest one.
    fn find() -> Class {
        const RLIMIT_NICE: u32 = libc::RLIMIT_NICE;
        const CAP_SYS_NICE: u32 = 23;
        let mut limit = [0u64; 2];
        let header = [0x2008_0522u32, 0]; // _LINUX_CAPABILITY_VERSION_3, this thread
        let mut caps = [[0u32; 3]; 2];
        // SAFETY: valid structs.
        let (policy, nice) = unsafe {
            syscall!(libc::SYS_prlimit64, 0, RLIMIT_NICE, 0, &mut limit);
            syscall!(libc::SYS_capget, &header, &mut caps);
            let policy = syscall!(libc::SYS_sched_getscheduler, 0);
            // The raw call returns 20 - nice.
            let nice = syscall!(libc::SYS_getpriority, libc::PRIO_PROCESS, 0);
            (policy as i32, nice as u64)
        };
        if policy != SCHED_OTHER {
            return Class::Same;
        }
        let capable = caps[0][0] & (1 << CAP_SYS_NICE) != 0;
        if capable || limit[0] >= nice {
            Class::Idle
        } else {
            Class::Batch
        }
    }
}

/// As long as it lives this thread gives way to others.
struct Gentle(Class);

fn set_policy(policy: i32) {
    let priority = 0i32;
    // SAFETY: a valid struct sched_param; this thread.
    unsafe { syscall!(libc::SYS_sched_setscheduler, 0, policy, &priority) };
}

fn set_io_priority(value: u64) {
    const IOPRIO_WHO_PROCESS: u32 = 1;
    // SAFETY: no pointers; this thread.
    unsafe { syscall!(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) };
}

impl Gentle {
    fn new(class: Class) -> Gentle {
        match class {
            Class::Idle => set_policy(libc::SCHED_IDLE),
            Class::Batch => set_policy(libc::SCHED_BATCH),
            Class::Same => {}
        }
        const IDLE_CLASS: u64 = 3 << 13;
        set_io_priority(IDLE_CLASS);
        Gentle(class)
    }
}

impl Drop for Gentle {
    fn drop(&mut self) {
        set_io_priority(0);
        if self.0 != Class::Same {
            set_policy(SCHED_OTHER);
        }
    }
}

/// How long this thread has waited for a processor, so far.
fn run_delay_ns() -> u64 {
    let text = procfs::read_file(b"/proc/thread-self/schedstat").unwrap_or_default();
    let mut fields = text.split(|&b| b == b' ');
    let delay = fields.nth(1).and_then(procfs::number);
    delay.unwrap_or(0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_thread_gets_its_class_back() {
        let class = Class::find();
        let policy = || {
            // SAFETY: no pointers.
            unsafe { syscall!(libc::SYS_sched_getscheduler, 0) as i32 }
        };
        let before = policy();
        let gentle = Gentle::new(class);
        if class != Class::Same {
            assert_ne!(policy(), before);
        }
        drop(gentle);
        assert_eq!(policy(), before);
        assert!(run_delay_ns() < u64::MAX / 2);
    }
}
