"""Making, renaming, removing and mending the spool's directories, as root or in private mode.

Root follows no path that another uid can change: it works in SPOOL, vhosts/ and wake/, which are its own, and on
descriptors below them; what it makes is made aside, under its own name, and given away last. What lies inside a
maildrop or a queue is the releaser's, and its child's work (identity.run_as).
"""

import grp
import os
import stat
import struct
from dataclasses import dataclass

from releaser import layout, trusted
from releaser.config import uid_of
from releaser.identity import Identity
from releaser.layout import Place

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ACL = "system.posix_acl_access"
# What the kernel keeps of an access control list: acl(5), and struct posix_acl_xattr_entry of linux/posix_acl_xattr.h.
_ACL_VERSION = struct.pack("<I", 2)
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER, _NO_ID = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF


class Refused(Exception):
    """It was not done; the text says why, and what to do."""


@dataclass(frozen=True)
class Gate:
    """Who comes through the gate of a maildrop: a group, or, where that has others in it, the users of an ACL, or all."""

    gid: int | None = None
    uids: tuple[int, ...] = ()


def gate(users: tuple[str, ...], group: int | None) -> Gate:
    """The gate for USERS, by GROUP or the first one's own group if it has no other members. Raises Refused."""
    uids = []
    for name in users:
        uid = uid_of(name)
        if uid is None:
            raise Refused(f"there is no user {name!r}")
        if uid == 0:
            raise Refused("root is no customer: it would submit as everyone")
        uids.append(uid)
    if group is None:
        group = trusted.own_group(uids[0])
    if group is not None and trusted.members(group) == set(uids):
        return Gate(gid=group)
    return Gate(uids=tuple(sorted(set(uids))))


def group(name: str | None) -> int | None:
    """The gid of the group NAME, which may also be a number. Raises Refused."""
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        if name.isdecimal():
            return int(name)
        raise Refused(f"there is no group {name!r}") from None


def make_spool(spool: str, state: str, identity: Identity) -> None:
    """Make whatever is missing of SPOOL and STATE; what is there stays as it is. Raises OSError."""
    for path, place in ((spool, layout.SPOOL), (state, Place("releaser", "releaser", 0o700))):
        if not os.path.isdir(path):
            _make_way(os.path.dirname(path), 0o700 if identity.private else 0o755)
            os.mkdir(path, 0o700)
            fd = os.open(path, _DIRECTORY)
            _give(fd, place, identity)
            os.close(fd)
    with Spool(spool, identity) as opened:
        if os.listdir(opened.fd) == []:
            # An empty directory that someone else has made for us.
            _give(opened.fd, layout.SPOOL, identity)
        for name, place in layout.DIRECTORIES.items():
            opened.make_directory(opened.fd, name, place)
        with opened.inside("wake") as wake:
            opened.make_bell(wake, layout.CONTROL_BELL, layout.CONTROL_BELL_PLACE, Gate())


def _make_way(directory: str, mode: int) -> None:
    if not os.path.isdir(directory):
        _make_way(os.path.dirname(directory), mode)
        os.mkdir(directory, mode)
        # Whatever the umask is: customers must come through, or nobody.
        os.chmod(directory, mode)


class Spool:
    """SPOOL, opened. With an identity that is not private, it and its vhosts/ and wake/ must be root's alone."""

    def __init__(self, spool: str, identity: Identity) -> None:
        """Raises OSError, Refused."""
        self.path = spool
        self.identity = identity
        try:
            self.fd = os.open(spool, _DIRECTORY)
        except PermissionError:
            # Who may go through it only, as the releaser's user may, can still see what lies in it by name.
            self.fd = os.open(spool, _DIRECTORY | os.O_PATH)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def inside(self, name: str) -> "_Inside":
        """SPOOL/NAME, one of vhosts and wake. Raises OSError, Refused."""
        fd = os.open(name, _DIRECTORY, dir_fd=self.fd)
        status = os.fstat(fd)
        if os.geteuid() == 0 and (status.st_uid != 0 or status.st_mode & 0o022):
            os.close(fd)
            raise Refused(f"{self.path}/{name}: must belong to root, and nobody else may write there; run: secure-sendmail check")
        return _Inside(fd)

    def make_directory(self, parent: int, name: str, place: Place, gate: Gate | None = None) -> None:
        """Make NAME in PARENT, unless it is there."""
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            return
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            self.give(fd, place, gate)
        finally:
            os.close(fd)

    def give(self, fd: int, place: Place, gate: Gate | None = None) -> None:
        _give(fd, place, self.identity, gate)

    def make_bell(self, wake: int, name: str, place: Place, gate: Gate) -> None:
        """Make the FIFO NAME in WAKE, unless it is there."""
        try:
            os.mkfifo(name, 0o600, dir_fd=wake)
        except FileExistsError:
            return
        self.give_bell(wake, name, place, gate)

    def give_bell(self, wake: int, name: str, place: Place, gate: Gate) -> None:
        """Let the FIFO NAME have owner, group and mode of PLACE; nobody else can put anything in its way."""
        uid, gid, mode = _ids(place, self.identity, gate)
        mode = layout.BELL_PRIVATE_MODE if self.identity.private else mode
        os.chown(name, uid, gid, dir_fd=wake, follow_symlinks=False)
        os.chmod(name, mode, dir_fd=wake)
        if gate.uids and not self.identity.private:
            os.setxattr(f"{self.path}/wake/{name}", _ACL, _acl(6, 2, gate.uids), follow_symlinks=False)

    def make_maildrop(self, name: str, gate: Gate, bell: str, policy: bytes) -> str:
        """Make the maildrop NAME, aside; return under which name. place() puts it where enqueue finds it. Raises OSError."""
        top = layout.UNREGISTERED_GATE if name == layout.UNREGISTERED else layout.VHOST_DIRECTORIES[""]
        bell_place = layout.UNREGISTERED_BELL if name == layout.UNREGISTERED else layout.BELL
        staging = f".{name}.new"
        with self.inside("wake") as wake:
            self.make_bell(wake, bell, bell_place, gate)
        with self.inside("vhosts") as vhosts:
            remove_tree(vhosts, staging)
            os.mkdir(staging, 0o700, dir_fd=vhosts)
            fd = os.open(staging, _DIRECTORY, dir_fd=vhosts)
            try:
                for part in ("tmp", "new"):
                    self.make_directory(fd, part, layout.VHOST_DIRECTORIES[part])
                text = os.open("policy", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fd)
                with os.fdopen(text, "wb") as stream:
                    stream.write(policy)
                    stream.flush()
                    uid, gid, _ = _ids(top, self.identity, gate)
                    os.fchown(text, uid, gid)
                    os.fchmod(text, layout.POLICY_MODE)
                    os.fsync(text)
                self.give(fd, top, gate)
            finally:
                os.close(fd)
        return staging

    def rename_maildrop(self, old: str, new: str) -> None:
        """Rename within vhosts/; NEW must not exist. Raises OSError."""
        with self.inside("vhosts") as vhosts:
            if exists(vhosts, new):
                raise FileExistsError(f"{self.path}/vhosts/{new}: exists already")
            os.rename(old, new, src_dir_fd=vhosts, dst_dir_fd=vhosts)
            os.fsync(vhosts)

    def remove_bell(self, name: str) -> None:
        with self.inside("wake") as wake:
            try:
                os.unlink(name, dir_fd=wake)
            except FileNotFoundError:
                pass


