use super::Collector;
use crate::agent::collect::Refusal;
use crate::image::state::{DescriptorTable, FileKind};
pub(super) fn collect(c: &mut Collector, at: usize) -> Result<FileKind, Refusal> {
    Err(c.raws[at].refuse_kind("is a socket"))
}
pub(super) fn resolve(_: &Collector, _: &mut DescriptorTable) -> Result<(), Refusal> {
    Ok(())
}
