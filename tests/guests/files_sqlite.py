"""Proves: SQLite in a journal mode (first argument), with memory-mapped reading or not (second
argument: bytes), agrees with memory after each transaction, and is whole at the end."""

import os
import sqlite3
import sys
import time

log = os.environ.get("GUEST_LOG")
if log:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"begin\n")
    os.close(fd)

mode, mapped = sys.argv[1], int(sys.argv[2])
rounds = int(float(os.environ.get("GUEST_SECONDS", "2")) * 60)
db = sqlite3.connect("data.db", isolation_level=None)
assert db.execute("pragma journal_mode=" + mode).fetchone()[0] == mode
db.execute("pragma mmap_size=%d" % mapped)
db.execute("pragma synchronous=normal")
db.execute("create table t (id integer primary key, n integer, text text)")
db.execute("create index i on t (n)")
total, count = 0, 0
for n in range(rounds):
    assert db.execute("select coalesce(sum(n), 0), count(*) from t").fetchone() == (total, count), n
    db.execute("begin")
    for k in range(5):
        db.execute("insert into t (n, text) values (?, ?)", (n * k, "x" * (n % 300)))
        total += n * k
        count += 1
    if n % 4 == 3:
        db.execute("rollback")
        total -= n * 10
        count -= 5
    else:
        db.execute("commit")
    if n % 7 == 0:
        deleted = db.execute("select coalesce(sum(n), 0), count(*) from t where id % 11 = 0").fetchone()
        db.execute("delete from t where id % 11 = 0")
        total -= deleted[0]
        count -= deleted[1]
    time.sleep(0.005)
print(db.execute("pragma integrity_check").fetchone()[0])
for row in db.execute("select count(*), sum(n), sum(length(text)) from t"):
    print(*row)
db.close()
sys.stdout.flush()
os._exit(73)
