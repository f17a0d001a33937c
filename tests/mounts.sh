#!/bin/sh
# Runs a command where / is a mount point, as mount namespaces of one's own want it. In a chroot it is none.
set -eu

if mountpoint -q /; then
    exec "$@"
fi
root=$(mktemp -d /tmp/pss-mounts.XXXXXX)
# The mount is seen outside only where the chroot lies on a shared one.
trap 'umount -lR "$root" 2>/dev/null || true; rmdir "$root"' EXIT
unshare --mount --propagation unchanged /bin/sh -euc '
    root=$1 here=$2
    shift 2
    mount --rbind / "$root"
    mount --make-rprivate "$root"
    exec chroot "$root" /bin/sh -c "cd \"\$0\" && exec \"\$@\"" "$here" "$@"
' mounts "$root" "$PWD" "$@"
