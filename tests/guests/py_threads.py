"""Proves: CPython with threads, generators, big integers, regular expressions, dictionaries
and a socket pair survives, under the interpreter lock and with random hashing."""

import hashlib
import os
import queue
import re
import socket
import sys
import threading
import time

log = os.environ.get("GUEST_LOG")
if log:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"begin\n")
    os.close(fd)

rounds = int(float(os.environ.get("GUEST_SECONDS", "2")) * 100)
jobs = queue.Queue(10)
results = {}
lock = threading.Lock()


def work(name):
    digest = hashlib.sha256()
    while True:
        item = jobs.get()
        if item is None:
            break
        with lock:
            results[item] = hashlib.sha256(str(item).encode()).hexdigest()
        digest.update(b"x")
    return name


def primes():
    found = []
    n = 2
    while True:
        if all(n % p for p in found):
            found.append(n)
            yield n
        n += 1


threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for thread in threads:
    thread.start()
left, right = socket.socketpair()
big = 1
generator = primes()
for i in range(rounds):
    jobs.put(i)
    left.sendall(b"%08d" % i)
    assert right.recv(8) == b"%08d" % i
    big = big * (i + 3) % (2**4001 - 1)
    p = next(generator)
    assert re.fullmatch(r"(\d+)!", f"{p}!").group(1) == str(p)
    time.sleep(0.01)
for _ in threads:
    jobs.put(None)
for thread in threads:
    thread.join()
assert len(results) == rounds
total = hashlib.sha256("".join(results[i] for i in range(rounds)).encode()).hexdigest()
print(total, p, big % 1000003)
print("python ok")
sys.stdout.flush()
sys.exit(73)
