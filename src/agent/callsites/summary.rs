//! What `ckpt status` says of the net: written once by the constructor, kept in the
//! image, read by the helper.

use super::{Report, Way};
use crate::store::report::NetReport;
use std::sync::atomic::{AtomicPtr, Ordering};

static SUMMARY: AtomicPtr<NetReport> = AtomicPtr::new(std::ptr::null_mut());

/// Keeps the installation's result.
pub fn keep(report: &Report) {
    let left_alone = |object: &super::ObjectReport| {
        let counts = object.left_alone.iter().map(|(_, count)| count);
        counts.sum::<usize>()
    };
    let sites = report
        .objects
        .iter()
        .map(super::ObjectReport::patched)
        .sum::<usize>();
    let unpatched = report.objects.iter().map(left_alone).sum::<usize>();
    let missing: Vec<String> = report
        .objects
        .iter()
        .filter_map(|object| match object.way {
            Way::Nothing(why) => Some(format!("{}: {why}", object.name)),
            _ => None,
        })
        .collect();
    let summary = NetReport {
        installed: report.covers_libc(),
        sites: sites as u32,
        unpatched: unpatched as u32,
        note: missing.join("; "),
    };
    SUMMARY.store(Box::into_raw(Box::new(summary)), Ordering::Release);
}

/// The installation's result; empty before it.
pub fn get() -> NetReport {
    // SAFETY: written once, from a Box that is never freed.
    unsafe { SUMMARY.load(Ordering::Acquire).as_ref() }
        .cloned()
        .unwrap_or_default()
}
