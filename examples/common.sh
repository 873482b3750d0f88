# For the run scripts of the examples: where things are, and a directory that goes away.
# CKPT names the command (default: the release build of this tree).
here=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$here/../.." && pwd)
ckpt=${CKPT:-$tree/target/release/ckpt}
[ -x "$ckpt" ] || {
    echo "$ckpt is not there: cargo build --release" >&2
    exit 2
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CKPT_DIR=$work/store PYTHONPATH=$tree/python PYTHONDONTWRITEBYTECODE=1
compile() { cc -O2 -Wall -I "$tree/ckpt-sys/include" -o "$work/$1" "$here/$1.c"; }
now() { date +%s%N; }
# Milliseconds since the time given.
since() { echo $((($(now) - $1) / 1000000)); }
