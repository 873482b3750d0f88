use super::{RestoreError, Restorer};
use crate::agent::collect::descriptors::sys::Fd;
pub(super) fn make(r: &mut Restorer, file: usize) -> Result<(), RestoreError> {
    Err(r.fail(file, "socket", libc::EINVAL))
}
pub(super) fn finish(_: &mut Restorer) -> Result<(), RestoreError> {
    Ok(())
}
pub(super) fn ended_unix() -> Result<Fd, i32> {
    Err(libc::EINVAL)
}
