#!/bin/bash
# A Debian of its own in a directory, for tests that need one.
#
#   root.sh SUITE DIR [PACKAGE...]
#
# DIR becomes a copy of build/debian-SUITE, the smallest Debian of that release that has apt, which debootstrap makes once;
# PACKAGEs are installed in the copy. A DIR that is there already is left as it is. Needs root and debootstrap.
set -eu

project=$(cd "$(dirname "$0")/../.." && pwd)
export DEBIAN_FRONTEND=noninteractive

[ $# -ge 2 ] || { sed -n 's/^#   root\.sh/usage: root.sh/p' "$0" >&2; exit 64; }
suite=$1
dir=$2
shift 2
base=$project/build/debian-$suite

# run COMMAND...: in the root, with its own mounts, which end with it.
run() {
    # shellcheck disable=SC2016 # for the shell in the namespace
    unshare --mount --pid --fork --kill-child --propagation private -- sh -c '
        root=$1 && shift && mount --rbind /dev "$root/dev" && mount -t proc proc "$root/proc" && exec chroot "$root" "$@"' \
        sh "$new" "$@" </dev/null
}

# What is made has its name when it is whole; two that want the same wait for each other.
mkdir -p "$project/build" "$(dirname "$dir")"
exec 9>"$project/build/debian-$suite.lock"
flock 9

if [ ! -d "$base" ]; then
    command -v debootstrap >/dev/null || { echo "root.sh: no debootstrap" >&2; exit 1; }
    rm -rf --one-file-system "$base.new"
    debootstrap --variant=minbase "$suite" "$base.new"
    rm -rf "$base.new"/var/cache/apt/archives/*.deb
    mv "$base.new" "$base"
fi
[ ! -d "$dir" ] || exit 0
new=$dir.new
rm -rf --one-file-system "$new"
cp -a --reflink=auto "$base" "$new"
if [ $# -gt 0 ]; then
    run apt-get update -qq
    run apt-get install -y -qq --no-install-recommends "$@"
    run apt-get clean
    rm -rf "$new"/var/lib/apt/lists/*
fi
mv "$new" "$dir"
