#!/bin/sh
# Puts in place what `make cross ARCH=...` compiles with, on a Debian of x86_64 and as root.
#
#   toolchain.sh ARCH [DIR]
#
# aarch64 and armhf: Debian's cross compiler, and musl and BearSSL of that architecture by multi-arch, in their places.
# riscv64, for which Debian 12 has a compiler but neither of the two libraries: they are compiled from Debian's own
# source packages, once, into DIR (default build/cross/riscv64).
set -eu

arch=${1:-}
dir=${2:-build/cross/riscv64}
export DEBIAN_FRONTEND=noninteractive

die() {
    echo "tests/cross: $*" >&2
    exit 1
}

install() {
    dpkg -s "$@" >/dev/null 2>&1 || apt-get install -y -qq --no-install-recommends "$@"
}

# Debian's name of the architecture, and its compiler.
multiarch() {
    if ! dpkg --print-foreign-architectures | grep -qx "$1"; then
        dpkg --add-architecture "$1"
        # an index of other places, for an architecture that they do not have, may be missing
        apt-get update -qq || true
    fi
    install "$2" "musl-dev:$1" "libbearssl-dev:$1"
}

# The source packages of musl and BearSSL, with a package list of their own: the machine's is left as it is. Where they
# come from and who signs them is what apt has for this release.
fetch_sources() {
    apt=$work/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/status"
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    # shellcheck disable=SC2016 # apt's own variables
    site=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk -v codename="$codename" '$1 == codename && $2 == "main" { print $3; exit }')
    [ -n "$site" ] || die "apt has no 'main' of $codename"
    echo "deb-src $site $codename main" >"$apt/sources.list"
    cat >"$apt/apt.conf" <<CONF
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
APT::Sandbox::User "root";
CONF
    APT_CONFIG=$apt/apt.conf apt-get update -qq
    (cd "$work" && APT_CONFIG=$apt/apt.conf apt-get source -qq --download-only musl bearssl)
    dpkg-source -x "$work"/musl_*.dsc "$work/musl"
    dpkg-source -x "$work"/bearssl_*.dsc "$work/bearssl"
}

build_musl() {
    cd "$work/musl"
    ./configure --target=riscv64-linux-musl CC=riscv64-linux-gnu-gcc CROSS_COMPILE=riscv64-linux-gnu- \
        --prefix="$prefix" --syslibdir="$prefix/lib" --disable-shared --enable-wrapper=gcc
    make -j2
    make install
}

# As Debian does, but with this musl's headers; ar without times, so that two builds are the same.
build_bearssl() {
    cd "$work/bearssl"
    make -j2 CC="riscv64-linux-gnu-gcc -specs $prefix/lib/musl-gcc.specs" AR=riscv64-linux-gnu-ar ARFLAGS=-rcsD \
        CFLAGS="-W -Wall -Os -fPIC -ffile-prefix-map=$work=." build/libbearssl.a
    mkdir -p "$prefix/include/bearssl"
    cp inc/*.h "$prefix/include/bearssl"
    cp build/libbearssl.a "$prefix/lib"
}

from_source() {
    [ ! -e "$dir/lib/libbearssl.a" ] || return 0
    install gcc-riscv64-linux-gnu dpkg-dev make
    mkdir -p "$dir"
    prefix=$(cd "$dir" && pwd)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    # each in a shell of its own, in which set -e holds
    (fetch_sources) >"$work/log" 2>&1 || { tail -n 20 "$work/log" && die "no sources of musl and BearSSL"; }
    (build_musl) >"$work/log" 2>&1 || { tail -n 20 "$work/log" && die "musl does not build"; }
    (build_bearssl) >"$work/log" 2>&1 || { tail -n 20 "$work/log" && die "BearSSL does not build"; }
}

command -v apt-get >/dev/null || die "no apt-get: this is for Debian"
case $arch in
aarch64) multiarch arm64 gcc-aarch64-linux-gnu ;;
armhf) multiarch armhf gcc-arm-linux-gnueabihf ;;
riscv64) from_source ;;
*) die "usage: toolchain.sh aarch64|armhf|riscv64 [DIR]" ;;
esac
