//! The last steps in the old memory: everything that the restorer needs is laid out in an area
//! that neither memory uses, and this process jumps there.
//!
//! Constructor of the new process, or the leader at a rollback, as [`super::restore`].

use super::area::{self, Area};
use super::carried::Carried;
use super::memory::Memory;
use super::{Inside, RestoreError, ahead, clocks, os, stay, tape};
use crate::agent::region::{self, Region};
use crate::agent::resume::{HelperArgs, Payload, ThreadRecord};
use crate::agent::stop::rseq_area;
use crate::image::codec;
use crate::image::state::Manifest;
use crate::store::working_set::WorkingSet;
use ckpt_sys::blob::{BLOB_THREAD_STACK, RESTORER, RestorerArgs, RestorerThread};
use ckpt_sys::syscall;
use ckpt_sys::thread::enter_restorer;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// All that was decided.
pub struct Launch {
    pub manifest: Manifest,
    pub memory: Memory,
    pub carried: Carried,
    pub clocks: clocks::Decision,
    /// Address ranges of the checkpoint.
    pub taken: Vec<(u64, u64)>,
    /// The process has the program's number.
    pub same: bool,
}

impl Launch {
    /// Into the restorer. Returns only with an error.
    pub fn go(
        self,
        inside: Option<Inside>,
        mut payload: Payload,
    ) -> Result<std::convert::Infallible, RestoreError> {
        let manifest = &self.manifest;
        let memory = &self.memory;
        let options = &memory.options;
        // Sizes first: the area must not move.
        let scratch = self.scratch_needed(inside.as_ref(), &payload)?;
        let known = memory.stay.as_ref().map(|stay| &stay.mapped[..]);
        let mut area = Area::map(scratch, &self.taken, known).map_err(RestoreError::Area)?;

        let here = clocks::here();
        let vvar_start = match self.clocks.lead {
            Some(_) if here.len > 0 => {
                area::free_place(&self.taken, here.len).ok_or(RestoreError::NoPlace)?
            }
            Some(_) => 0,
            None => manifest.memory.vvar_start,
        };
        let (led, content) = clocks::lead(manifest, &self.clocks, &here, vvar_start)?;
        payload.clocks = led;
        let led_content = content.map(|content| area.put(&content));
        let blob = area.put(RESTORER);
        let tape = self.write_tape(&mut area, led_content);
        payload.mapped.clone_from(&tape.mapped);
        payload.cold = options.cold;
        if options.cold {
            (payload.prefetch, payload.touched) =
                ahead::queue(&payload.mapped, memory.before.as_ref());
        }
        for &(file, example) in &tape.examples {
            payload.add_image_file(options.image_fds[file as usize], example);
        }
        if let Some(stay) = &memory.stay {
            payload.mapped.extend_from_slice(&stay.images);
            payload.mapped.sort_unstable();
            let files = stay::image_files(&stay.images);
            payload.image_files.extend(files);
        }

        let anew = payload.starter != 0 || inside.is_some();
        let threads = self.threads(&mut area, anew);
        let leader_exits = !threads.iter().any(|t| t.is_main != 0);
        let threads_at = area.put_slice(&threads);
        let tape_at = area.put_slice(&tape.ops);
        let stacks_at = area.take((threads.len() as u64 * BLOB_THREAD_STACK) as usize + 64);
        for (addr, bytes) in protected(inside.as_ref()) {
            let entry = (addr, bytes.len() as u64, area.put(bytes));
            payload.protected.push(entry);
        }
        let bytes = codec::encode(&payload).map_err(|e| RestoreError::Payload(e.to_string()))?;
        let payload_at = area.put(&bytes);
        // The helper drops every descriptor but the lock; the program's table drops these.
        let close_at = area.put_slice(&self.carried.keep);
        // SAFETY: the region part of the area is mapped, zero and unused; then it is one that
        // was just laid out.
        let (helper_tls, helper_stack) = unsafe {
            region::lay_out(area.region, area.region_len).map_err(RestoreError::Area)?;
            let region = area.region as *mut Region;
            if let Some(fd) = self.carried.lock {
                (*region).keep_fds[0] = fd;
            }
            if let Some(fd) = payload.watching {
                (*region).keep_fds[1] = fd;
            }
            ((*region).tls, (*region).stack_top)
        };
        let args_at = area.take(size_of::<RestorerArgs>());
        let helper_at = area.put_slice(&[HelperArgs {
            restorer: args_at,
            region: area.region,
            scratch: (area.start, area.scratch_len),
            payload: (payload_at, bytes.len() as u64),
            main_fs: manifest.threads.first().map_or(0, |t| t.fs_base),
        }]);
        let stack_at = area.take(64 << 10) + (64 << 10) - 64;
        let rseq = inside.as_ref().map_or_else(own_rseq, |inside| inside.rseq);
        let args = RestorerArgs {
            area: area.start,
            area_len: area.total_len(),
            task_size: crate::agent::collect::memory::TASK_SIZE,
            rseq: rseq.0,
            rseq_len: rseq.1 as u64,
            rseq_sig: crate::agent::collect::threads::RSEQ_SIG as u64,
            tape: tape_at,
            tape_len: tape.ops.len() as u64,
            threads: threads_at,
            nthreads: threads.len() as u64,
            thread_stacks: stacks_at,
            use_set_tid: self.same as u32,
            message_fd: 2,
            vvar_start,
            helper_stack,
            helper_tls,
            helper_entry: manifest.entry.after_restore,
            helper_arg: helper_at,
            close_fds: close_at,
            nclose_fds: self.carried.keep.len() as u64,
            ready: AtomicU32::new(0),
            go: AtomicU32::new(0),
            leader_exits: leader_exits as u32,
            leader_word: AtomicU32::new(leader_exits as u32),
            stays: memory.stay.is_some() as u64,
            share_from: tape.shared.0 as u64,
            share_to: tape.shared.1 as u64,
            share_next: AtomicU64::new(0),
            helper_busy: AtomicU32::new(0),
            played: AtomicU32::new(0),
            stage_ns: [0; 4],
        };
        // SAFETY: the room was taken above; everything the blob needs lies in the area;
        // all signals are blocked before this stack is left.
        unsafe {
            (args_at as *mut RestorerArgs).write(args);
            let everything = u64::MAX;
            syscall!(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &everything,
                0,
                8
            );
            enter_restorer(blob, args_at, stack_at & !15)
        }
    }

