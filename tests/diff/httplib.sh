#!/bin/sh
# Puts cpp-httplib of other Debian releases, which llama-server may have been built with, into DIR/RELEASE/httplib.h.
#
#   httplib.sh DIR RELEASE...
#
# They come as Debian's own source packages, by a package list of their own: the machine's is left as it is. Where they come
# from and who signs them is what apt has for this release.
set -eu

dir=$1
shift

die() {
    echo "tests/diff: $*" >&2
    exit 1
}

fetch() {
    mkdir -p lists/partial cache/archives/partial
    : >status
    echo "deb-src $site $1 main" >sources.list
    cat >apt.conf <<CONF
Dir::State "$PWD";
Dir::State::status "$PWD/status";
Dir::State::lists "$PWD/lists";
Dir::Cache "$PWD/cache";
Dir::Etc::sourcelist "$PWD/sources.list";
Dir::Etc::sourceparts "-";
APT::Sandbox::User "root";
CONF
    APT_CONFIG=$PWD/apt.conf apt-get update -qq
    APT_CONFIG=$PWD/apt.conf apt-get source -qq --download-only cpp-httplib
    dpkg-source -x cpp-httplib_*.dsc source
}

command -v apt-get >/dev/null || die "no apt-get: cpp-httplib of other releases comes from Debian"
command -v dpkg-source >/dev/null || die "dpkg-source is not installed (dpkg-dev)"
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
# shellcheck disable=SC2016 # apt's own variables
site=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
    awk -v codename="$codename" '$1 == codename && $2 == "main" { print $3; exit }')
[ -n "$site" ] || die "apt has no 'main' of $codename"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
for release; do
    [ ! -e "$dir/$release/httplib.h" ] || continue
    mkdir -p "$work/$release" "$dir/$release"
    # in a shell of its own, in which set -e holds
    (cd "$work/$release" && fetch "$release") >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2 && die "no cpp-httplib of $release"; }
    cp "$work/$release/source/httplib.h" "$dir/$release/httplib.h"
done
