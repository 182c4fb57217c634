#!/bin/sh
# Slow and silent clients against tinyauth, while a client with a key is answered.
#
#   sh tests/faults/slow.sh [BIN]
#
# slowhttptest: slow headers, slow bodies and slow reads with 1,000 connections each, the latter two with a good key. Then
# 10,000 connections that send nothing, with a pool that holds them all and with the default one. Each time the median
# latency of a client with a key must stay within twice the quiet one, measured just before. The last line is
# `N passed, N failed`.
set -u
here=$(cd "$(dirname "$0")" && pwd)
binary=${1:-$here/../../tinyauth}
directory=$(mktemp -d)
server=
model=
passed=0
failed=0

cleanup() {
    for pid in $server $model; do
        kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null
    done
    rm -rf "$directory"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

if ! command -v slowhttptest >/dev/null; then
    echo "skipped: no slowhttptest (Debian: apt-get install slowhttptest)"
    exit 0
fi
# shellcheck disable=SC3045
ulimit -n "$(ulimit -H -n)"

# port FILE PATTERN: waits until the file has the port.
port() {
    for _ in $(seq 100); do
        found=$(sed -nE "s/$2/\\1/p" "$1" | head -n 1)
        [ -n "$found" ] && break
        sleep 0.05
    done
    echo "$found"
}

# start OPTION...: tinyauth before the stand-in model.
start() {
    TINYAUTH_KEY=slow-Secret-0123456789 "$binary" -l 127.0.0.1:0 -u "127.0.0.1:$upstream" \
        --ip-rate off --drain-timeout 1s "$@" 2>"$directory/log" &
    server=$!
    address=127.0.0.1:$(port "$directory/log" '.*event=listening addr=127.0.0.1:([0-9]+).*')
}

stop() {
    kill "$server"
    wait "$server" 2>/dev/null
    server=
}

# judge NAME SECONDS COMMAND...: the latency of a client with a key while the command runs.
judge() {
    name=$1 seconds=$2
    shift 2
    if python3 "$here/latency.py" "$address" slow-Secret-0123456789 "$name" "$seconds" "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
}

python3 "$here/../model.py" >"$directory/model" &
model=$!
upstream=$(port "$directory/model" 'port=([0-9]+)')

key=$(printf 'text/plain\r\nAuthorization: Bearer slow-Secret-0123456789')

start -n 3000 --ip-conns 3000 --idle-timeout 60s
judge "slow headers" 12 slowhttptest -c 1000 -H -i 2 -r 500 -l 14 -p 5 -x 10 -u "http://$address/api/version"
judge "slow bodies" 12 slowhttptest -c 1000 -B -i 2 -r 500 -s 8192 -f "$key" -l 14 -p 5 -x 10 -u "http://$address/t/sink"
judge "slow reads" 12 slowhttptest -c 1000 -X -r 500 -w 10 -y 20 -n 2 -z 8 -m "$key" -l 14 -p 5 -u "http://$address/t/cl/3000000"
stop

start -n 8000 --ip-conns 200
judge "10,000 silent connections" 8 python3 "$here/latency.py" --silent 10000 --for 10 "$address"
stop
start --ip-conns 200
judge "10,000 silent connections, default pool" 8 python3 "$here/latency.py" --silent 10000 --for 10 "$address"
stop

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
