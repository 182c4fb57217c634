#!/bin/sh
# Runs the unit tests (the program that UNIT_TESTS names, when it does), the end-to-end tests and the regressions on the
# built binary.
#
#   test.sh [--tinyauth BIN] [--no-measure] [-v] [PATTERN]
#
# --no-measure leaves out what measures time and memory, for slow builds; PATTERN picks tests (not unit tests)
# by a part of their name. The last line is `N passed, N failed`; exit status 0 when nothing failed.
set -u

here=$(dirname "$0")
binary=$here/tinyauth
passed=0
failed=0

usage() {
    sed -n 's/^#   test\.sh/usage: test.sh/p' "$0" >&2
    exit 64
}

# run NAME COMMAND...: adds the numbers of its last line; without them, or with a status that they do not explain, it
# has failed itself.
run() {
    name=$1
    shift
    echo "== $name"
    {
        "$@" 2>&1
        echo $? >"$dir/status"
    } | tee "$dir/output"
    status=$(cat "$dir/status")
    counts=$(tail -n 1 "$dir/output" | sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p')
    [ -n "$counts" ] || counts="0 0"
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
    if { [ "$status" -ne 0 ] && [ "${counts#* }" -eq 0 ]; } || { [ "$counts" = "0 0" ] && [ -z "$pattern" ]; }; then
        echo "FAILED  $name ended with status $status"
        failed=$((failed + 1))
    fi
}

verbose=
measure=
while [ $# -gt 0 ]; do
    case $1 in
    --tinyauth)
        [ $# -gt 1 ] || usage
        binary=$2
        shift
        ;;
    --no-measure) measure=$1 ;;
    -v) verbose=$1 ;;
    -*) usage ;;
    *) break ;;
    esac
    shift
done
[ $# -le 1 ] || usage
pattern=${1:-}

if [ ! -x "$binary" ]; then
    echo "FAILED  no $binary; build it with make"
    echo "0 passed, 1 failed"
    exit 1
fi

dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM

if [ -n "${UNIT_TESTS:-}" ]; then
    run "unit tests" "$UNIT_TESTS"
fi
for tests in e2e regressions; do
    run "tests/$tests.py" python3 "$here/tests/$tests.py" --tinyauth "$binary" ${verbose:+"$verbose"} \
        ${measure:+"$measure"} "$pattern"
done
if [ $((passed + failed)) -eq 0 ]; then
    echo "FAILED  no test has '$pattern' in its name"
    failed=1
fi

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
