#!/bin/sh
# Real clients (openai, @langchain/openai, ollama, curl) against tinyauth, in front of a stand-in model and of uvicorn.
# TINYAUTH names the binary (default ./tinyauth, seen from where this is called).
set -eu

tinyauth=${TINYAUTH:-./tinyauth}
case $tinyauth in
/*) ;;
*) tinyauth=$PWD/$tinyauth ;;
esac
cd "$(dirname "$0")"

die() {
    echo "tests/clients: $*" >&2
    exit 1
}

# The python that has uvicorn is the system's own, not always the first in PATH.
python_with_uvicorn() {
    for python in python3 /usr/bin/python3; do
        if "$python" -c 'import uvicorn' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    die "no python3 with uvicorn; install python3-uvicorn"
}

[ -x "$tinyauth" ] || die "$tinyauth is not there; run make, or set TINYAUTH"
for tool in node npm curl; do
    command -v "$tool" >/dev/null || die "$tool is not installed"
done
python=$(python_with_uvicorn)

# npm writes node_modules/.package-lock.json last, so its age is the age of the whole tree.
installed=node_modules/.package-lock.json
if [ ! -e "$installed" ] || [ -n "$(find package-lock.json -newer "$installed")" ]; then
    npm ci --no-audit --no-fund --loglevel=error
    touch "$installed"
fi

exec node main.mjs "$tinyauth" "$python"
