#!/bin/sh
# The differential test: mutated requests and responses through tinyauth, read by the parsers of others on both sides; then
# requests hidden in bodies that servers leave unread.
# N requests (default 20000, and a quarter as many responses) of SEED (default 1); TINYAUTH names the binary.
# More options go to run.py: --only INDEX repeats one request, --only-response INDEX one response, --only-server NAME what
# hides, in front of such servers.
set -eu

tinyauth=${TINYAUTH:-./tinyauth}
here=$(dirname "$0")
build=$here/build
# Debian's cpp-httplib: 0.11, 0.18, and one that reads what its handlers left.
releases="bookworm trixie forky"

die() {
    echo "tests/diff: $*" >&2
    exit 1
}

# The python that has the parsers is the system's own, not always the first in PATH.
python_with_parsers() {
    for python in python3 /usr/bin/python3; do
        if "$python" -c 'import h11, httptools, uvicorn' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    die "no python3 with h11, httptools and uvicorn; install python3-h11, python3-httptools and python3-uvicorn"
}

# compile OUTPUT SOURCE COMMAND...: in the background, and only what is not there yet.
compile() {
    output=$1 source=$2
    shift 2
    if [ -e "$output" ] && [ -z "$(find "$source" -newer "$output")" ]; then
        return
    fi
    "$@" -o "$output" "$source" &
    jobs="$jobs $!"
}

[ -x "$tinyauth" ] || die "$tinyauth is not there; run make, or set TINYAUTH"
for tool in node go g++; do
    command -v "$tool" >/dev/null || die "$tool is not installed"
done
python=$(python_with_parsers)

mkdir -p "$build"
# shellcheck disable=SC2086 # releases are words
sh "$here/httplib.sh" "$build/httplib" $releases
jobs=""
for program in judge_go refuse_go storm; do
    compile "$build/$program" "$here/$program.go" env GO111MODULE=off go build
done
for release in $releases; do
    first=$([ "$release" = bookworm ] && echo 1 || echo 0)
    for program in judge_cpp refuse_cpp; do
        compile "$build/${program}_$release" "$here/$program.cc" \
            g++ -Wall -Wextra -pthread "-DFIRST=$first" -isystem "$build/httplib/$release"
    done
done
for job in $jobs; do
    wait "$job" || die "a program does not compile"
done

PYTHONDONTWRITEBYTECODE=1 exec "$python" "$here/run.py" --tinyauth "$tinyauth" --build "$build" \
    --requests "${N:-20000}" --seed "${SEED:-1}" "$@"
