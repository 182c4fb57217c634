#!/bin/bash
# The container image: the last stage of contrib/Containerfile, built by buildah from scratch around the built binary, its
# size and settings; then its root, entered as the numeric user with nothing mounted, serves (entry.py), and passes the
# end-to-end tests with nothing mounted but the directory that their keys are in.
#
#   run.sh [--tinyauth BIN] [-v] [PATTERN]
#
# PATTERN picks tests of entry.py by a part of their name; then those alone run. Needs root, buildah and unshare; without them nothing is tested.
# The first stage, which compiles on Alpine, takes a registry and is not built here. The last line is `N passed, N failed`.
set -u

here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
tinyauth=./tinyauth
verbose=
most=$((266 * 1024))                    # bytes of the image's layer: the binary's 256 KB, in a tar
passed=0
failed=0

skip() {
    echo "tests/image: skipped: $*"
    echo "0 passed, 0 failed"
    exit 0
}

usage() {
    sed -n 's/^#   run\.sh/usage: run.sh/p' "$0" >&2
    exit 64
}

while [ $# -gt 0 ]; do
    case $1 in
    --tinyauth)
        [ $# -gt 1 ] || usage
        tinyauth=$2
        shift
        ;;
    -v) verbose=-v ;;
    -*) usage ;;
    *) break ;;
    esac
    shift
done
[ $# -le 1 ] || usage
pattern=${1:-}

[ "$(id -u)" -eq 0 ] || skip "not root"
for tool in buildah unshare nsenter python3 strip; do
    command -v "$tool" >/dev/null || skip "no $tool"
done

work=$(mktemp -d) || exit 1

images() {
    buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"
}

# shellcheck disable=SC2317 # called by the trap
clean_up() {
    images rm --all >/dev/null 2>&1
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

# verdict NAME STATUS [TEXT]: counts one test.
verdict() {
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
        [ -z "$verbose" ] || echo "ok      $1${3:+ ($3)}"
    else
        failed=$((failed + 1))
        echo "FAILED  $1${3:+: $3}"
    fi
}

finish() {
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
}

# The shipped file from its last FROM on, with the binary from here instead of the first stage.
make_context() {
    mkdir "$work/context" || exit 1
    cp "$tinyauth" "$work/context/tinyauth" && strip "$work/context/tinyauth" || return 1
    sed -n '/^FROM scratch/,$p' "$project/contrib/Containerfile" |
        sed 's|^COPY --from=build /src/tinyauth |COPY tinyauth |' >"$work/context/Containerfile"
    grep -q '^COPY tinyauth /tinyauth$' "$work/context/Containerfile"
}

build() {
    images build --isolation chroot --format docker --quiet --file "$work/context/Containerfile" --tag tinyauth:test \
        "$work/context" >"$work/build" 2>&1
}

# The layer's uncompressed size, as the image's own tar.
layer_size() {
    images push --quiet tinyauth:test "docker-archive:$work/image.tar:tinyauth:test" >/dev/null 2>&1 &&
        tar -xOf "$work/image.tar" --wildcards '*.tar' | wc -c
}

setting() {
    images inspect --type image --format "$1" tinyauth:test
}

check_settings() {
    local got want
    while IFS='|' read -r name format want; do
        got=$(setting "$format")
        [ "$got" = "$want" ]
        verdict "$name" $? "$got"
    done <<'SETTINGS'
user|{{.Docker.Config.User}}|65534:65534
entry|{{.Docker.Config.Entrypoint}}|[/tinyauth]
port|{{.Docker.Config.ExposedPorts}}|map[21434/tcp:{}]
health check|{{.Docker.Config.Healthcheck.Test}}|[CMD /tinyauth check --url http://127.0.0.1:21434/health]
SETTINGS
}

make_context
verdict "contrib/Containerfile" $?
build
verdict "build" $? "$(tail -n 3 "$work/build")"
[ "$failed" -eq 0 ] || finish

size=$(layer_size)
expr "${size:-0}" \> 0 \& "${size:-0}" \<= $most >/dev/null
verdict "image of at most $most bytes" $? "$size bytes"
check_settings

container=$(images from tinyauth:test) && root=$(images mount "$container")
inside=$(find "$root" -mindepth 1 | tr '\n' ' ')
test "$inside" = "$root/tinyauth "
verdict "nothing but the binary in it" $? "$inside"

# counted FILE: adds the last line of a test program's output.
counted() {
    counts=$(tail -n 1 "$1" | sed -nE 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p')
    [ -n "$counts" ] || counts="0 1"
    cat "$1"
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
}

# its own network, in which the model and the clients are too, and its own mounts
unshare --net --mount --propagation private python3 "$here/entry.py" --root "$root" ${verbose:+"$verbose"} "$pattern" \
    >"$work/output" 2>&1
counted "$work/output"

# The end-to-end tests, with nothing in the root but the binary and the directory that their keys are in.
if [ -z "$pattern" ]; then
    mkdir "$work/lab" && cp "$root/tinyauth" "$work/lab/tinyauth" && mkdir -p "$root$work/lab" || exit 1
    TMPDIR=$work/lab python3 "$here/../e2e.py" --tinyauth "$work/lab/tinyauth" --no-measure ${verbose:+"$verbose"} \
        --enter "$here/enter.sh $root $work/lab" >"$work/output" 2>&1
    counted "$work/output"
fi
finish
