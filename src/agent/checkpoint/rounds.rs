//! The rounds of the helper thread: waits, and does what is due: a checkpoint, a going back,
//! a report, a slice of a merge, a moment's prefetch.

use super::{CheckpointError, Trigger, Worker, interval_ns};
use crate::agent::collect::identity;
use crate::agent::prefetch::Prefetch;
use crate::agent::stop::now_ns;
use crate::agent::{ballast, children, ending, exit, interface, log, refusal, request};
use crate::persist::table;
use std::sync::atomic::Ordering;

/// When a postponed checkpoint is tried again: a look is one system call, and a program
/// that starts one short child after the other leaves only small gaps between them.
fn retry_delay(tried: u32) -> u64 {
    (2_000_000 * (1 + u64::from(tried) / 32)).min(50_000_000)
}

/// Postponed so often in a row, a reason is more than a child that ends in a moment.
const LASTING: u32 = 32;

impl Worker {
    /// One round: waits, does what is wanted. False when the helper shall end.
    pub fn step(&mut self) -> bool {
        let now = now_ns();
        let merge = self.merger.due();
        let prefetch = self.prefetch.as_ref().map(Prefetch::due);
        let next = [self.due_ns, self.retry_ns, merge, prefetch];
        let next = next.into_iter().flatten();
        let next = next.fold(self.look_ns, u64::min);
        let wanted = request::wait(Some(next.saturating_sub(now)));
        if refusal::RETIRE.load(Ordering::SeqCst) {
            request::want_childless(false);
            self.last_words();
            return false;
        }
        let now = now_ns();
        table::alive(identity::realtime_ns() as i64);
        if let Some(soon) = ending::hint() {
            self.look_ns = self.look_ns.min(now + soon);
        }
        if now >= self.look_ns {
            self.look_ns = now + ending::look();
        }
        self.rollbacks();
        let clock = self.due_ns.is_some_and(|due| now >= due);
        let childless = wanted & request::CHILDLESS != 0;
        let retry = self.retry_ns.is_some_and(|due| now >= due || childless);
        let call = request::inserted_call().is_some();
        self.asked.extend(request::take_asked(request::CHECKPOINT));
        if call || wanted & request::CHECKPOINT != 0 || clock || retry {
            let trigger = if call {
                Trigger::Call
            } else if wanted & request::CHECKPOINT != 0 {
                Trigger::Command
            } else if clock {
                Trigger::Clock
            } else {
                self.retried
            };
            self.checkpoint(trigger);
            // A thread that would have a child has waited for this; others follow at the next try.
            let waits = !childless && self.retry_ns.is_some();
            request::want_childless(waits && children::none_alive().is_err());
        }
        if wanted & request::REPORT != 0 {
            for nonce in request::take_asked(request::REPORT) {
                self.report.answer(nonce, None, None);
            }
            self.write_report();
        }
        self.merge();
        self.prefetch();
        true
    }

    /// After a lazy restore: a moment's work ahead of the program.
    fn prefetch(&mut self) {
        if let Some(prefetch) = self.prefetch.as_mut().filter(|p| now_ns() >= p.due())
            && exit::enter_store()
        {
            if !prefetch.slice(self.claimed.as_ref().map(|claimed| &claimed.job)) {
                self.prefetch = None;
            }
            exit::leave_store();
        }
    }

    /// A slice of the merge under way.
    fn merge(&mut self) {
        let longest = self.settings.config.chain;
        let due = self.merger.due().is_some_and(|due| now_ns() >= due);
        if let Some(claimed) = self.claimed.as_mut().filter(|_| due)
            && exit::enter_store()
        {
            if self.merger.slice(&mut claimed.job, longest) {
                let (keep, now) = (self.settings.config.keep, identity::realtime_ns());
                if let Err(error) = claimed.job.prune(keep, self.last_generation, now) {
                    log::line(format_args!("{error}"));
                }
            }
            exit::leave_store();
        }
    }

    fn checkpoint(&mut self, trigger: Trigger) {
        let answering = !self.asked.is_empty();
        ballast::drop();
        let result = self.try_checkpoint(trigger);
        ballast::take();
        let now = now_ns();
        if let Some(ns) = interval_ns(self.settings, &self.pace)
            && self.due_ns.is_some_and(|due| now >= due)
        {
            self.due_ns = Some(now + ns);
        }
        self.retry_ns = None;
        match result {
            Ok(generation) => {
                self.forget_refusal();
                self.postponed = 0;
                self.last_generation = Some(generation);
                interface::committed(generation);
                self.report.last_generation = Some(generation);
                self.report.last_checkpoint_ns = identity::realtime_ns();
                self.report.checkpoints += 1;
                request::answer_call(self.included, 1);
                for nonce in std::mem::take(&mut self.asked) {
                    self.report.answer(nonce, Some(generation), None);
                }
            }
            Err(CheckpointError::Postponed(reason)) => {
                // The caller of ckpt_checkpoint is told; the clock and the command wait.
                request::answer(-libc::EAGAIN);
                if trigger != Trigger::Call {
                    self.retry_ns = Some(now + retry_delay(self.postponed));
                    self.retried = trigger;
                    self.postponed = self.postponed.saturating_add(1);
                }
                // Noted once: the child that is meant may be another one each time.
                self.refuse(reason, trigger, self.postponed == LASTING);
                return;
            }
            Err(CheckpointError::Refused(reason)) => {
                request::answer(-libc::EAGAIN);
                self.fail_asked(&reason);
                self.refuse(reason, trigger, true);
            }
            Err(CheckpointError::Store(reason)) => {
                request::answer(-libc::EIO);
                self.fail_asked(&reason);
                self.refuse(reason, trigger, true);
            }
        }
        if trigger == Trigger::Command || answering {
            self.write_report();
        }
    }
}
