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
from typing import NamedTuple

from releaser import layout, trusted
from releaser.config import uid_of
from releaser.identity import USER, Identity, user
from releaser.layout import Place

# Neither reads nor waits, and follows nothing, whatever it is that lies there.
LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ACL = "system.posix_acl_access"
# What the kernel keeps of an access control list: acl(5), and struct posix_acl_xattr_entry of linux/posix_acl_xattr.h.
_ACL_VERSION = struct.pack("<I", 2)
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER, _NO_ID = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF
_GROUP = 0x08


class Refused(Exception):
    """It was not done; the text says why, and what to do."""


@dataclass(frozen=True)
class Gate:
    """Who comes through the gate of a maildrop: a group, or, where that has others in it, the users of an ACL, or all."""

    gid: int | None = None
    uids: tuple[int, ...] = ()


ALL = Gate()


class Rights(NamedTuple):
    """Who may do what with a directory or a bell; an access control list grants the rest: (tag, id, permissions)."""

    uid: int
    gid: int
    mode: int
    granted: tuple[tuple[int, int, int], ...] = ()


def gate(users: tuple[str, ...], group: int | None) -> Gate:
    """The gate for USERS: GROUP, else the first one's own group, if all of it are these users; else an access control list.

    Raises Refused.
    """
    uids = []
    for name in users:
        uid = uid_of(name)
        if uid is None:
            raise Refused(f"there is no user {name!r}")
        if uid == 0:
            raise Refused("root is no customer: it would submit as everyone")
        if uid == uid_of(USER):
            raise Refused(f"{USER} is the releaser's own user, and no customer")
        uids.append(uid)
    for candidate in (group, trusted.own_group(uids[0])):
        if candidate is not None and trusted.members(candidate) == set(uids):
            return Gate(gid=candidate)
    return Gate(uids=tuple(sorted(set(uids))))


def group(name: str | None) -> int | None:
    """The gid of the group NAME, which may also be a number. Raises Refused."""
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        # The last number is the kernel's word for none.
        if name.isascii() and name.isdigit() and int(name) < _NO_ID:
            return int(name)
        raise Refused(f"there is no group {name!r}") from None


def make_spool(spool: str, state: str, identity: Identity) -> None:
    """Make whatever is missing of SPOOL and STATE; what is there stays as it is. Raises OSError."""
    make_top(spool, layout.SPOOL, identity)
    make_top(state, layout.STATE, identity)
    with Spool(spool, identity) as opened:
        if os.listdir(spool) == []:
            # An empty directory that someone else has made for us.
            give(opened.fd, wanted(layout.SPOOL, identity))
        for name, place in layout.DIRECTORIES.items():
            opened.make_directory(opened.fd, name, place)
        with opened.inside("wake") as wake:
            opened.make_bell(wake, layout.CONTROL_BELL, layout.CONTROL_BELL_PLACE, Gate())


def make_top(path: str, place: Place, identity: Identity) -> None:
    """Make SPOOL or STATE, and the way to it, unless it is there. Raises OSError."""
    if os.path.isdir(path):
        return
    _make_way(os.path.dirname(path), 0o700 if identity.private else 0o755)
    os.mkdir(path, 0o700)
    fd = os.open(path, _DIRECTORY)
    give(fd, wanted(place, identity))
    os.close(fd)


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
        # The releaser's user may go through it only, and not read it.
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

    def make_directory(self, parent: int, name: str, place: Place, gate: Gate = ALL) -> None:
        """Make NAME in PARENT, unless it is there."""
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            return
        self._give(parent, name, place, gate)

    def make_bell(self, wake: int, name: str, place: Place, gate: Gate = ALL) -> None:
        """Make the FIFO NAME in WAKE, unless it is there."""
        try:
            os.mkfifo(name, 0o600, dir_fd=wake)
        except FileExistsError:
            return
        self._give(wake, name, place, gate)

    def _give(self, parent: int, name: str, place: Place, gate: Gate) -> None:
        fd = os.open(name, LOOK, dir_fd=parent)
        try:
            give(fd, wanted(place, self.identity, gate))
        finally:
            os.close(fd)

    def make_maildrop(self, name: str, gate: Gate, bell: str, policy: bytes) -> str:
        """Make the maildrop NAME, aside; return under which name. rename_maildrop() puts it where enqueue finds it.

        Raises OSError.
        """
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
                    rights = wanted(top, self.identity, gate)
                    os.fchown(text, rights.uid, rights.gid)
                    os.fchmod(text, layout.POLICY_MODE)
                    os.fsync(text)
                give(fd, wanted(top, self.identity, gate))
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


