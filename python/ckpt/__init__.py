"""Checkpoints and rollback of a Python program under libckpt.so.

The program runs under ``ckpt run`` (or ``LD_PRELOAD=libckpt.so``); this module finds the
library in its own process and needs no compiler. Without the library every call raises
:class:`NotLoaded`; only :func:`loaded`, :func:`generation` (0), :func:`arguments` (empty),
:func:`kept`, :func:`protect`, the decorators and ``with hold()`` do nothing instead, so that a
program can have them unconditionally.

    import ckpt

    back = ckpt.checkpoint()        # 0: taken; > 0: the process has come back here
    ...
    ckpt.rollback(back + 1, keep=tries)

After a rollback *everything* in the process is as it was at the checkpoint: every object,
every thread, every open file. Only what is named by ``keep`` comes through.
"""

import ctypes
import errno as _errno
import mmap as _mmap
import operator as _operator
import os as _os
import pickle as _pickle
import resource as _resource

__all__ = [
    "Error", "NotLoaded", "Hold", "arguments", "checkpoint", "exclude", "generation",
    "heartbeat", "hold", "include", "kept", "loaded", "on_after", "on_before",
    "on_restore", "protect", "ready", "redirect", "rollback",
]

BEFORE, AFTER, RESTORED = 1, 2, 3

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)


class _Region(ctypes.Structure):
    _fields_ = [("addr", ctypes.c_void_p), ("len", ctypes.c_size_t)]


class Error(OSError):
    """A call that the library refused; ``errno`` and a text of its own."""


class NotLoaded(Error):
    """libckpt.so is not loaded: start the program with ``ckpt run``."""


_SIGNATURES = {
    "ckpt_checkpoint": (ctypes.c_int, [ctypes.c_int]),
    "ckpt_rollback": (
        ctypes.c_int,
        [ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Region), ctypes.c_size_t],
    ),
    "ckpt_exclude": (ctypes.c_int, [ctypes.c_char_p]),
    "ckpt_include": (ctypes.c_int, [ctypes.c_char_p]),
    "ckpt_redirect": (ctypes.c_int, [ctypes.c_char_p, ctypes.c_char_p]),
    "ckpt_hold": (ctypes.c_int, []),
    "ckpt_release": (ctypes.c_int, []),
    "ckpt_on": (ctypes.c_int, [ctypes.c_int, _HANDLER, ctypes.c_void_p]),
    "ckpt_ready": (ctypes.c_int, []),
    "ckpt_heartbeat": (ctypes.c_int, []),
    "ckpt_generation": (ctypes.c_long, []),
    "ckpt_argument": (ctypes.c_char_p, [ctypes.c_int]),
    "ckpt_strerror": (ctypes.c_char_p, [ctypes.c_int]),
}


def _find():
    """The library's functions, as far as this process has them."""
    process = ctypes.CDLL(None, use_errno=True)
    found = {}
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(process, name)
        except AttributeError:
            continue
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


_library = _find()


def loaded():
    """Is libckpt.so in this process? (It sleeps in the children of a watched process.)"""
    return "ckpt_checkpoint" in _library


def _int(number, what):
    """A C int: ctypes would cut it to one without a word."""
    number = _operator.index(number)
    if not -(1 << 31) <= number < 1 << 31:
        raise OverflowError(f"{what} {number} does not fit into 32 bits")
    return number


