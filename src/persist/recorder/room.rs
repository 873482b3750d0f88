//! The recorder's own stack.
//!
//! Paths are built in buffers on the stack, several at once, tens of KiB in all, and the program's
//! may be small: a thread with as little as is allowed (those of aio_write), a coroutine, a handler
//! on an alternate stack. So whatever builds paths under the recorder's lock does it here. There
//! is one stack, since there is one lock; its holder has all signals blocked.

use ckpt_sys::stack::call_on;
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;

const SIZE: usize = 256 << 10;

#[repr(align(4096))]
struct Stack(UnsafeCell<[u8; SIZE]>);

// SAFETY: used by the holder of the recorder's lock alone.
unsafe impl Sync for Stack {}

static STACK: Stack = Stack(UnsafeCell::new([0; SIZE]));

struct Call<F, R> {
    function: MaybeUninit<F>,
    result: MaybeUninit<R>,
}

/// Calls `function` where there is room. With the recorder's lock held, or by the helper while
/// all other threads are held outside hooks.
pub fn with_room<F: FnOnce() -> R, R>(function: F) -> R {
    let bottom = STACK.0.get() as usize;
    let mut call = Call::<F, R> {
        function: MaybeUninit::new(function),
        result: MaybeUninit::uninit(),
    };
    let at = (&raw mut call).cast::<u8>();
    // SAFETY: the stack is this thread's as long as it holds the lock, with signals blocked;
    // `run` makes the one call and leaves its result.
    unsafe {
        if (bottom..bottom + SIZE).contains(&(at as usize)) {
            run::<F, R>(at);
        } else {
            call_on(STACK.0.get().cast::<u8>().add(SIZE), run::<F, R>, at);
        }
        call.result.assume_init()
    }
}

/// Never a part of its caller, whose frame would have the room of `function`'s buffers.
#[inline(never)]
extern "C" fn run<F: FnOnce() -> R, R>(call: *mut u8) {
    // SAFETY: what `with_room` has put there, for this one call.
    unsafe {
        let call = &mut *call.cast::<Call<F, R>>();
        let function = call.function.as_ptr().read();
        call.result.write(function());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread of `PTHREAD_STACK_MIN` has 16 KiB.
    #[test]
    fn there_is_room_in_a_small_thread() {
        #[inline(never)]
        fn deep(at: &[u8; 60_000]) -> usize {
            std::hint::black_box(at)
                .iter()
                .map(|b| usize::from(*b))
                .sum()
        }
        let small = std::thread::Builder::new().stack_size(16 << 10);
        let thread = small.spawn(|| {
            let text = String::from("kept");
            let inner = with_room(move || {
                let large = std::hint::black_box([1u8; 60_000]);
                (with_room(|| deep(&large)), text)
            });
            assert_eq!(inner, (60_000, "kept".into()));
        });
        thread.expect("a thread").join().expect("its end");
    }
}
