//! Which descriptors share an open file description (dup, not a second open).
//! Used by [`super::collect`] with the world stopped.
//!
//! Only descriptors of the same inode and flags can share one, so the table is
//! first grouped by these and `kcmp(2)` asked within a group only: a thousand
//! different files cost no call at all. `kcmp` also orders descriptions, so a
//! group of n costs n log n calls.

use super::{Raw, Target, fdinfo, handed, sys};
use crate::agent::collect::Refusal;

const KCMP_FILE: i32 = 0;
/// `fcntl(fd, F_DUPFD_QUERY, other)`, Linux 6.10: 1 when both are one description.
const F_DUPFD_QUERY: i32 = 1024 + 3;
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

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

/// Do two descriptors share the signal of `F_SETSIG`, which is the description's? It is changed
/// for a moment, to one that nobody notices, should the description send one just then.
fn is_marked_too(one: &sys::Fd, other: &sys::Fd) -> Result<bool, i32> {
    let signal_of = |fd: &sys::Fd| sys::fcntl(fd.raw(), F_GETSIG, 0);
    let was = signal_of(one)?;
    if signal_of(other)? != was {
        return Ok(false);
    }
    let mark = match was as i32 {
        libc::SIGURG => libc::SIGWINCH,
        _ => libc::SIGURG,
    };
    sys::fcntl(one.raw(), F_SETSIG, mark as usize)?;
    let theirs = signal_of(other);
    sys::fcntl(one.raw(), F_SETSIG, was)?;
    Ok(theirs? == mark as usize)
}

/// Without kcmp: each pair asked by `F_DUPFD_QUERY`, or by a mark; where neither is possible,
/// descriptors whose sharing cannot be observed pass as shared, others are refused.
fn group_by_query(
    pidfd: &sys::Fd,
    raws: &[Raw],
    members: &[usize],
    first: &mut [usize],
) -> Result<(), Refusal> {
    let mut known: Vec<(usize, sys::Fd)> = Vec::new();
    for &i in members {
        let dup = handed::copy(pidfd.raw(), raws[i].fd)
            .map_err(|e| raws[i].refuse("cannot be examined", e))?;
        let mut same = None;
        for (lead, other) in &known {
            let query = sys::fcntl(dup.raw(), F_DUPFD_QUERY, other.raw() as usize);
            match query
                .map(|answer| answer == 1)
                .or_else(|_| is_marked_too(&dup, other))
            {
                Ok(true) => same = Some(*lead),
                Ok(false) => continue,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    /// A container without kcmp, on a kernel before 6.10: `./app > log 2>&1` got no checkpoint.
    #[test]
    fn a_mark_tells_duplicates_from_other_openings() {
        in_child(|| {
            let open = || sys::open(b"/dev/null", libc::O_RDWR, 0).unwrap();
            let (one, other) = (open(), open());
            let same = sys::Fd::own(sys::dup_above(one.raw(), 0).unwrap());
            for before in [0, libc::SIGURG] {
                sys::fcntl(one.raw(), F_SETSIG, before as usize).unwrap();
                sys::fcntl(other.raw(), F_SETSIG, before as usize).unwrap();
                assert_eq!(is_marked_too(&one, &same), Ok(true));
                assert_eq!(is_marked_too(&one, &other), Ok(false));
                assert_eq!(sys::fcntl(same.raw(), F_GETSIG, 0), Ok(before as usize));
            }
        });
    }
}
