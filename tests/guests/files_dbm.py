"""Proves: a GNU dbm or LMDB file (first argument: gdbm, lmdb) agrees with memory after each
transaction, and holds everything at the end."""

import os
import random
import sys
import time

log = os.environ.get("GUEST_LOG")
if log:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"begin\n")
    os.close(fd)

rounds = int(float(os.environ.get("GUEST_SECONDS", "2")) * 60)
rng = random.Random(7)
model = {}


class Gdbm:
    def __init__(self):
        import dbm.gnu

        self.db = dbm.gnu.open("data", "n", 0o644)

    def change(self, puts, drops):
        for key, value in puts:
            self.db[key] = value
        for key in drops:
            del self.db[key]
        self.db.sync()

    def all(self):
        found, key = {}, self.db.firstkey()
        while key is not None:
            found[key] = self.db[key]
            key = self.db.nextkey(key)
        return found

    def close(self):
        self.db.reorganize()
        self.db.close()


class Lmdb:
    def __init__(self):
        import lmdb

        self.env = lmdb.open("data", map_size=1 << 24)

    def change(self, puts, drops):
        with self.env.begin(write=True) as txn:
            for key, value in puts:
                txn.put(key, value)
            for key in drops:
                assert txn.delete(key)

    def all(self):
        with self.env.begin() as txn:
            return {bytes(k): bytes(v) for k, v in txn.cursor()}

    def close(self):
        self.env.close()


db = {"gdbm": Gdbm, "lmdb": Lmdb}[sys.argv[1]]()
for n in range(rounds):
    puts = [(b"key%d" % rng.randrange(500), rng.randbytes(rng.randrange(300))) for _ in range(5)]
    model.update(puts)
    drops = rng.sample(sorted(model), 2) if len(model) > 20 else []
    for key in drops:
        del model[key]
    db.change(puts, drops)
    if n % 5 == 0:
        assert db.all() == model, n
    time.sleep(0.005)
assert db.all() == model
db.close()
print(len(model), sum(map(len, model.values())))
sys.stdout.flush()
os._exit(73)
