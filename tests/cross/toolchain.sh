#!/bin/sh
# Puts in place what `make cross ARCH=...` compiles with, on a Debian of x86_64 and as root.
#
#   toolchain.sh ARCH [DIR]
#
# ARCH is aarch64, armhf or riscv64. The compiler is this Debian's. musl and BearSSL come from its packages for that
# architecture, and are unpacked into DIR (default build/cross/ARCH), once; Debian 12 has none for riscv64: there they are
# Debian 13's.
set -eu

arch=${1:-}
dir=${2:-build/cross/$arch}
export DEBIAN_FRONTEND=noninteractive

die() {
    echo "tests/cross: $*" >&2
    exit 1
}

command -v apt-get >/dev/null || die "no apt-get: this is for Debian"
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
release=$codename
case $arch in
aarch64) debian=arm64 gnu=aarch64-linux-gnu ;;
armhf) debian=armhf gnu=arm-linux-gnueabihf ;;
riscv64)
    debian=riscv64 gnu=riscv64-linux-gnu
    [ "$codename" != bookworm ] || release=trixie
    ;;
*) die "usage: toolchain.sh aarch64|armhf|riscv64 [DIR]" ;;
esac

# The two packages, with a package list of their own: the machine's is left as it is. Where they come from and who signs
# them is what apt has for this release.
fetch() {
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/status"
    # shellcheck disable=SC2016 # apt's own variables
    site=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk -v codename="$codename" '$1 == codename && $2 == "main" { print $3; exit }')
    [ -n "$site" ] || die "apt has no 'main' of $codename"
    echo "deb $site $release main" >"$apt/sources.list"
    cat >"$apt/apt.conf" <<CONF
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
APT::Architecture "$debian";
APT::Architectures { "$debian"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
CONF
    APT_CONFIG=$apt/apt.conf apt-get update -qq
    (cd "$work" && APT_CONFIG=$apt/apt.conf apt-get download -qq musl-dev libbearssl-dev)
}

# The compiler finds musl by its specs, which name places: those are in DIR.
unpack() {
    for package in "$work"/*.deb; do
        dpkg-deb -x "$package" "$work/root"
    done
    sed -i "s#/usr/\(lib\|include\)/#$root/usr/\1/#g" "$work"/root/usr/lib/*/musl-gcc.specs
    rm -rf "$root"
    mkdir -p "${root%/*}"
    mv "$work/root" "$root"
}

dpkg -s "gcc-$gnu" >/dev/null 2>&1 || apt-get install -y -qq --no-install-recommends "gcc-$gnu"
[ ! -d "$dir/usr" ] || exit 0
root=$(realpath -m "$dir")
work=$(mktemp -d)
apt=$work/apt
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
fetch >"$work/log" 2>&1 || { cat "$work/log" >&2 && die "no musl-dev and libbearssl-dev for $debian from $release"; }
unpack