def wanted(place: Place, identity: Identity, gate: Gate = ALL) -> Rights:
    """What a directory or a bell at PLACE is to have; who GATE lets through has what the mode says of the group."""
    if identity.private:
        return Rights(identity.uid, identity.gid, place.mode & 0o700)
    uid = {"root": 0, "releaser": identity.uid}[place.owner]
    gid = {"root": 0, "releaser": identity.gid, "customer": identity.gid if gate.gid is None else gate.gid}[place.group]
    users = [(_USER, number, place.mode >> 3 & 7) for number in sorted(gate.uids)]
    return Rights(uid, gid, place.mode, (*users, (_GROUP_OBJ, _NO_ID, 0)) if users else ())


def rights(fd: int) -> Rights:
    """What the directory or FIFO FD, which need not be open for reading, has."""
    status = os.stat(_path(fd))
    try:
        text = os.getxattr(_path(fd), _ACL)
    except OSError:
        # There is none, or the file system knows none.
        text = _ACL_VERSION
    entries = [(tag, number, may) for tag, may, number in struct.iter_unpack("<HHI", text[4:])]
    granted = sorted(entry for entry in entries if entry[0] in (_USER, _GROUP_OBJ, _GROUP))
    return Rights(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), tuple(granted))


def wrong(found: Rights, right: Rights, any_group: bool) -> str:
    """What of FOUND is not RIGHT, in words; empty where nothing is."""
    said = []
    if found.uid != right.uid or (found.gid != right.gid and not any_group):
        owners = [f"{user(each.uid)}:{group_name(each.gid)}" if not any_group else user(each.uid) for each in (found, right)]
        said.append(f"belongs to {owners[0]}, must belong to {owners[1]}")
    if found.mode != right.mode:
        said.append(f"mode {found.mode:04o}, must be {right.mode:04o}")
    if found.granted != right.granted:
        said.append(f"its access control list lets in {_granted(found)}, must let in {_granted(right)}")
    return ", ".join(said)


def _granted(rights: Rights) -> str:
    said = []
    for tag, number, may in rights.granted:
        if may:
            name = user(number) if tag == _USER else f"group {group_name(number)}" if tag == _GROUP else "its group"
            said.append(f"{name} ({may:o})")
    return ", ".join(said) or "nobody"


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"


def give(fd: int, rights: Rights) -> None:
    """Let the directory or FIFO FD have RIGHTS. Raises OSError."""
    # Mode last: a change of owner takes the set-gid bit away; it is still ours while it is too open.
    os.chown(_path(fd), rights.uid, rights.gid)
    try:
        os.removexattr(_path(fd), _ACL)
    except OSError:
        # There is none, or the file system knows none.
        pass
    os.chmod(_path(fd), rights.mode)
    if rights.granted:
        os.setxattr(_path(fd), _ACL, _acl(rights))


def _path(fd: int) -> str:
    """A name of what FD stands for, which nobody can make another's."""
    return f"/proc/self/fd/{fd}"


def _acl(rights: Rights) -> bytes:
    """An access control list: the owner's permissions, those that are granted, nothing for anyone else."""
    entries = [(_USER_OBJ, rights.mode >> 6 & 7, _NO_ID), *((tag, may, number) for tag, number, may in rights.granted)]
    entries += [(_MASK, rights.mode >> 3 & 7, _NO_ID), (_OTHER, 0, _NO_ID)]
    return _ACL_VERSION + b"".join(struct.pack("<HHI", *entry) for entry in entries)
