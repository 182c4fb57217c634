#!/bin/sh
# Instructions that a worker spends on one request, one streamed event and one refusal, counted by callgrind: nothing else on
# the machine changes them.
#
#   run.sh [--record | --profile WORK CONNECTIONS]
#
# A figure that is more than 5 % over that in tests/guard/recorded fails; --record writes that file anew. `chat` is a request
# as a client library sends it, `secure` is over TLS. Figures hold for the compiler named in the file, and are of turns of the
# worker's loop alone: the kernel's work is not in them, nor what drives the worker. --profile shows where they go. The last
# line is `N passed, N failed`; exit status 0 when nothing failed.
set -u

cd "$(dirname "$0")/../.." || exit 1
recorded=tests/guard/recorded
percent=5
first=128
last=1152
mode=${1:---check}
passed=0
failed=0

case "$mode $#" in
'--check 0' | '--record 1' | '--profile 3') ;;
*)
    sed -n 's/^#   run\.sh/usage: run.sh/p' tests/guard/run.sh >&2
    exit 64
    ;;
esac
if ! command -v valgrind >/dev/null; then
    echo "tests/guard: skipped: valgrind is not there"
    echo "0 passed, 0 failed"
    exit 0
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
if ! make -f tests/guard/guard.mk build/guard >"$dir/make" 2>&1; then
    cat "$dir/make"
    echo "0 passed, 1 failed"
    exit 1
fi

# collect WORK CONNECTIONS UNITS [CERT KEY]: a profile of all turns of the worker, in $dir/profile.
collect() {
    valgrind --quiet --tool=callgrind --toggle-collect=worker_turn --callgrind-out-file="$dir/profile" build/guard "$@"
}

instructions() {
    collect "$@" && sed -n 's/^totals: //p' "$dir/profile"
}

# each WORK CONNECTIONS [CERT KEY]: instructions of one unit. What is done once, such as connecting, is in both counts.
each() {
    work=$1
    connections=$2
    shift 2
    few=$(instructions "$work" "$connections" "$first" "$@") && many=$(instructions "$work" "$connections" "$last" "$@") &&
        echo $(((many - few) / (last - first)))
}

if [ "$mode" = --profile ]; then
    collect "$2" "$3" 6400 && callgrind_annotate "$dir/profile"
    exit
fi

# EC keys: the certificate and the handshake that they lead to cost the same each time.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=localhost \
    -keyout "$dir/key" -out "$dir/cert" 2>/dev/null

for connections in 1 64; do
    for work in request chat event refusal; do
        echo "$work $connections $(each $work $connections)"
    done
done >"$dir/figures"
for work in request event refusal; do
    echo "secure-$work 1 $(each $work 1 "$dir/cert" "$dir/key")"
done >>"$dir/figures"

if [ "$mode" = --record ]; then
    {
        echo "# instructions of one unit; written by run.sh --record with $(gcc --version | head -n 1)"
        echo "# work connections instructions"
        cat "$dir/figures"
    } >"$recorded"
fi
while read -r work connections count; do
    was=$(sed -n "s/^$work $connections //p" "$recorded" 2>/dev/null)
    if [ -z "$count" ] || [ -z "$was" ]; then
        result=FAIL
        rate=
    else
        rate=$(awk "BEGIN { printf \"%+.1f %%\", 100 * ($count / $was - 1) }")
        result=$([ $((count * 100)) -le $((was * (100 + percent))) ] && echo ok || echo FAIL)
    fi
    [ "$result" = ok ] && passed=$((passed + 1)) || failed=$((failed + 1))
    printf '%-4s  %-15s %2s connections  %6s  recorded %6s  %s\n' "$result" "$work" "$connections" "${count:-none}" "${was:-none}" "$rate"
done <"$dir/figures"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
