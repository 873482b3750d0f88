"""Bypass of a premature exit (WO 97/00476 FIG. 10), in Python: see table.c."""

import hashlib
import sys

import ckpt

BLOCK = 4 << 20


def new_block(index, seed):
    while True:
        try:
            return bytearray(hashlib.sha256(seed).digest()) * (BLOCK // 32)
        except MemoryError:
            print(f"no memory for block {index}", file=sys.stderr)
        try:
            returned = ckpt.checkpoint(1)
        except ckpt.Error as error:
            sys.exit(f"not saved: {error}")
        if not returned:
            sys.exit(1)
        # Here begins the recovery code: the process is a new one, its limits too.
        print(f"back, to try block {index} again", file=sys.stderr)


def main():
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    print("begun", file=sys.stderr)
    table = []
    for index in range(blocks):
        seed = bytes(table[-1][:32]) if table else b"seed"
        table.append(new_block(index, seed))
    total = hashlib.sha256()
    for block in table:
        total.update(block)
    print(f"{blocks} blocks, sum {total.hexdigest()[:16]}")


main()
