"""Bypass of a long initialisation (WO 97/00476 FIG. 11), in Python: see lookup.c."""

import os
import random
import sys

import ckpt


def parse(path):
    table = {}
    with open(path) as lines:
        for line in lines:
            key, value = line.split()
            table[key] = float(value)
    return table


@ckpt.on_restore
def seed():
    random.seed()


def main():
    data, first, *more = sys.argv[1:]
    template = more == ["template"]
    print("parsing", file=sys.stderr)
    table = parse(data)
    random.seed(1)
    # Unbuffered: what is read ahead would be in the checkpoint.
    questions = open(first, "rb", buffering=0)
    turn = 0
    if ckpt.loaded():
        ckpt.exclude("*")
        ckpt.ready()
        turn = ckpt.checkpoint()
    if template and turn == 0:
        return
    label = (ckpt.arguments() or [sys.argv[2 + turn]])[0]
    total = 0.0
    with open(questions.fileno(), "r", closefd=False) as lines:
        for line in lines:
            total += table.get(line.strip(), 0.0)
    print(f"{label} {random.randrange(1000000)} of {len(table)}: {total:.3f}", flush=True)
    if not template and turn < len(more):
        ckpt.redirect(first, more[turn])
        ckpt.rollback(turn + 1)


main()
