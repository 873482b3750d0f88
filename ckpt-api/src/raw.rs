//! The C interface, looked up in the running process: there is nothing to link, and a symbol
//! that is missing is an answer. `dlsym` caches nothing here: a call is rare and dear itself.

use std::ffi::{CStr, OsString, c_char, c_int, c_long, c_void};
use std::os::unix::ffi::OsStringExt;

pub const ENOSYS: c_int = 38;
pub const EIO: c_int = 5;

/// `struct ckpt_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Region {
    pub addr: *mut c_void,
    pub len: usize,
}

pub type Handler = unsafe extern "C" fn(c_int, *mut c_void);

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, symbol: *const c_char) -> *mut c_void;
    fn __errno_location() -> *mut c_int;
}

/// errno of the calling thread.
pub fn errno() -> c_int {
    // SAFETY: glibc's own accessor.
    unsafe { *__errno_location() }
}

/// The address of a function of libckpt.so in this process.
pub fn find(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a null handle is RTLD_DEFAULT: the whole process is searched.
    let found = unsafe { dlsym(std::ptr::null_mut(), name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

macro_rules! function {
    ($name:expr, fn($($t:ty),*) -> $r:ty, ($($a:expr),*)) => {
        find($name).map(|found| {
            // SAFETY: ckpt.h declares this name with this signature; arguments are valid for
            // the duration of the call.
            unsafe {
                let call: unsafe extern "C" fn($($t),*) -> $r = std::mem::transmute(found);
                call($($a),*)
            }
        })
    };
}

pub fn call(name: &CStr) -> Option<c_int> {
    function!(name, fn() -> c_int, ())
}

pub fn call_int(name: &CStr, argument: c_int) -> Option<c_int> {
    function!(name, fn(c_int) -> c_int, (argument))
}

pub fn call_text(name: &CStr, text: &CStr) -> Option<c_int> {
    function!(name, fn(*const c_char) -> c_int, (text.as_ptr()))
}

pub fn call_texts(name: &CStr, a: &CStr, b: &CStr) -> Option<c_int> {
    let (a, b) = (a.as_ptr(), b.as_ptr());
    function!(name, fn(*const c_char, *const c_char) -> c_int, (a, b))
}

pub fn rollback(id: c_int, value: c_int, regions: &[Region]) -> Option<c_int> {
    let (first, count) = (regions.as_ptr(), regions.len());
    function!(
        c"ckpt_rollback",
        fn(c_int, c_int, *const Region, usize) -> c_int,
        (id, value, first, count)
    )
}

pub fn on(event: c_int, handler: Handler, argument: *mut c_void) -> Option<c_int> {
    function!(
        c"ckpt_on",
        fn(c_int, Handler, *mut c_void) -> c_int,
        (event, handler, argument)
    )
}

pub fn generation() -> Option<c_long> {
    function!(c"ckpt_generation", fn() -> c_long, ())
}

pub fn argument(index: c_int) -> Option<OsString> {
    let text = function!(c"ckpt_argument", fn(c_int) -> *const c_char, (index))?;
    if text.is_null() {
        return None;
    }
    // SAFETY: a string that stays until the process goes back.
    let bytes = unsafe { CStr::from_ptr(text) }.to_bytes().to_vec();
    Some(OsString::from_vec(bytes))
}

pub fn strerror(errno: c_int) -> Option<&'static CStr> {
    let text = function!(c"ckpt_strerror", fn(c_int) -> *const c_char, (errno))?;
    // SAFETY: the texts are constants of the library.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) })
}
