#!/bin/bash
# Cross builds: `make cross` for each architecture, in two directories, and the end-to-end tests on what it built, under
# qemu-user.
#
#   run.sh [--cache DIR] [-v] [ARCH...]
#
# ARCH is aarch64, armhf or riscv64 (default: all three). Needs a Debian of x86_64 and root, to install compilers; elsewhere
# it fails. DIR (default build/cross) keeps the libraries (toolchain.sh). The last line is `N passed, N failed`.
set -u

here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
cache=$project/build/cross
verbose=
passed=0
failed=0

fail() {
    echo "FAILED  tests/cross: $*"
    echo "0 passed, 1 failed"
    exit 1
}

usage() {
    sed -n 's/^#   run\.sh/usage: run.sh/p' "$0" >&2
    exit 64
}

# The linker's name of the machine and qemu's.
machine_of() {
    case $1 in
    aarch64) echo "AArch64" ;;
    armhf) echo "ARM" ;;
    riscv64) echo "RISC-V" ;;
    *) return 1 ;;
    esac
}

qemu_of() {
    [ "$1" = armhf ] && echo qemu-arm || echo "qemu-$1"
}

while [ $# -gt 0 ]; do
    case $1 in
    --cache)
        [ $# -gt 1 ] || usage
        mkdir -p "$2" || exit 1
        cache=$(cd "$2" && pwd)
        shift
        ;;
    --tinyauth)
        shift                   # it builds its own
        ;;
    -v) verbose=-v ;;
    -*) usage ;;
    *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || set -- aarch64 armhf riscv64
for arch; do
    machine_of "$arch" >/dev/null || usage
done

[ "$(id -u)" -eq 0 ] || fail "not root"
command -v apt-get >/dev/null || fail "no apt-get: not a Debian"
[ "$(dpkg --print-architecture)" = amd64 ] || fail "not on x86_64"

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

# try NAME COMMAND...: counts one test, and shows what a failed one said.
try() {
    local name=$1
    shift
    if "$@" >"$work/output" 2>&1; then
        passed=$((passed + 1))
        [ -z "$verbose" ] || echo "ok      $name"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        tail -n 15 "$work/output" | sed 's/^/        /'
        return 1
    fi
}

# A copy of the sources in a directory of its own name, built there.
build_in() {
    mkdir -p "$1" && cp "$project/Makefile" "$project/tinyauth.c" "$project/tinyauth.h" "$1/" &&
        make -C "$1" cross "ARCH=$2" "CROSS_ROOT=$cache/$2"
}

is_static_for() {
    readelf -h "$1" | grep -E "Machine: +$2\$" && ! readelf -l "$1" | grep INTERP
}

# The end-to-end tests want one program. Its name goes to the binary as argv[0], so that USR2 executes this again.
make_wrapper() {
    # shellcheck disable=SC2016 # for the wrapper to expand
    printf '#!/bin/sh\nexec %s -0 "$0" %s "$@"\n' "$(qemu_of "$2")" "$3" >"$1"
    chmod +x "$1"
}

# Its numbers are added to ours.
end_to_end() {
    local counts
    python3 "$here/ends.py" --tinyauth "$2" --no-measure >"$work/output" 2>&1
    counts=$(tail -n 1 "$work/output" | sed -nE 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p')
    counts=${counts:-0 1}
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
    # an emulator beside other work is slow enough for time-outs: what failed may try again, alone
    # shellcheck disable=SC2013 # names are words
    for name in $(sed -nE 's/^FAILED  (test_[a-z0-9_]+) .*/\1/p' "$work/output"); do
        if python3 "$here/ends.py" --tinyauth "$2" --no-measure "$name" >"$work/again" 2>&1; then
            passed=$((passed + 1))
            failed=$((failed - 1))
            echo "again   $1 $name: passed alone"
        fi
    done
    grep -E '^(FAILED|skipped)|^        ' "$work/output" | sed "s/^\(FAILED\|skipped:\) /\1 $1 /" | cut -c 1-300
    [ -z "$verbose" ] || echo "ok      $1 end to end: ${counts% *} passed"
}

one() {
    local arch=$1 binary=$work/one/build/$1/tinyauth
    try "$arch toolchain" "$here/toolchain.sh" "$arch" "$cache/$arch" || return
    try "$arch build" build_in "$work/one" "$arch" || return
    try "$arch static" is_static_for "$binary" "$(machine_of "$arch")"
    try "$arch build in another directory" build_in "$work/another/directory" "$arch" &&
        try "$arch built the same twice" cmp "$binary" "$work/another/directory/build/$arch/tinyauth"
    make_wrapper "$work/tinyauth-$arch" "$arch" "$binary"
    try "$arch version" "$work/tinyauth-$arch" --version || return
    end_to_end "$arch" "$work/tinyauth-$arch"
}

if ! command -v qemu-aarch64 >/dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-user binutils >/dev/null || fail "no qemu-user"
fi
for arch; do
    one "$arch"
done

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
