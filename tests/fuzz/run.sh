#!/bin/sh
# Builds the fuzz targets with clang's address and undefined behaviour sanitizers, and runs each from its corpus.
#
#   run.sh [SECONDS] [TARGET...]
#
# SECONDS (30) is the time of each target. New inputs go to build/fuzz/NAME/new, one that breaks an invariant to
# build/fuzz/NAME/crash-*, leak-* or timeout-*; `build/fuzz/NAME.bin FILE` runs it again. The last line is
# `N passed, N failed`, one for each target; exit status 0 when nothing failed.
set -u

cd "$(dirname "$0")/../.." || exit 1
seconds=${1:-30}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- head body keys options conn link
case $seconds in
'' | *[!0-9]*)
    sed -n 's/^#   run\.sh/usage: run.sh/p' tests/fuzz/run.sh >&2
    exit 64
    ;;
esac
clang=${CLANG:-$(command -v clang || command -v clang-14)}
bearssl=${BEARSSL_LIBS:-$(find "/usr/lib/$(gcc -print-multiarch)" /usr/lib -maxdepth 1 -name libbearssl.a | head -n 1)}
passed=0
failed=0

build() {
    "$clang" -std=c11 -g -O1 -Wall -Wextra -Wno-unused-function -Werror -fno-omit-frame-pointer -fno-strict-aliasing \
        -DTINYAUTH_NO_SANDBOX -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I/usr/include/bearssl \
        -o "build/fuzz/$1.bin" "tests/fuzz/$1.c" "$bearssl"
}

# fuzz NAME: its output goes to build/fuzz/NAME/log, its exit status to build/fuzz/NAME/status.
fuzz() {
    dir=build/fuzz/$1
    mkdir -p "$dir/new"
    echo 1 >"$dir/status"
    if build "$1" >"$dir/log" 2>&1; then
        timeout $((seconds + 60)) "build/fuzz/$1.bin" -dict=tests/fuzz/http.dict -max_len=4096 -timeout=10 -rss_limit_mb=1024 \
            -max_total_time="$seconds" -artifact_prefix="$dir/" -print_final_stats=1 "$dir/new" "tests/fuzz/corpus/$1" \
            >>"$dir/log" 2>&1
        echo $? >"$dir/status"
    fi
}

# report NAME: counts it, and shows what went wrong.
report() {
    dir=build/fuzz/$1
    if [ "$(cat "$dir/status")" -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok      $1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$dir/log") runs"
    else
        failed=$((failed + 1))
        echo "FAILED  $1: status $(cat "$dir/status")"
        grep -v '^#[0-9]' "$dir/log" | tail -n 40
    fi
}

while [ $# -gt 0 ]; do
    fuzz "$1" &
    first=$!
    if [ $# -gt 1 ]; then
        fuzz "$2"
    fi
    wait "$first"
    report "$1"
    shift
    [ $# -eq 0 ] || { report "$1" && shift; }
done

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
