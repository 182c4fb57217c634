#!/bin/sh
# The packages of another release and architecture of Debian, with all that they depend on, unpacked into a root.
#
#   packages.sh RELEASE ARCH DIR PACKAGE...
#
# DIR/root is the root, DIR/debs the packages; nothing is configured, no script of theirs runs. Where packages come from
# and who signs them is what apt has for this machine's release; apt's lists and state lie in DIR/apt, the machine's are left
# as they are. What is there already is kept: DIR/done names what it was made of.
set -eu

[ $# -ge 4 ] || { echo "usage: packages.sh RELEASE ARCH DIR PACKAGE..." >&2 && exit 64; }
release=$1
arch=$2
mkdir -p "$3"
dir=$(cd "$3" && pwd)
shift 3

die() {
    echo "tests/kernels: $*" >&2
    exit 1
}

# An apt of its own, which takes this machine for one of that release and architecture.
make_apt() {
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    # shellcheck disable=SC2016 # apt's own variables
    site=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk -v codename="$codename" '$1 == codename && $2 == "main" { print $3; exit }')
    [ -n "$site" ] || die "apt has no 'main' of $codename"
    mkdir -p "$dir/apt/lists/partial" "$dir/debs/partial"
    : >"$dir/apt/status"
    echo "deb $site $release main" >"$dir/apt/sources.list"
    cat >"$dir/apt/apt.conf" <<CONF
APT::Architecture "$arch";
#clear APT::Architectures;
APT::Architectures { "$arch"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Debug::NoLocking "true";
Dir::State "$dir/apt";
Dir::State::status "$dir/apt/status";
Dir::State::lists "$dir/apt/lists";
Dir::Cache "$dir/apt";
Dir::Cache::archives "$dir/debs";
Dir::Etc::sourcelist "$dir/apt/sources.list";
Dir::Etc::sourceparts "-";
CONF
    export APT_CONFIG="$dir/apt/apt.conf"
}

# /bin, /lib and /sbin are links, as on every Debian of today; what only people read is left out.
unpack() {
    rm -rf "$dir/root"
    mkdir -p "$dir/root/usr/bin" "$dir/root/usr/lib" "$dir/root/usr/lib64" "$dir/root/usr/sbin"
    ln -s usr/bin usr/lib usr/lib64 usr/sbin "$dir/root/"
    for deb in "$dir"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$dir/root" --keep-directory-symlink --no-same-owner \
            --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' --exclude='*/modules/*'
    done
}

wanted="$release $arch $*"
[ "$(cat "$dir/done" 2>/dev/null)" != "$wanted" ] || exit 0
rm -f "$dir/done"
make_apt
rm -f "$dir"/debs/*.deb
apt-get update -qq
apt-get install -y -qq --download-only "$@"
unpack
rm -rf "$dir/debs" "$dir/apt"
echo "$wanted" >"$dir/done"
