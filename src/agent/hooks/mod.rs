//! What each intercepted system call does. The call-site net (and the symbol net
//! where the first is missing) ends in [`dispatch`].

pub mod frame;
