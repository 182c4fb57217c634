#!/bin/bash
# The shipped units under a real systemd: a Debian in a container of systemd-nspawn, with its own network, in which
# inside.py does the testing.
#
#   run.sh [--tinyauth BIN] [--root DIR] [--suite SUITE] [-v] [PATTERN]
#
# DIR (default build/systemd-SUITE) holds the Debian root, which is made once (tests/releases/root.sh) and never written to
# again; SUITE is a Debian release: bookworm (the default), whose systemd is 252, or trixie, with 257. PATTERN picks tests by a
# part of their name. Needs root, debootstrap and systemd-container; without them it fails. The last line is `N passed, N failed`.
set -u

here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
tinyauth=./tinyauth
suite=bookworm
root=
verbose=
packages=(systemd systemd-sysv dbus python3 openssl iproute2)
limit=600                               # seconds for the container, its boot included

fail() {
    echo "FAILED  tests/systemd: $*"
    echo "0 passed, 1 failed"
    exit 1
}

usage() {
    sed -n 's/^#   run\.sh/usage: run.sh/p' "$0" >&2
    exit 64
}

while [ $# -gt 0 ]; do
    case $1 in
    --tinyauth | --root | --suite)
        [ $# -gt 1 ] || usage
        printf -v "${1#--}" %s "$2"
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
root=${root:-$project/build/systemd-$suite}

[ "$(id -u)" -eq 0 ] || fail "not root"
command -v systemd-nspawn >/dev/null || fail "no systemd-nspawn; install systemd-container"
[ -x "$tinyauth" ] || fail "no $tinyauth; build it with make"

work=$(mktemp -d) || exit 1
container=
timer=
cgroups=()
machine=tinyauth-test-$$

# Every way out ends here. The container outlives an nspawn that is killed, so its first process, nspawn's child, is.
# shellcheck disable=SC2317 # called by the trap
clean_up() {
    if [ -n "$container" ]; then
        read -ra leader <"/proc/$container/task/$container/children"
        kill -KILL "${leader[@]}" "$container" 2>/dev/null
        wait "$container" 2>/dev/null
    fi
    [ -z "$timer" ] || kill "$timer" 2>/dev/null
    remove_cgroups
    # nspawn means to do it and does not where /run is on a disk
    rmdir "/run/systemd/nspawn/propagate/$machine" 2>/dev/null
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

make_root() {
    [ ! -d "$root" ] || return 0
    echo "making a Debian $suite in $root"
    "$project/tests/releases/root.sh" "$suite" "$root" "${packages[@]}" >"$work/root" 2>&1 && return
    tail -n 20 "$work/root"
    fail "no root"
}

# What the container needs of the project, apart from the project.
stage() {
    mkdir -p "$work/stage/tests" "$work/results"
    cp "$tinyauth" "$work/stage/tinyauth" || exit 1
    cp -r "$project/contrib" "$work/stage/contrib" || exit 1
    (cd "$project/tests" && cp --parents ./*.py systemd/*.py tls/*.py "$work/stage/tests/") || exit 1
    cat >"$work/test.service" <<UNIT
[Unit]
Description=Tests of tinyauth
After=multi-user.target
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=exec
ExecStart=/usr/bin/python3 /stage/tests/systemd/inside.py $verbose $pattern
StandardOutput=file:/results/output
StandardError=inherit
UNIT
}

# Where this machine's init is systemd, it makes a scope for the container and removes it. Elsewhere the container is put in
# groups of our own, which we remove: a directory in each hierarchy that nspawn uses.
enter_cgroups() {
    local controllers path mount
    while IFS=: read -r _ controllers path; do
        case $controllers in
        "") mount=$(findmnt -n -t cgroup2 -o TARGET | head -n 1) ;;
        name=systemd) mount=$(findmnt -n -t cgroup -O name=systemd -o TARGET | head -n 1) ;;
        *) continue ;;
        esac
        [ -n "$mount" ] || continue
        mkdir "$mount$path/tinyauth-test.$$" && cgroups+=("$mount$path/tinyauth-test.$$")
    done </proc/self/cgroup
    for path in "${cgroups[@]}"; do
        echo "$BASHPID" >"$path/cgroup.procs"
    done
}

remove_cgroups() {
    local path tries
    for path in "${cgroups[@]}"; do
        echo $$ >"${path%/*}/cgroup.procs"
        tries=0
        until [ ! -d "$path" ] || { find "$path" -depth -type d -exec rmdir {} + 2>/dev/null; } || [ $((tries += 1)) -gt 50 ]; do
            sleep 0.1               # killed processes leave a group when they are reaped
        done
    done
}

boot() {
    local arguments=(--quiet --boot "--directory=$root" --volatile=overlay --private-network --link-journal=no
        "--machine=$machine" --console=read-only --system-call-filter=bpf "--bind-ro=$work/stage:/stage" "--bind=$work/results:/results"
        "--bind-ro=$work/test.service:/etc/systemd/system/tinyauth-test.service")
    if [ ! -d /run/systemd/system ]; then
        enter_cgroups
        arguments+=(--register=no --keep-unit)
    fi
    # With a hierarchy that address rules can be attached to, also where this machine has the old ones, and with bpf(2).
    SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn "${arguments[@]}" systemd.wants=tinyauth-test.service \
        </dev/null >"$work/console" 2>&1 &
    container=$!
}

make_root
stage
boot
sleep "$limit" &
timer=$!
wait -n "$container" "$timer"
late=
if kill -0 "$container" 2>/dev/null; then
    late="not done after $limit s"
else
    container=
fi

[ ! -e "$work/results/output" ] || cat "$work/results/output"
if [ -n "$late" ] || ! tail -n 1 "$work/results/output" 2>/dev/null | grep -qE '^[0-9]+ passed, [0-9]+ failed$'; then
    tail -n 20 "$work/console"
    fail "${late:-the container ended without a result}"
fi
tail -n 1 "$work/results/output" | grep -q ' 0 failed$'