class _Inside:
    """A directory's descriptor, closed at the end of a with statement."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def exists(parent: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def remove_tree(parent: int, name: str) -> int:
    """Remove NAME in PARENT with all that is in it; return how many files that were. Gone already is fine.

    Directories can be nested deeper than any stack: each is lifted to the top before it is looked into.
    """
    try:
        top = os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return 0
    removed = 0
    try:
        waiting = ["."]
        while waiting:
            inner = waiting.pop()
            fd = os.open(inner, _DIRECTORY, dir_fd=top)
            try:
                # From here on nobody else comes in any more, also who has it open.
                os.fchown(fd, os.geteuid(), os.getegid())
                os.fchmod(fd, 0o700)
                for entry in os.listdir(fd):
                    if stat.S_ISDIR(os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode):
                        aside = f".{os.urandom(12).hex()}"
                        os.rename(entry, aside, src_dir_fd=fd, dst_dir_fd=top)
                        waiting.append(aside)
                    else:
                        os.unlink(entry, dir_fd=fd)
                        removed += 1
            finally:
                os.close(fd)
            if inner != ".":
                os.rmdir(inner, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)
    return removed


def wanted(place: Place, identity: Identity, gate: Gate | None = None) -> tuple[int, int, int]:
    """Owner, group and mode that a directory is to have."""
    return _ids(place, identity, gate)


def _ids(place: Place, identity: Identity, gate: Gate | None) -> tuple[int, int, int]:
    if identity.private:
        return identity.uid, identity.gid, layout.PRIVATE_MODE
    customer = gate.gid if gate is not None and gate.gid is not None else identity.gid
    uid = {"root": 0, "releaser": identity.uid}[place.owner]
    gid = {"root": 0, "releaser": identity.gid, "customer": customer}[place.group]
    return uid, gid, place.mode


def _give(fd: int, place: Place, identity: Identity, gate: Gate | None = None) -> None:
    """Let the directory FD have owner, group, mode and access control list as PLACE and GATE say."""
    uid, gid, mode = _ids(place, identity, gate)
    # Mode last: a change of owner takes the set-gid bit away; the directory is still ours while it is too open.
    os.fchown(fd, uid, gid)
    remove_acl(fd)
    os.fchmod(fd, mode)
    if gate is not None and gate.uids and not identity.private:
        os.setxattr(fd, _ACL, _acl(7, 1, gate.uids))


def acl_users(fd: int) -> tuple[int, ...]:
    """The users whom the access control list of the directory FD names; none where it has none."""
    try:
        text = os.getxattr(fd, _ACL)
    except OSError:
        return ()
    entries = struct.iter_unpack("<HHI", text[4:])
    return tuple(sorted(uid for tag, _, uid in entries if tag == _USER))


def remove_acl(fd: int) -> None:
    try:
        os.removexattr(fd, _ACL)
    except OSError:
        # There is none, or the file system knows none.
        pass


def _acl(owner: int, users: int, uids: tuple[int, ...]) -> bytes:
    """An access control list: OWNER's permissions, those of each of UIDS, nothing for anyone else."""
    entries = [(_USER_OBJ, owner, _NO_ID), *((_USER, users, uid) for uid in sorted(uids))]
    entries += [(_GROUP_OBJ, 0, _NO_ID), (_MASK, users, _NO_ID), (_OTHER, 0, _NO_ID)]
    return _ACL_VERSION + b"".join(struct.pack("<HHI", *entry) for entry in entries)
