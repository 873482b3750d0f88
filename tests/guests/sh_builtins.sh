#!/bin/sh
# Proves: a shell that uses builtins only survives: variables, functions, positional
# parameters, traps, arithmetic, here-strings of state, redirected descriptors, and the
# position in this very script, which the shell reads piece by piece.
[ -n "$GUEST_LOG" ] && echo begin >>"$GUEST_LOG"
case ${GUEST_SECONDS:-2} in *.*) seconds=1 ;; *) seconds=${GUEST_SECONDS:-2} ;; esac
turns=$((seconds * 60000))
trap 'echo "the trap ran"' EXIT
exec 5>/dev/null
a=0 b=1 i=0
set -- one two three four five
collatz() {
    n=$1 steps=0
    while [ "$n" -ne 1 ]; do
        if [ $((n % 2)) -eq 0 ]; then n=$((n / 2)); else n=$((3 * n + 1)); fi
        steps=$((steps + 1))
    done
}
sum=0
while [ "$i" -lt "$((turns / 12))" ]; do
    collatz $((i + 1))
    sum=$((sum + steps))
    echo "$i $sum" >&5
    i=$((i + 1))
    first=$1
    shift
    set -- "$@" "$first"
done
echo "sum $sum first $1"
exit 73