    /// Bytes of the area, generously.
    fn scratch_needed(
        &self,
        inside: Option<&Inside>,
        payload: &Payload,
    ) -> Result<u64, RestoreError> {
        let Memory {
            options,
            contents,
            stay,
            before,
        } = &self.memory;
        let nthreads = self.manifest.threads.len() as u64;
        let of_thread = BLOB_THREAD_STACK
            + (size_of::<RestorerThread>() + size_of::<ThreadRecord>() + 128) as u64;
        let kept: usize = protected(inside)
            .map(|(_, bytes)| bytes.len() + 64 + 3 * 10)
            .sum();
        let maps: usize = contents.iter().map(|area| area.maps.len()).sum();
        let fetched = if options.cold {
            maps + before.as_ref().map_or(0, WorkingSet::runs)
        } else {
            0
        };
        let files = options.image_fds.len();
        let images = stay.as_ref().map_or(0, |stay| stay.images.len());
        let payload_room =
            4 * codec_len(payload)? + (maps + files + 2 * (fetched + images)) as u64 * 32;
        Ok(RESTORER.len() as u64
            + tape::area_needed(&self.manifest, contents)
            + stay.as_ref().map_or(0, tape::stay::needs)
            + nthreads * of_thread
            + payload_room
            + kept as u64
            + self.manifest.clock.vdso.len() as u64
            + (256 << 10))
    }

    /// What the restorer does, in order. `vdso` is where the code of a vdso that is led
    /// elsewhere lies.
    fn write_tape(&self, area: &mut Area, vdso: Option<u64>) -> tape::Tape {
        let Memory {
            options,
            contents,
            stay,
            ..
        } = &self.memory;
        let mut tape = tape::Tape::default();
        if let Some(stay) = stay {
            tape::stay::write(&mut tape, stay, options, area);
        }
        let shared_fd = |k: usize| self.carried.shared[k];
        tape::memory(
            &mut tape,
            &self.manifest,
            contents,
            options,
            area,
            &shared_fd,
            &can_write,
        );
        if let Some(content) = vdso {
            clocks::place(&mut tape, &self.manifest, content);
        }
        for work in &self.carried.late {
            tape::process::late(&mut tape, work, area);
        }
        tape::process::attributes(&mut tape, &self.manifest, area);
        tape
    }

    /// The threads, as the restorer makes them. `anew`: of a new process, or at a rollback.
    fn threads(&self, area: &mut Area, anew: bool) -> Vec<RestorerThread> {
        let Manifest {
            threads,
            privileges,
            entry,
            process,
            ..
        } = &self.manifest;
        let switches = |k: usize| privileges.threads.get(k).copied().unwrap_or_default();
        let records: Vec<_> = threads
            .iter()
            .enumerate()
            .map(|(k, t)| ThreadRecord::of(t, switches(k), anew))
            .collect();
        let records = area.put_slice(&records);
        threads
            .iter()
            .enumerate()
            .map(|(k, t)| RestorerThread {
                tid: t.tid,
                new_tid: 0,
                fs_base: t.fs_base,
                gs_base: t.gs_base,
                robust_list: t.robust_list,
                robust_list_len: t.robust_list_len,
                clear_child_tid: t.clear_child_tid,
                rseq: t.rseq,
                rseq_len: t.rseq_len,
                rseq_sig: t.rseq_sig,
                entry: entry.resume_thread,
                entry_stack: t.resume_stack,
                entry_arg: [
                    t.ucontext,
                    t.interrupted,
                    records + (k * size_of::<ThreadRecord>()) as u64,
                ],
                is_main: (t.tid == process.pid) as u32,
                pad: 0,
            })
            .collect()
    }
}

/// The regions that keep their bytes.
fn protected(inside: Option<&Inside>) -> impl Iterator<Item = (u64, &[u8])> {
    inside
        .into_iter()
        .flat_map(|inside| inside.protected.parts())
}

fn codec_len(payload: &Payload) -> Result<u64, RestoreError> {
    Ok(codec::encode(payload)
        .map_err(|e| RestoreError::Payload(e.to_string()))?
        .len() as u64)
}

/// glibc's rseq registration of this very thread.
fn own_rseq() -> (u64, u32) {
    let mut fs = 0u64;
    // SAFETY: the kernel fills one word (ARCH_GET_FS).
    unsafe { syscall!(libc::SYS_arch_prctl, 0x1003, &mut fs) };
    rseq_area(fs)
}

fn can_write(path: &[u8]) -> bool {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(os(path))
        .is_ok()
}
