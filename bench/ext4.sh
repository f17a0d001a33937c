#!/bin/sh
# Runs a command with an ext4 of its own on /tmp, made by mkfs.ext4 as Debian's installer does it, journal included: what a
# sync costs depends on the file system most of all, and some machines have one that nobody installs.
# Usage: ext4.sh COMMAND...
set -eu

mkdir -p var
image=$(mktemp var/ext4.XXXXXX)
trap 'rm -f "$image"' EXIT
# As much as the full run needs, and no byte of the disk before it is written.
truncate -s 48G "$image"
PATH=$PATH:/usr/sbin:/sbin mkfs.ext4 -q -F "$image"
# The mount ends with the last process that sees it.
unshare --mount /bin/sh -euc '
    image=$1
    shift
    mount --bind "$PWD" /mnt
    mount -o loop "$image" /tmp || { echo "bench: no loop device; or: make bench FS=here" >&2; exit 1; }
    chmod 1777 /tmp
    # A project below /tmp is put where it was.
    case $PWD/ in /tmp/*)
        mkdir -p "$PWD"
        mount --move /mnt "$PWD"
        cd "$PWD"
    esac
    exec "$@"
' ext4 "$image" "$@"
