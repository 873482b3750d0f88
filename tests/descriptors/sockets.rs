//! Sockets.
use crate::harness::*;
pub fn cases() -> Vec<Case> {
    Vec::new()
}
