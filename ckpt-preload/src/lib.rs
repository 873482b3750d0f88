//! libckpt.so.
