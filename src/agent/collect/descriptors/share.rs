//! Which descriptors share an open file description (dup, not a second open).
//! Used by [`super::collect`] with the world stopped.
//!
//! Only descriptors of the same inode and flags can share one, so the table is
//! first grouped by these and `kcmp(2)` asked within a group only: a thousand
//! different files cost no call at all. `kcmp` also orders descriptions, so a
//! group of n costs n log n calls.

use super::{Raw, Target, fdinfo, sys};
use crate::agent::collect::Refusal;

const KCMP_FILE: i32 = 0;
/// `fcntl(fd, F_DUPFD_QUERY, other)`, Linux 6.10: 1 when both are one description.
const F_DUPFD_QUERY: i32 = 1024 + 3;

/// Sets `Raw::file` of every descriptor and returns, per description, the index
/// of its lowest descriptor.
pub(crate) fn group(
    target: &Target,
    pidfd: &sys::Fd,
    raws: &mut [Raw],
) -> Result<Vec<usize>, Refusal> {
    let mut order: Vec<usize> = (0..raws.len()).collect();
    order.sort_by_key(|&i| key(&raws[i]));

    // first[i] = the lowest descriptor of i's description.
    let mut first: Vec<usize> = (0..raws.len()).collect();
    let mut start = 0;
    while start < order.len() {
        let mut end = start + 1;
        while end < order.len() && key(&raws[order[end]]) == key(&raws[order[start]]) {
            end += 1;
        }
        if end - start > 1 {
            let mut members = order[start..end].to_vec();
            members.sort_by_key(|&i| raws[i].fd);
            group_equal(target, pidfd, raws, &members, &mut first)?;
        }
        start = end;
    }

    let mut lead = Vec::new();
    for i in 0..raws.len() {
        if first[i] == i {
            raws[i].file = lead.len();
            lead.push(i);
        } else {
            raws[i].file = raws[first[i]].file;
        }
    }
    Ok(lead)
}

/// Descriptors with different keys never share a description. Anonymous inodes
/// are one inode for many kinds, so the kind's name takes part; so does the
/// identity that an eventfd shows.
fn key(raw: &Raw) -> (u64, u64, u32, &[u8], u64) {
    let anon = raw.link.starts_with(b"anon_inode:");
    let id = raw
        .info
        .value("eventfd-id")
        .map_or(0, |v| fdinfo::number(v, 10));
    let name = if anon { &raw.link[..] } else { &[] };
    (raw.stat.st_dev, raw.stat.st_ino, raw.flags(), name, id)
}

/// Partitions descriptors of equal key, given ascending by number.
fn group_equal(
    target: &Target,
    pidfd: &sys::Fd,
    raws: &[Raw],
    members: &[usize],
    first: &mut [usize],
) -> Result<(), Refusal> {
    // Representatives in kcmp's order. Searched by hand: a comparison that can
    // fail has no place in a library sort.
    let mut known: Vec<usize> = Vec::new();
    for &i in members {
        let (mut low, mut high) = (0, known.len());
        let mut same = None;
        while low < high {
            let mid = (low + high) / 2;
            match sys::kcmp(
                target.tid,
                KCMP_FILE,
                raws[i].fd,
                raws[known[mid]].fd as usize,
            ) {
                Ok(0) => {
                    same = Some(known[mid]);
                    break;
                }
                Ok(1) => high = mid,
                Ok(_) => low = mid + 1,
                // Not compiled in, or forbidden by a container's filter.
                Err(_) => return group_by_query(pidfd, raws, members, first),
            }
        }
        match same {
            Some(lead) => first[i] = lead,
            None => known.insert(low, i),
        }
    }
    Ok(())
}

/// Without kcmp: each pair asked by `F_DUPFD_QUERY`; without that, descriptors
/// whose sharing cannot be observed pass as shared, others are refused.
fn group_by_query(
    pidfd: &sys::Fd,
    raws: &[Raw],
    members: &[usize],
    first: &mut [usize],
) -> Result<(), Refusal> {
    let mut known: Vec<(usize, sys::Fd)> = Vec::new();
    for &i in members {
        let dup = sys::pidfd_getfd(pidfd.raw(), raws[i].fd)
            .map_err(|e| raws[i].refuse("cannot be examined", e))?;
        let mut same = None;
        for (lead, other) in &known {
            match sys::fcntl(dup.raw(), F_DUPFD_QUERY, other.raw() as usize) {
                Ok(1) => same = Some(*lead),
                Ok(_) => continue,
                Err(_) if raws[i].mode() == libc::S_IFCHR => same = Some(*lead),
                Err(e) => {
                    return Err(raws[i].refuse(
                        "may share its position with another one, which kcmp would tell",
                        e,
                    ));
                }
            }
            break;
        }
        match same {
            Some(lead) => first[i] = lead,
            None => {
                first[i] = i;
                known.push((i, dup));
            }
        }
    }
    Ok(())
}
