#!/usr/bin/env bash
# Makes the model servers that tests/real/run.py starts, and their models.
#
#     bash tests/real/make.sh [DIR]
#
# DIR (default build/real) keeps what was made: the next run takes it as it is.
#   root                  a root of Debian testing with llama-server, and the C++ headers that Ollama wants
#   ollama                Ollama, from its Go module, of the version below
#   root/real/tiny.gguf   a model that answers at once
#   root/real/slow.gguf   one that takes some milliseconds for a token
#   root/real/gate.so     what holds llama-server while it loads
# Wants root, debootstrap, gcc, g++ and Go. What cannot be had ends this with status 1.
set -eu

OLLAMA=v0.17.4
GO=go1.24.1                 # what its module names
SUITE=testing
PACKAGES=llama.cpp-tools,nlohmann-json3-dev,libstb-dev,libminiaudio-dev

cd "$(dirname "$0")/../.."
mkdir -p "${1:-build/real}"
dir=$(cd "${1:-build/real}" && pwd)
exec 9>"$dir/lock"
flock 9

# quietly NAME COMMAND...: its output is shown only if it fails.
quietly() {
    local name=$1 began=$SECONDS
    shift
    "$@" >"$dir/$name.log" 2>&1 </dev/null &
    wait $! || {
        tail -n 40 "$dir/$name.log"
        echo "real: $name could not be made" >&2
        exit 1
    }
    echo "real: $name made in $((SECONDS - began)) s"
}

make_root() {
    rm -rf "$dir/root.new"
    debootstrap --variant=minbase --include=$PACKAGES $SUITE "$dir/root.new"
    rm -f "$dir"/root.new/var/cache/apt/archives/*.deb
    mv "$dir/root.new" "$dir/root"
}

# The go command that runs: the system's, which fetches what a module names; before 1.21 it cannot, and Go itself is a module, too.
go_command() {
    local module
    if go version | grep -qE 'go1\.(2[1-9]|[3-9][0-9])'; then
        command -v go
        return
    fi
    if [ ! -x "$dir/go/bin/go" ]; then
        module=golang.org/toolchain@v0.0.1-$GO.linux-$(dpkg --print-architecture)
        (cd "$dir" && go mod download "$module")
        rm -rf "$dir/go"
        cp -r "$(go env GOMODCACHE)/$module" "$dir/go"
        chmod -R u+w "$dir/go"
        chmod +x "$dir"/go/bin/* "$dir"/go/pkg/tool/*/*
    fi
    echo "$dir/go/bin/go"
}

# A Go module carries no `vendor` folders, which is where Ollama keeps these headers.
make_ollama() {
    local headers=$dir/headers usr=$dir/root/usr/include go
    go=$(go_command)
    rm -rf "$headers"
    mkdir -p "$headers/miniaudio" "$dir/bin"
    cp -r "$usr/nlohmann" "$usr/stb" "$headers"
    find "$usr" -name miniaudio.h -exec cp {} "$headers/miniaudio" \;
    GOBIN=$dir/bin CGO_ENABLED=1 CGO_CPPFLAGS=-I$headers CGO_CXXFLAGS=-O1 nice -n 5 "$go" install "github.com/ollama/ollama@$OLLAMA"
    mv "$dir/bin/ollama" "$dir/ollama-$OLLAMA"
    ln -sfn "ollama-$OLLAMA" "$dir/ollama"
}

make_models() {
    local real=$dir/root/real
    mkdir -p "$real"
    gcc -shared -fPIC -O1 -o "$real/gate.so" tests/real/gate.c
    python3 tests/real/gguf.py "$real/tiny.gguf"
    python3 tests/real/gguf.py "$real/slow.gguf" --slow
    touch "$real/made"
}

[ -x "$dir/root/usr/bin/llama-server" ] || quietly root make_root
[ "$(readlink "$dir/ollama")" = "ollama-$OLLAMA" ] || quietly ollama make_ollama
for source in make.sh gguf.py gate.c; do
    [ "tests/real/$source" -ot "$dir/root/real/made" ] || stale=1
done
[ -z "${stale:-}" ] || quietly models make_models
