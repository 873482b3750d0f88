//! placeholder
pub fn disable(_r: &'static str) {}
pub fn disabled() -> Option<&'static str> { None }
pub fn set_wake(_w: Option<fn()>) {}
pub fn noted_reason() -> Option<&'static str> { None }
