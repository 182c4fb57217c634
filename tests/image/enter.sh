#!/bin/sh
# Runs a command in the root of an image, in which DIR is mounted at its own place and nothing else is.
#
#   enter.sh ROOT DIR COMMAND...
#
# The process is the one that was started, with its descriptors and, when it is in DIR, its working directory.
# shellcheck disable=SC2016 # expanded by the inner shell
exec unshare --mount --propagation private sh -c '
    root=$1 dir=$2
    shift 2
    case $PWD in
    "$dir" | "$dir"/*) ;;
    *) cd / ;;
    esac
    mount --bind "$dir" "$root$dir" && exec unshare --root="$root" --wd="$PWD" -- "$@"
' sh "$@"
