//! Recovery: `image::state` structs -> kernel state. Run by the constructor of
//! the new process (one thread, before main).

pub mod descriptors;
