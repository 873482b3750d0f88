"""Proves: what Python measures and waits for by the monotonic clock goes on over a reboot:
time.monotonic, threading's waits with timeouts, asyncio's loop. See time_reboot.c."""

import asyncio
import os
import queue
import sys
import threading
import time

LEAP = 100.0


def fail(text):
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    os._exit(99)


def note(line):
    if log := os.environ.get("GUEST_LOG"):
        with open(log, "a") as out:
            out.write(line + "\n")


note("begin")
over = threading.Event()
counts = {"monotonic": 0, "wait": 0, "queue": 0, "asyncio": 0}


def met(what, deadline, now):
    if not 0 <= now - deadline < LEAP:
        fail(f"{what} ended {now - deadline} s after its time")


def reader():
    last = {}
    while not over.is_set():
        for clock in (time.monotonic, time.perf_counter):
            now = clock()
            was = last.get(clock, now)
            if not was <= now < was + LEAP:
                fail(f"{clock.__name__} went from {was} to {now}")
            last[clock] = now
        counts["monotonic"] += 1
        time.sleep(0.0005)


def waiter():
    never = threading.Event()
    while not over.is_set():
        deadline = time.monotonic() + 0.25
        time.sleep(0.05)
        if never.wait(max(0, deadline - time.monotonic())):
            fail("an event that nobody set")
        met("Event.wait", deadline, time.monotonic())
        counts["wait"] += 1


def getter():
    empty = queue.Queue()
    while not over.is_set():
        deadline = time.monotonic() + 0.2
        try:
            empty.get(timeout=0.2)
            fail("something in an empty queue")
        except queue.Empty:
            pass
        met("Queue.get", deadline, time.monotonic())
        counts["queue"] += 1


async def ticking():
    loop = asyncio.get_running_loop()
    while not over.is_set():
        done = loop.create_future()
        deadline = loop.time() + 0.2
        loop.call_at(deadline, done.set_result, None)
        await asyncio.sleep(0.05)
        await done
        # The loop rounds to its clock's resolution.
        met("call_at", deadline - 0.001, loop.time())
        counts["asyncio"] += 1


def main():
    works = [reader, waiter, getter, lambda: asyncio.run(ticking())]
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for _ in range(int(float(os.environ.get("GUEST_SECONDS", "2")) * 100)):
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    if not all(counts.values()):
        fail(f"{counts}")
    print("python's clocks ok", flush=True)
    os._exit(73)


main()
