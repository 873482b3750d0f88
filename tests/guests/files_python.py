"""Proves: Python's files (buffered text, json written aside and renamed, tempfile, shutil,
pathlib, shelve by dbm.dumb) agree with memory."""

import dbm.dumb
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

log = os.environ.get("GUEST_LOG")
if log:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"begin\n")
    os.close(fd)

rounds = int(float(os.environ.get("GUEST_SECONDS", "2")) * 100)
out = open("out.csv", "w")
state = {}
base = pathlib.Path("tree")
base.mkdir()
database = dbm.dumb.open("database", "c")
for n in range(rounds):
    if n:
        with open("state.json") as f:
            assert json.load(f) == state, n
    state[str(n % 20)] = [n, n * n]
    with tempfile.NamedTemporaryFile("w", dir=".", delete=False) as f:
        json.dump(state, f)
    os.replace(f.name, "state.json")
    for k in range(20):
        print(n, k, n * k, sep=",", file=out)
    directory = base / str(n % 5) / "deep"
    if directory.exists():
        assert (directory / "x").read_text() == str(n - 5)
        shutil.rmtree(directory.parent)
    directory.mkdir(parents=True)
    (directory / "x").write_text(str(n))
    key = str(n % 30)
    if n >= 30:
        assert database[key] == b"v" * (n - 30), n
    database[key] = "v" * n
    with open("appended", "a") as f:
        f.write("line %d\n" % n)
    assert os.path.getsize("appended") == sum(len("line %d\n" % i) for i in range(n + 1))
    time.sleep(0.005)
out.close()
database.close()
print("python files ok", rounds)
sys.stdout.flush()
os._exit(73)
