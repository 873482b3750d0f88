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
        (ckpt.rollback, (1, "kept")),
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


def arguments():
    """An id or value of more than 32 bits was cut to another one; a NUL byte cut a path; an
    empty one meant the directory; `*` as bytes meant the files of the directory; and what a
    refused rollback would have kept was there, as if it had come through."""
    os.mkdir("work")
    os.chdir("work")
    for name in ["", "a\0b", b"/a\0b"]:
        fails(ValueError, ckpt.exclude, name)
        fails(ValueError, ckpt.include, name)
        fails(ValueError, ckpt.redirect, "a", name)
        fails(ValueError, ckpt.redirect, name, "a")
    fails(TypeError, ckpt.exclude, None)
    ckpt.exclude(b"*")
    ckpt.include("undone")
    buffer = ckpt.protect(bytearray(1))
    turn = ckpt.checkpoint(3)
    for number in [1 << 31, (1 << 32) + 3, -(1 << 31) - 1]:
        fails(OverflowError, ckpt.checkpoint, number)
        fails(OverflowError, ckpt.rollback, number)
        fails(OverflowError, ckpt.rollback, 1, id=number)
    fails(TypeError, ckpt.rollback, 1.5)
    error = fails(ckpt.Error, ckpt.checkpoint, -1)
    assert "argument" in str(error), error
    if turn == 0:
        with open("left", "w") as left, open("undone", "w") as undone:
            left.write("x"), undone.write("x")
        assert ckpt.kept() is None
        with ckpt.hold():
            fails(ckpt.Error, ckpt.rollback, 1, keep={"a": 1}, id=3)
        assert ckpt.kept() is None, ckpt.kept()
        ckpt.rollback(1, keep=["long" * 1000], id=3)
    if turn == 1:
        assert os.listdir() == ["left"], os.listdir()
        with ckpt.hold():
            fails(ckpt.Error, ckpt.rollback, 1, keep="b", id=3)
        assert ckpt.kept() == ["long" * 1000], ckpt.kept()
        buffer[0] = 65
        # The latest, whatever its id.
        ckpt.rollback(2, keep=buffer, id=-1)
    assert turn == 2 and buffer == b"A", (turn, buffer)


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
