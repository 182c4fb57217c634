#!/bin/sh
# A walk through tinyauth in a few seconds: a key, a stand-in model server, tinyauth in front of it, and what a client
# and the log then see. Exit status 0 only when all of it was seen. Needs curl and python3.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
tinyauth=${TINYAUTH:-$root/tinyauth}
dir=$(mktemp -d) || exit 1
model_pid=
tinyauth_pid=

clean_up() {
    for pid in $tinyauth_pid $model_pid; do
        kill "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
    done
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

heading() { printf '\n== %s\n' "$*"; }

show() { printf '$ %s\n' "$*"; }

fail() {
    printf '\ndemo: %s\n' "$*" >&2
    [ ! -s "$dir/log" ] || tail -n 5 "$dir/log" >&2
    exit 1
}

# await WHAT FILE PATTERN: the first line of FILE that holds PATTERN, within 5 s.
await() {
    tries=0
    until grep -m 1 -e "$3" "$2" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || fail "no $1"
        sleep 0.05
    done
}

[ -x "$tinyauth" ] || fail "no $tinyauth; build it with make"
command -v curl >/dev/null || fail "curl is missing"

heading "A key: printed once, stored as a hash"
show "tinyauth key add demo"
TINYAUTH_KEYS=$dir/keys "$tinyauth" key add demo >"$dir/key" || fail "no key was made"
cat "$dir/key"
key=$(awk 'NF { last = $NF } END { print last }' "$dir/key")
show "cat keys"
cat "$dir/keys"
grep -q '^demo[[:blank:]]*sha256:' "$dir/keys" || fail "the key is not in the file"

heading "A stand-in model server, and tinyauth in front of it"
python3 "$root/tests/model.py" >"$dir/port" &
model_pid=$!
port=$(await "model server" "$dir/port" '^port=') || exit 1
upstream=127.0.0.1:${port#port=}
show "tinyauth --keys keys --listen 127.0.0.1:0 --upstream $upstream"
"$tinyauth" --keys "$dir/keys" --listen 127.0.0.1:0 --upstream "$upstream" >"$dir/log" 2>&1 &
tinyauth_pid=$!
await "tinyauth" "$dir/log" 'event=listening' >"$dir/line" || exit 1
url=http://$(sed 's/.* addr=//; s/ .*//' "$dir/line")
await "event=ready" "$dir/log" 'event=ready' || exit 1

heading "Without a key: 401"
show "curl -i $url/api/tags"
curl -si -m 10 "$url/api/tags" | tr -d '\r' >"$dir/401"
cat "$dir/401"
echo
grep -q '^HTTP/1.1 401' "$dir/401" || fail "no 401"

heading "With the key: the answer streams"
show "curl -N -H 'Authorization: Bearer ...' $url/api/generate -d '{\"model\": \"tiny\", \"prompt\": \"Hello\"}'"
curl -sN -m 10 -H "Authorization: Bearer $key" "$url/api/generate" \
    -d '{"model": "tiny", "prompt": "Hello", "events": 5, "gap_ms": 200}' | tee "$dir/stream"
[ "$(grep -c '"done": false' "$dir/stream")" -eq 5 ] || fail "not all of the stream came"
grep -q '"done": true' "$dir/stream" || fail "the stream has no end"

heading "40 requests at once: 10 a second with a burst of 20 are let through, the rest get 429"
show "curl -i -H 'Authorization: Bearer ...' '$url/api/version?[1-40]' | grep ^HTTP/ | sort | uniq -c"
curl -si -m 10 -w '\n' -H "Authorization: Bearer $key" "$url/api/version?[1-40]" | tr -d '\r' >"$dir/answers"
grep '^HTTP/' "$dir/answers" | sort | uniq -c
grep -q '^HTTP/1.1 200' "$dir/answers" || fail "none was let through"
grep -q '^HTTP/1.1 429' "$dir/answers" || fail "no 429"
printf '\nThe first 429:\n'
sed -n '/^HTTP\/1.1 429/,$p' "$dir/answers" | sed '2,${/^HTTP\//,$d}'

heading "The log has a line for each"
await "line of the 401" "$dir/log" 'status=401' || exit 1
await "line of the stream" "$dir/log" 'path=/api/generate status=200' || exit 1
await "line of a 429" "$dir/log" 'status=429' || exit 1
! grep -q -e "$key" "$dir/log" || fail "the key is in the log"

heading "All of it was seen"
