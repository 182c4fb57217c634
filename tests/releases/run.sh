#!/bin/bash
# README's two commands for Debian, as a newcomer runs them: in a clean root of each release, with the packages that they
# name and nothing else. Then, where the release is not this machine's (tests/cross), its compilers for other processors.
#
#   run.sh [-v] [SUITE...]
#
# SUITE is a Debian release (default bookworm and trixie). Needs root and debootstrap (root.sh); without them it fails. The
# last line is `N passed, N failed`.
set -u

here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
verbose=
passed=0
failed=0

usage() {
    sed -n 's/^#   run\.sh/usage: run.sh/p' "$0" >&2
    exit 64
}

while [ $# -gt 0 ]; do
    case $1 in
    -v) verbose=-v ;;
    -*) usage ;;
    *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || set -- bookworm trixie

work=$(mktemp -d) || exit 1
roots=()

# shellcheck disable=SC2317 # called by the trap
clean_up() {
    [ ${#roots[@]} -eq 0 ] || rm -rf --one-file-system "${roots[@]}"
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

# Everything but what git ignores: a checkout's git may not be there, or not trust who owns it.
copy_sources() {
    mkdir -p "$1" && tar -C "$project" -c --exclude-vcs --exclude=./build --exclude=./dist --exclude=./tinyauth --exclude=./keys \
        --exclude='./*.pem' --exclude=node_modules --exclude=__pycache__ . | tar -C "$1" -x --no-same-owner
}

# in_root ROOT COMMAND: with mounts and processes of its own, which end with it.
in_root() {
    # shellcheck disable=SC2016 # for the shell in the namespace
    unshare --mount --pid --fork --kill-child --propagation private -- sh -c '
        mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && mount -t sysfs -o ro sysfs "$1/sys" &&
        exec env -u LANG -u LC_ALL -u TMPDIR HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
            chroot "$1" sh -c "cd /root/tinyauth && $2"' sh "$1" "$2" </dev/null >"$work/output" 2>&1
}

# verdict NAME STATUS: a command that counts for itself is as many tests.
verdict() {
    local counts
    counts=$(sed -nE 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$work/output" | tail -n 1)
    [ -n "$counts" ] || counts=$([ "$2" -eq 0 ] && echo "1 0" || echo "0 1")
    [ "$2" -eq 0 ] || [ "${counts#* }" -gt 0 ] || counts="${counts% *} 1"
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
    if [ "${counts#* }" -gt 0 ]; then
        echo "FAILED  $1: status $2"
        grep -E '^(FAILED|skipped)|^        ' "$work/output" || tail -n 30 "$work/output"
    elif [ -n "$verbose" ]; then
        echo "ok      $1: ${counts% *} passed, after $SECONDS s"
        grep -E '^(skipped)' "$work/output"
    fi
}

one() {
    local suite=$1 root=$project/build/release-$1.$$ command arch
    if ! wait "${making[$suite]}"; then
        mv "$work/$suite" "$work/output"
        verdict "$suite: a clean root" 1
        return
    fi
    copy_sources "$root/root/tinyauth" || { verdict "$suite: sources" 1; return; }
    for command in "${commands[@]}"; do
        in_root "$root" "$command"
        verdict "$suite: ${command##*&& }" $?
    done
    if ! grep -qx "VERSION_CODENAME=$suite" /etc/os-release; then
        for arch in aarch64 armhf riscv64; do
            in_root "$root" "sh tests/cross/toolchain.sh $arch && make cross ARCH=$arch"
            verdict "$suite: make cross ARCH=$arch" $?
        done
    fi
    rm -rf --one-file-system "$root"
}

# shellcheck disable=SC2016 # README's own words
mapfile -t commands < <(sed -n 's/^    \(\$(which sudo) apt-get .*\)/\1/p' "$project/README.md")
if [ ${#commands[@]} -ne 2 ]; then
    echo "FAILED  README.md has ${#commands[@]} commands for Debian, not two"
    failed=$((failed + 1))
fi
# roots are made side by side, and nothing is measured meanwhile
declare -A making
for suite; do
    roots+=("$project/build/release-$suite.$$" "$project/build/release-$suite.$$.new")
    "$here/root.sh" "$suite" "$project/build/release-$suite.$$" >"$work/$suite" 2>&1 &
    making[$suite]=$!
done
for suite; do
    one "$suite"
done

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
