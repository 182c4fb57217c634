#!/bin/sh
# The differential test: mutated requests and responses through tinyauth, read by the parsers of others on both sides.
# N requests (default 20000, and a quarter as many responses) of SEED (default 1); TINYAUTH names the binary.
# More options go to run.py: --only INDEX repeats one request, --only-response INDEX one response.
set -eu

tinyauth=${TINYAUTH:-./tinyauth}
here=$(dirname "$0")
build=$here/build

die() {
    echo "tests/diff: $*" >&2
    exit 1
}

# The python that has the parsers is the system's own, not always the first in PATH.
python_with_parsers() {
    for python in python3 /usr/bin/python3; do
        if "$python" -c 'import h11, httptools' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    die "no python3 with h11 and httptools; install python3-h11 and python3-httptools"
}

newer() {
    [ -e "$1" ] && [ -z "$(find "$2" -newer "$1")" ]
}

[ -x "$tinyauth" ] || die "$tinyauth is not there; run make, or set TINYAUTH"
for tool in node go g++ pkg-config; do
    command -v "$tool" >/dev/null || die "$tool is not installed"
done
pkg-config --exists cpp-httplib || die "cpp-httplib is not installed (libcpp-httplib-dev)"
python=$(python_with_parsers)

mkdir -p "$build"
for program in judge_go refuse_go storm; do
    newer "$build/$program" "$here/$program.go" || GO111MODULE=off go build -o "$build/$program" "$here/$program.go"
done
if ! newer "$build/judge_cpp" "$here/judge_cpp.cc"; then
    # shellcheck disable=SC2046 # flags are words
    g++ -O1 -Wall -Wextra -o "$build/judge_cpp" "$here/judge_cpp.cc" $(pkg-config --cflags --libs cpp-httplib)
fi
sh "$here/httplib.sh" "$build/httplib" bookworm trixie forky
for release in bookworm trixie forky; do
    newer "$build/refuse_cpp_$release" "$here/refuse_cpp.cc" || g++ -Wall -Wextra -pthread -isystem "$build/httplib/$release" \
        -o "$build/refuse_cpp_$release" "$here/refuse_cpp.cc"
done

PYTHONDONTWRITEBYTECODE=1 exec "$python" "$here/run.py" --tinyauth "$tinyauth" --build "$build" \
    --requests "${N:-20000}" --seed "${SEED:-1}" "$@"
