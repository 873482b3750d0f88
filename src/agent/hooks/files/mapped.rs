//! mmap of a regular file, shared and writable: the stores that will modify it are seen by
//! nobody, so what the mapped part holds is recorded before. Any thread.

use super::data::{finish, look};
use super::guard::Recording;
use super::shared;
use crate::agent::hooks::frame::{CallFrame, Verdict};

pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let [_, len, prot, flags, fd, offset] = f.args;
    let (prot, flags) = (prot as i32, flags as i32);
    let is_shared = matches!(
        flags & libc::MAP_TYPE,
        libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE
    );
    if f.rax != libc::SYS_mmap || !is_shared || flags & libc::MAP_ANONYMOUS != 0 {
        return None;
    }
    if prot & libc::PROT_WRITE == 0 {
        shared::note_read_only();
        return None;
    }
    let mut recording = Recording::begin()?;
    let open = look(&mut recording, fd as i32)?;
    let end = offset.saturating_add(len).min(open.stat.size);
    recording
        .session
        .before_write(&open.file(), offset, end.max(offset));
    // Before the call, in case a kill comes after it and before this.
    recording.session.mapped(&open.stat.id);
    finish(f, recording, &open)
}
