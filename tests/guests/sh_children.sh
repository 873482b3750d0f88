# Proves: a script that runs one command after the other, with hardly a moment without a child between
# them, gets its checkpoints. With an argument the commands print as well.
[ -n "$GUEST_LOG" ] && echo begin >>"$GUEST_LOG"
s=0
i=0
n=$(awk "BEGIN { print int(${GUEST_SECONDS:-2} * 100) }")
while [ "$i" -lt "$n" ]; do
    x=$(expr "$i" + "$s" % 7)
    y=$(echo "$x" | sed 's/1/2/')
    s=$(expr "$s" + "$y")
    i=$(expr "$i" + 1)
    echo "$i $s"
    [ -z "$1" ] || expr "$i" \* 7
done
exit 73
