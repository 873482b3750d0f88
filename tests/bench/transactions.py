"""`transactions.py COUNT`: as files.c, for sqlite3: nanoseconds for one transaction (update of
a row, rollback journal, no fsync so that the disk does not hide the difference)."""

import ctypes
import os
import sqlite3
import sys
import time

count = int(sys.argv[1])
if os.path.exists("bench.db"):
    os.unlink("bench.db")
db = sqlite3.connect("bench.db", isolation_level=None)
db.execute("pragma synchronous=off")
db.execute("create table t(k integer primary key, v text)")
db.executemany("insert into t values(?, ?)", [(i, "x" * 100) for i in range(1000)])
if "libckpt" in os.environ.get("LD_PRELOAD", ""):
    if ctypes.CDLL(None).ckpt_checkpoint(0) < 0:
        sys.exit("ckpt_checkpoint failed")
# As in files.c.
now = time.process_time if os.environ.get("BENCH_CLOCK") == "cpu" else time.perf_counter
begin = now()
for i in range(count):
    db.execute("update t set v = ? where k = ?", (str(i), i * 7919 % 1000))
print((now() - begin) / count * 1e9)
