"""Run bare and under the library by tests/python.rs, in a virtual environment into which the
module was installed. Each part is a program of its own; `ok` is its last line."""

import os
import random
import signal
import sys
import threading

import ckpt


def fails(kind, function, *arguments, **named):
    try:
        function(*arguments, **named)
    except kind as error:
        return error
    raise AssertionError(f"{function} did not raise {kind}")


def bare():
    assert not ckpt.loaded() and ckpt.generation() == 0 and ckpt.arguments() == []
    with ckpt.hold(), ckpt.hold():
        error = fails(ckpt.NotLoaded, ckpt.checkpoint)
    assert "not loaded" in str(error), error
    for call, arguments in [
        (ckpt.rollback, (1,)),
        (ckpt.exclude, ("*",)),
        (ckpt.include, ("/x",)),
        (ckpt.redirect, ("/a", "/b")),
        (ckpt.ready, ()),
        (ckpt.heartbeat, ()),
    ]:
        fails(ckpt.NotLoaded, call, *arguments)

    @ckpt.on_restore
    def never():
        raise AssertionError

    never_called = never
    assert callable(never_called)


def recovery():
    """Dies by its own hand behind the checkpoint; started again it is back there."""
    events = []
    ckpt.on_before(lambda: events.append("before"))
    ckpt.on_after(lambda: events.append("after"))

    @ckpt.on_restore
    def seed():
        events.append("restored")
        random.seed()

    random.seed(7)
    assert ckpt.generation() == 0
    with ckpt.hold():
        with ckpt.hold():
            pass
        error = fails(ckpt.Error, ckpt.checkpoint)
        assert "ckpt_hold" in str(error), error
    assert events == [], events
    ckpt.ready()
    ckpt.heartbeat()
    table = {str(n): n for n in range(100_000)}
    thread_result = []
    go = threading.Event()

    def work():
        go.wait()
        thread_result.append(sum(table.values()))

    thread = threading.Thread(target=work)
    thread.start()
    back = ckpt.checkpoint(4)
    assert ckpt.generation() == 1
    if back == 0:
        assert events == ["before", "after"], events
        print("taken", random.random(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    assert events == ["before", "restored"], events
    go.set()
    thread.join()
    assert thread_result == [4999950000]
    print("back with", back, random.random())


def handler_failure():
    @ckpt.on_before
    def broken():
        raise KeyError("from the handler")

    error = fails(KeyError, ckpt.checkpoint)
    assert "from the handler" in str(error)
    # The checkpoint itself was taken.
    assert ckpt.generation() == 1


def rollback():
    """Goes back with each way to keep something."""
    counts = ckpt.protect(bytearray(8))
    error = fails(BufferError, counts.extend, b"x")
    assert error
    fails(TypeError, ckpt.protect, b"constant")
    lost = []
    turn = ckpt.checkpoint()
    assert lost == []
    history = ckpt.kept([])
    young = ckpt.protect(bytearray(4))
    fails(ValueError, ckpt.rollback, 1, keep=young)
    error = fails(ckpt.Error, ckpt.rollback, 1, id=99)
    assert "no checkpoint with this id" in str(error), error
    lost.append(turn)
    if turn < 3:
        # An object of any kind.
        ckpt.rollback(turn + 1, keep=history + [{"turn": turn, "text": "x" * 100_000}])
    if turn == 3:
        assert [h["turn"] for h in history] == [0, 1, 2] and len(history[2]["text"]) == 100_000
        counts[:] = b"in place"
        ckpt.rollback(4, keep=counts)
    if turn == 4:
        assert counts == b"in place" and history == []
        # From another thread, with a list of buffers.
        counts[:] = b"threads!"
        threading.Thread(target=lambda: ckpt.rollback(5, keep=[counts])).start()
        signal.pause()
    assert turn == 5 and counts == b"threads!", (turn, counts)
    print("five times")


globals()[sys.argv[1]]()
print("ok")