def _call(name, *arguments):
    function = _library.get(name)
    if function is None:
        raise NotLoaded(
            _errno.ENOSYS,
            "libckpt.so is not loaded (start the program with ckpt run)"
            if not loaded()
            else f"this libckpt.so has no {name}",
        )
    result = function(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        text = _library["ckpt_strerror"](code).decode()
        raise (NotLoaded if code == _errno.ENOSYS else Error)(code, text)
    return result


# --- checkpoint, rollback -----------------------------------------------------------

# Where kept objects travel: it exists, untouched, at every checkpoint of this module, so a
# rollback may keep as many bytes of it as it needs. Address space only.
_ROOM = 1 << 30
_room = None
_failures = []
# Buffers that can be kept in place, and how many of them each checkpoint has seen.
_protected = []
_seen = {}


def _make_room():
    global _room
    size = _ROOM
    limit = _resource.getrlimit(_resource.RLIMIT_AS)[0]
    if limit != _resource.RLIM_INFINITY:
        size = min(size, max(limit // 16, 1 << 16))
    while _room is None and size >= 1 << 16:
        try:
            flags = _mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS | getattr(_mmap, "MAP_NORESERVE", 0x4000)
            _room = _mmap.mmap(-1, size, flags=flags)
        except OSError:
            size //= 4
    return _room


def _address(buffer):
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _raise_failures():
    if _failures:
        failure = _failures[0]
        _failures.clear()
        raise failure


def checkpoint(id=0):
    """Takes a checkpoint. Returns 0 when it is durable, and again, with a value greater
    than 0, when the process comes back to it."""
    id = _int(id, "the id")
    if _room is None and loaded():
        _make_room()
    kept_before = _room and _room[:8]
    if _room is not None:
        _room[:8] = bytes(8)
    before = _seen.get(id)
    _seen[id] = len(_protected)
    try:
        result = _call("ckpt_checkpoint", id)
    except Error:
        if kept_before:
            _room[:8] = kept_before
        if before is None:
            del _seen[id]
        else:
            _seen[id] = before
        raise
    _raise_failures()
    return result


def protect(buffer):
    """Makes a ``bytearray``, ``array`` or ctypes buffer one that ``rollback(keep=buffer)`` can
    keep in place, from the next checkpoint on. It cannot be resized any more. Returns it."""
    view = memoryview(buffer).cast("B")
    if view.readonly:
        raise TypeError("a buffer to protect must be writable")
    if all(known is not buffer for known, _ in _protected):
        _protected.append((buffer, view))
    return buffer


def rollback(value=1, keep=None, id=0):
    """Goes back to the latest checkpoint with this id, in this process; checkpoint()
    returns ``value`` there. Does not return.

    With -1 as ``id`` that is the latest checkpoint of any id.

    ``keep`` is what comes through. A buffer that was given to :func:`protect` before the
    checkpoint (also a list of such buffers) keeps its bytes in place. Any other object is
    pickled and handed over: :func:`kept` returns it after the rollback.
    """
    id, value = _int(id, "the id"), _int(value, "the value")
    if not loaded():
        _call("ckpt_rollback")
    # Buffers are never unprotected: the latest checkpoint has seen the most of them.
    seen = _seen.get(id, 0) if id >= 0 else max(_seen.values(), default=0)
    before = None
    buffers = keep if isinstance(keep, list) else [keep]
    in_place = [_protected_index(buffer) for buffer in buffers]
    regions = []
    if keep is None:
        pass
    elif buffers and all(index is not None for index in in_place):
        for index in in_place:
            if index >= seen:
                raise ValueError("a buffer was protected only after the checkpoint")
            view = _protected[index][1]
            if view.nbytes:
                regions.append((_address(view), view.nbytes))
    else:
        if _room is None:
            raise ValueError("there is no checkpoint of ckpt.checkpoint() to go back to")
        pickled = _pickle.dumps(keep, protocol=_pickle.HIGHEST_PROTOCOL)
        if len(pickled) + 8 > len(_room):
            most = len(_room) - 8
            raise ValueError(f"what is to be kept takes {len(pickled)} bytes, at most {most}")
        # What was kept before is that again where this is refused.
        before = _room[: 8 + int.from_bytes(_room[:8], "little")]
        _room[8 : 8 + len(pickled)] = pickled
        _room[:8] = len(pickled).to_bytes(8, "little")
        regions = [(_address(_room), 8 + len(pickled))]
    table = (_Region * max(len(regions), 1))()
    for row, (address, length) in zip(table, regions):
        row.addr, row.len = address, length
    try:
        _call("ckpt_rollback", id, value, table, len(regions))
    finally:
        if before is not None:
            _room[: len(before)] = before


def _protected_index(thing):
    for index, (buffer, _) in enumerate(_protected):
        if buffer is thing:
            return index
    return None


def kept(default=None):
    """The object that the latest rollback to this point has kept, else ``default``."""
    if _room is None:
        return default
    length = int.from_bytes(_room[:8], "little")
    return _pickle.loads(_room[8 : 8 + length]) if length else default


# --- files --------------------------------------------------------------------------


def _path(path):
    name = _os.fsencode(path)
    if not name or b"\0" in name:
        raise ValueError("a path or pattern is not empty and has no NUL byte")
    return name if name == b"*" else _os.path.abspath(name)


def exclude(glob):
    """Files that match stay as they are when the process goes back ('*': all)."""
    _call("ckpt_exclude", _path(glob))


def include(glob):
    """An exception from :func:`exclude`; the latest rule that matches counts."""
    _call("ckpt_include", _path(glob))


def redirect(old, new):
    """Opens ``new`` where ``old`` was open, the next time that the process goes back."""
    _call("ckpt_redirect", _path(old), _path(new))


# --- critical sections, events, state -----------------------------------------------


class Hold:
    """``with ckpt.hold():`` no checkpoint is taken meanwhile; sections nest."""

    def __enter__(self):
        self._held = loaded()
        if self._held:
            try:
                _call("ckpt_hold")
            except NotLoaded:
                # A child of the watched process: nobody takes checkpoints here.
                self._held = False
        return self

    def __exit__(self, *_):
        if self._held:
            _call("ckpt_release")


def hold():
    return Hold()


# Callbacks must live as long as the library may call them.
_callbacks = []


def _on(event, function):
    def call(_event, _argument):
        # An exception cannot pass through C: checkpoint() raises it.
        try:
            function()
        except BaseException as failure:  # noqa: BLE001
            _failures.append(failure)

    callback = _HANDLER(call)
    if loaded():
        try:
            _call("ckpt_on", event, callback, None)
            _callbacks.append(callback)
        except NotLoaded:
            pass
    return function


def on_before(function):
    """Decorator: called before each checkpoint that checkpoint() takes."""
    return _on(BEFORE, function)


def on_after(function):
    """Decorator: called when it was taken or has failed."""
    return _on(AFTER, function)


def on_restore(function):
    """Decorator: called when the process has come back (to seed a generator, connect
    again); for a checkpoint of the clock, at the next call of this module."""
    return _on(RESTORED, function)


def ready():
    """The program is initialised; shown by ``ckpt status``."""
    _call("ckpt_ready")
    _raise_failures()


def heartbeat():
    """The program is alive; shown by ``ckpt status``."""
    _call("ckpt_heartbeat")
    _raise_failures()


def generation():
    """The number of the latest checkpoint taken or come back to; 0: none."""
    if not loaded():
        return 0
    try:
        number = _call("ckpt_generation")
    except NotLoaded:
        return 0
    _raise_failures()
    return number


def arguments():
    """The arguments of ``ckpt restore --template JOB -- ARGUMENTS``."""
    found = []
    function = _library.get("ckpt_argument")
    while function is not None:
        argument = function(len(found))
        if argument is None:
            break
        found.append(_os.fsdecode(argument))
    return found
