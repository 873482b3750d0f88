#!/bin/bash
# Proves: redirections of bash, with builtins only: >, >>, <> and a descriptor of its own.
[ -n "$GUEST_LOG" ] && echo begin >>"$GUEST_LOG"
case ${GUEST_SECONDS:-2} in *.*) seconds=1 ;; *) seconds=${GUEST_SECONDS:-2} ;; esac
turns=$((seconds * 400))
exec 7>held
sum=0
for ((i = 0; i < turns; i++)); do
    if ((i > 0)); then
        read -r was <state
        [ "$was" = "state $((i - 1)) $sum" ] || { echo "round $i: $was" >&2; exit 99; }
    fi
    sum=$(((sum * 31 + i) % 1000003))
    echo "state $i $sum" >state
    echo "line $i $sum" >>appended
    echo "held $i" >&7
    for ((k = 0; k < 3000; k++)); do :; done
done
exec 7>&-
echo "bash files ok $sum"
exit 73
