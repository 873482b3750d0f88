//! Going back in the running process: who asked, and the generation of the state that is
//! left (`CKPT_UNDO`). The way itself is [`crate::agent::rollback`].

use super::{CheckpointError, Trigger, Worker};
use crate::agent::collect::identity;
use crate::agent::rollback::order::{self, Refused, Wanted, Which};
use crate::agent::{ballast, log, request, rollback};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

impl Worker {
    /// Goes back if that is wanted; what is refused is answered.
    pub(super) fn rollbacks(&mut self) {
        if let Some(nonce) = rollback::ask::granted() {
            self.report.answer(nonce, self.last_generation, None);
            self.write_report();
        }
        if let Some(call) = rollback::call::pending() {
            let refused = self.roll_back(&Wanted {
                which: Which::Id(call.id),
                value: call.value,
                regions: (call.regions, call.nregions),
                ..self.wanted(&[])
            });
            rollback::call::answer(-refused.errno);
        }
        let nonces = request::take_asked(request::ROLLBACK);
        for (k, &nonce) in nonces.iter().enumerate() {
            let root = PathBuf::from(std::ffi::OsStr::from_bytes(&self.settings.store_root));
            let reason = match rollback::ask::read(&root, nonce) {
                Ok(wanted) => {
                    let rest = self.wanted(&nonces[k + 1..]);
                    let wanted = Wanted {
                        open: rest.open,
                        answers: rest.answers,
                        ..wanted
                    };
                    self.roll_back(&wanted).reason
                }
                Err(reason) => reason,
            };
            self.report.answer(nonce, None, Some(reason));
            self.write_report();
        }
    }

    /// What the life after it needs to know of the command's requests: these are still to be
    /// carried out.
    fn wanted(&self, rollbacks: &[u32]) -> Wanted {
        let rollbacks = rollbacks
            .iter()
            .map(|&n| request::entry(request::ROLLBACK, n));
        let others = self.asked.iter();
        let others = others.map(|&n| request::entry(request::CHECKPOINT, n));
        Wanted {
            open: rollbacks.chain(others).collect(),
            answers: self.report.requests.clone(),
            ..Wanted::default()
        }
    }

    /// Returns when it is refused.
    fn roll_back(&mut self, wanted: &Wanted) -> Refused {
        if let Some(prefetch) = self.prefetch.as_mut() {
            prefetch.unwatch();
        }
        ballast::drop();
        let keep = self.settings.config.undo || wanted.which == Which::Left;
        let kept = match keep {
            true => self
                .keep_state(wanted)
                .map(|(wanted, left)| (wanted, Some(left))),
            false => Ok((wanted.clone(), None)),
        };
        let refused = match kept {
            Ok((wanted, left)) => {
                let increments = &mut self.increments;
                order::go_back(
                    self.settings,
                    self.claimed.as_mut(),
                    increments,
                    &wanted,
                    left,
                )
            }
            Err(refused) => refused,
        };
        ballast::take();
        log::line(format_args!("rollback refused: {}", refused.reason));
        refused
    }

    /// Before going back: a generation of the state that will be left.
    fn keep_state(&mut self, wanted: &Wanted) -> Result<(Wanted, u64), Refused> {
        let to = order::check(self.settings, self.claimed.as_ref(), wanted)?;
        self.going_to = Some(to);
        ballast::drop();
        let taken = self.try_checkpoint(Trigger::Undo);
        ballast::take();
        self.going_to = None;
        self.included = std::ptr::null();
        let left = taken.map_err(|error| Refused {
            errno: match error {
                CheckpointError::Store(_) => libc::EIO,
                _ => libc::EAGAIN,
            },
            reason: format!("the state that is left cannot be kept (CKPT_UNDO): {error}"),
        })?;
        self.last_generation = Some(left);
        self.report.last_generation = Some(left);
        self.report.last_checkpoint_ns = identity::realtime_ns();
        self.report.checkpoints += 1;
        let wanted = Wanted {
            which: Which::Generation(to),
            ..wanted.clone()
        };
        Ok((wanted, left))
    }
}
