"""Proves: git commits made by one process (dulwich) are all there, whole, in order."""

import os
import sys
import time

log = os.environ.get("GUEST_LOG")
if log:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"begin\n")
    os.close(fd)

from dulwich.repo import Repo

rounds = int(float(os.environ.get("GUEST_SECONDS", "2")) * 40)
os.mkdir("work")
repo = Repo.init("work")
made = []
who = b"Somebody <somebody@example.org>"
for n in range(rounds):
    name = "file%d" % (n % 7)
    with open("work/" + name, "a") as f:
        f.write("line %d\n" % n)
    repo.stage([name])
    when = {"commit_timestamp": 1000000 + n, "author_timestamp": 1000000 + n}
    made.append(repo.do_commit(b"commit %d" % n, committer=who, author=who, commit_timezone=0, author_timezone=0, **when))
    assert repo.head() == made[-1], n
    if n % 10 == 9:
        # A fresh look at what is in the files.
        assert [e.commit.id for e in Repo("work").get_walker()] == made[::-1], n
    time.sleep(0.005)
fresh = Repo("work")
for entry in fresh.get_walker():
    for _, _, sha in entry.commit and fresh[entry.commit.tree].iteritems():
        fresh[sha].check()
print(len(made), made[-1].decode())
sys.stdout.flush()
os._exit(73)
