//! NETLINK_SOCK_DIAG for unix sockets: which socket is the peer, what has been
//! shut down, how long a listener's queue may be. Open to every user. Used by
//! [`super::sockets`] in the helper thread.

use super::sockopts::socket;
use super::sys::{self, Fd};

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const SHOW_PEER: u32 = 4;
const SHOW_ICONS: u32 = 8;
const SHOW_RQLEN: u32 = 0x10;
const ATTR_PEER: u16 = 2;
const ATTR_ICONS: u16 = 3;
const ATTR_RQLEN: u16 = 4;
const ATTR_SHUTDOWN: u16 = 6;
/// struct nlmsghdr, struct unix_diag_msg
const HEADER: usize = 16;

#[derive(Debug, Clone, Default)]
pub struct UnixInfo {
    /// 1 established, 7 closed, 10 listening (the TCP numbers).
    pub state: u8,
    /// 0 for none or one that has been closed.
    pub peer: u64,
    /// RCV_SHUTDOWN 1, SEND_SHUTDOWN 2.
    pub shutdown: u8,
    /// Of a listener: how many connections wait, and how many may.
    pub waiting: u32,
    pub backlog: u32,
    /// Of a listener: the inodes of the connecting sockets that wait.
    pub queued: Vec<u64>,
}

pub struct UnixDiag(Fd);

impl UnixDiag {
    pub fn open() -> Result<UnixDiag, i32> {
        socket(libc::AF_NETLINK, libc::SOCK_DGRAM, NETLINK_SOCK_DIAG).map(UnixDiag)
    }

    /// What the kernel tells of the unix socket with this inode number.
    pub fn ask(&self, ino: u64) -> Result<UnixInfo, i32> {
        let show = SHOW_PEER | SHOW_ICONS | SHOW_RQLEN;
        let mut request = Vec::with_capacity(40);
        request.extend_from_slice(&40u32.to_ne_bytes());
        request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        // struct unix_diag_req: family, protocol, pad, states, ino, show, cookie.
        request.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]);
        for word in [u32::MAX, ino as u32, show, u32::MAX, u32::MAX] {
            request.extend_from_slice(&word.to_ne_bytes());
        }
        sys::write(self.0.raw(), &request)?;
        let mut answer = vec![0u8; 65536];
        let n = sys::read(self.0.raw(), &mut answer)?;
        parse(&answer[..n])
    }
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2)
        .map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]))
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4)
        .map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

fn parse(answer: &[u8]) -> Result<UnixInfo, i32> {
    let len = (u32_at(answer, 0) as usize).min(answer.len());
    if u16_at(answer, 4) != SOCK_DIAG_BY_FAMILY {
        // NLMSG_ERROR carries a negative errno.
        let errno = (u32_at(answer, HEADER) as i32).wrapping_neg();
        return Err(if errno > 0 { errno } else { libc::EPROTO });
    }
    let mut info = UnixInfo {
        state: answer.get(HEADER + 2).copied().unwrap_or(0),
        ..UnixInfo::default()
    };
    let mut at = HEADER + 16;
    while at + 4 <= len {
        let attr_len = u16_at(answer, at) as usize;
        if attr_len < 4 || at + attr_len > len {
            break;
        }
        let body = &answer[at + 4..at + attr_len];
        match u16_at(answer, at + 2) {
            ATTR_PEER => info.peer = u64::from(u32_at(body, 0)),
            ATTR_SHUTDOWN => info.shutdown = body.first().copied().unwrap_or(0),
            ATTR_RQLEN => {
                info.waiting = u32_at(body, 0);
                info.backlog = u32_at(body, 4);
            }
            ATTR_ICONS => {
                info.queued = body
                    .chunks_exact(4)
                    .map(|b| u64::from(u32_at(b, 0)))
                    .collect();
            }
            _ => {}
        }
        at += attr_len.div_ceil(4) * 4;
    }
    Ok(info)
}
