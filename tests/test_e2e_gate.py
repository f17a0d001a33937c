"""Who may submit for which vhost, who can see whose mail, and what the kernel's word is worth against a claim."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import smtp
from servers import Sink
from system import DAEMON, SHARED, System

pytestmark = pytest.mark.server

C1, C2, NOBODY_S = "www.c1.example", "www.c2.example", "www.nobody.example"
UNREGISTERED = "_unregistered"
NOPERM, CONFIG = 77, 78
STRANGER = "12345"

# What a user can do to each of the paths in the standard input.
PROBE = """
import json, os, sys

done = {"listed": [], "read": [], "written": [], "moved": []}
for path in json.load(sys.stdin):
    for what, attempt in (
        ("listed", lambda: os.listdir(path)),
        ("read", lambda: os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 1)),
        ("written", lambda: os.chdir("/" if os.access(path, os.W_OK) else "/nowhere")),
        ("moved", lambda: os.rename(path, path + ".moved")),
    ):
        try:
            attempt()
        except OSError:
            continue
        done[what].append(path)
print(json.dumps(done))
"""

# Submits by hand, into the maildrop $1, the message in the standard input.
BY_HAND = """
import os, sys

text = sys.stdin.buffer.read()
name = f"{sys.argv[1]}/new/1795376167.{os.getpid():06}.P{os.getpid()}.{os.urandom(12).hex()},S={len(text)}"
os.umask(0o027)
with open(name, "xb") as file:
    file.write(text)
"""

# Submits a message of each of the vhosts in the standard input.
MANY_BY_HAND = """
import os, sys

os.umask(0o027)
for vhost in sys.stdin.read().split():
    text = f"Layout: 1\\nVhost: {vhost}\\nSender: user@x.example\\nRecipient: one@x.example\\n\\nTo: one@x.example\\n\\ntext\\n"
    name = f"{sys.argv[1]}/new/1795376167.{os.getpid():06}.P{os.getpid()}.{os.urandom(12).hex()},S={len(text)}"
    with open(name, "x") as file:
        file.write(text)
"""


def by_hand(system: System, user: str, maildrop: str, vhost: str, subject: str, uid: int = 0) -> None:
    """Puts a message into new/ with a claim of its own, past enqueue."""
    header = f"From: user@{vhost}\nTo: one@x.example\nSubject: {subject}\nMessage-ID: <{subject}@{vhost}>\n"
    envelope = f"Layout: 1\nVhost: {vhost}\nSender: user@{vhost}\nRecipient: one@x.example\nUid: {uid}\n"
    system.python(BY_HAND, system.spool / "vhosts" / maildrop, user=user, input=f"{envelope}\n{header}\ntext\n")


def entries(top: Path) -> list[str]:
    return [str(top), *sorted(os.path.join(place, name) for place, dirs, files in os.walk(top) for name in (*dirs, *files))]


def names(status: os.stat_result, system: System) -> tuple[str, str, int]:
    """Owner, group and mode, as a person names them."""
    ours = {uid: name for name, uid in system.uids.items()}
    user = ours.get(status.st_uid) or pwd.getpwuid(status.st_uid).pw_name
    group = ours.get(status.st_gid) or grp.getgrgid(status.st_gid).gr_name
    return user, group, stat.S_IMODE(status.st_mode)


def bell(system: System, maildrop: str) -> Path:
    """The bell that the maildrop's policy names."""
    lines = (system.spool / "vhosts" / maildrop / "policy").read_text().splitlines()
    (name,) = [line.removeprefix("Bell: ") for line in lines if line.startswith("Bell: ")]
    return system.spool / "wake" / name


def outcome(system: System, subject: str) -> tuple[str, str, int, int]:
    """Event, vhost, uid and verified of the one row that a message has in the log."""
    (row,) = [row for row in system.rows() if row["subject"] == subject]
    return row["event"], row["vhost"], row["uid"], row["verified"]


@pytest.fixture
def system() -> Iterator[System]:
    """Each customer has a vhost, and there is no maildrop for others; the releaser is not started."""
    with System() as made:
        made.register(C1, "c1")
        made.register(C2, "c2")
        yield made


def test_modes_of_a_spool_for_many(system: System) -> None:
    """Every directory has the owner, the group and the mode that the gates rest on."""
    system.cli("vhost", "add", "--unregistered")
    daemon = DAEMON
    wanted = {
        "": ("root", "root", 0o711),
        "vhosts": ("root", daemon, 0o751),
        "wake": ("root", daemon, 0o751),
        f"vhosts/{C1}": (daemon, "c1", 0o2710),
        f"vhosts/{C2}": (daemon, "c2", 0o2710),
        f"vhosts/{UNREGISTERED}": (daemon, daemon, 0o2711),
        **{name: (daemon, daemon, 0o700) for name in ("active", "hold", "failed", "corrupt", "trash")},
        **{f"vhosts/{v}/{name}": (daemon, daemon, 0o3733) for v in (C1, C2, UNREGISTERED) for name in ("tmp", "new")},
    }
    found = {name: names(os.stat(system.spool / name), system) for name in wanted}
    assert found == wanted
    assert names(os.stat(system.state), system)[::2] == (daemon, 0o700)
    for vhost, customer in ((C1, "c1"), (C2, "c2")):
        assert names(bell(system, vhost).stat(), system) == (daemon, customer, 0o620)
        assert stat.S_ISFIFO(bell(system, vhost).stat().st_mode)
        assert stat.S_IMODE((system.spool / "vhosts" / vhost / "policy").stat().st_mode) == 0o644
    (kept,) = [path for path in (system.config.parent / "vhosts.d").iterdir() if path.name == f"{C1}.toml"]
    assert tomllib.loads(kept.read_text()) == {"users": ["c1"]}


def test_spool_and_state_are_made_where_missing() -> None:
    """The first `vhost add` makes them as they must be, and `check` finds nothing to repair."""
    with System(spool_is_there=False) as system:
        assert not system.spool.exists() and not system.state.exists()
        system.register(C1, "c1")
        assert names(system.spool.stat(), system) == ("root", "root", 0o711)
        assert names(system.state.stat(), system) == (DAEMON, DAEMON, 0o700)
        system.cli("check")
        system.send(C1, user="c1")
        with system.running():
            system.wait_for_mail(1)


def test_gate_admits_the_vhosts_user_only(system: System) -> None:
    """Each customer can submit to his own vhost; everyone else, root included, is refused with 77 and leaves nothing."""
    everyone = ("c1", "c2", SHARED, STRANGER, "root")
    with_and_without = []
    for _ in range(2):
        with_and_without.append({(user, vhost): system.enqueue(vhost, "-t", user=user).returncode
                                 for user in everyone for vhost in (C1, C2)})  # fmt: skip
        # Where there is a maildrop for whoever is not registered, it opens no other.
        system.cli("vhost", "add", "--unregistered", check=False)
    admitted = {("c1", C1), ("c2", C2)}
    wanted = {(user, vhost): 0 if (user, vhost) in admitted else NOPERM for user in everyone for vhost in (C1, C2)}
    assert with_and_without == [wanted, wanted]
    assert len(system.ls()) == 4
    with system.running():
        system.wait_for_mail(4)
        system.wait_until_idle()
    owners = {(row["event"], row["vhost"], row["uid"], row["verified"]) for row in system.rows()}
    assert owners == {("released", C1, system.uids["c1"], 1), ("released", C2, system.uids["c2"], 1)}


def test_unknown_vhost_needs_the_unregistered_maildrop(system: System) -> None:
    """Without it 78, with it whoever is not root is accepted, under the name he claims and as the kernel knows him."""
    assert [system.enqueue(NOBODY_S, "-t", user=user).returncode for user in ("c1", SHARED, STRANGER)] == [CONFIG] * 3
    system.cli("vhost", "add", "--unregistered")
    senders = {"c1": system.uids["c1"], SHARED: pwd.getpwnam(SHARED).pw_uid, STRANGER: int(STRANGER)}
    for user in senders:
        system.submit(NOBODY_S, user, user)
    assert system.enqueue(NOBODY_S, "-t", user="root").returncode == NOPERM
    with system.running():
        system.wait_for_mail(3)
        system.wait_until_idle()
    assert {user: outcome(system, user) for user in senders} == {
        user: ("released", NOBODY_S, uid, 0) for user, uid in senders.items()
    }
    assert all(f"X-Domain: {NOBODY_S}\n".encode() in path.read_bytes() for path in system.mail())


def test_unregistered_mail_gets_no_more_than_the_default() -> None:
    """Neither a name with larger limits in the configuration nor new names get a uid more than the default in total, but
    for the share that new names together have beside one that is configured."""
    with System(default=["3/1h"], extra=f'[vhosts."{NOBODY_S}"]\nlimits = ["100/1h"]\n') as system:
        system.cli("vhost", "add", "--unregistered")
        with system.running():
            for number in range(4):
                system.submit(NOBODY_S, SHARED, f"same name {number}")
            for number in range(2):
                name = f"www.n{number}.example"
                system.submit(name, SHARED, f"new name {number}")
            system.submit("www.n2.example", STRANGER, "another uid")
            system.wait(lambda: len(system.rows()) == 7, "all are sent or held")
            system.wait_until_idle()
        assert system.subjects() == ["another uid", "new name 0", *(f"same name {number}" for number in range(3))]
        assert len(system.held()) == 2


def test_many_names_over_the_limit_do_not_spoil_the_shared_policy() -> None:
    """However many names one uid makes up, what others are told is whole: enqueue reads their bell, and their mail is out."""
    with System(default=["1/1h"]) as system:
        system.cli("vhost", "add", "--unregistered")
        with system.running():
            names = [f"{'a' * 60}.{'b' * 60}.{'c' * 60}.{number:03}.example" for number in range(300)]
            system.python(MANY_BY_HAND, system.spool / "vhosts" / UNREGISTERED, user=SHARED, input="\n".join(names))
            system.submit(NOBODY_S, STRANGER)
            system.wait(lambda: len(system.held()) == len(names) - 1, "all but one are held")
            policy = (system.spool / "vhosts" / UNREGISTERED / "policy").read_bytes()
            # As much of it as enqueue reads.
            assert policy[:65536].endswith(b"\nEnd: 1\n"), len(policy)
        assert len(system.mail()) == 2


def test_made_up_names_are_no_more_than_some_incidents() -> None:
    """A uid that makes up a name for each message, each too large for any limit, does not fill the error log."""
    with System(default=["1/1h"]) as system:
        system.cli("vhost", "add", "--unregistered")
        with system.running():
            names = [f"n{number:03}.example" for number in range(120)]
            many = MANY_BY_HAND.replace("Recipient: one@x.example", "Recipient: one@x.example\\nRecipient: two@x.example")
            assert many != MANY_BY_HAND
            system.python(many, system.spool / "vhosts" / UNREGISTERED, user=SHARED, input="\n".join(names))
            system.submit(NOBODY_S, STRANGER)
            system.wait(lambda: len(system.held()) == len(names), "all of them are held")
            incidents = [incident["vhost"] for incident in system.json("status")["incidents"]]
        assert len(incidents) == 51 and UNREGISTERED in incidents
        assert system.log().count("exceeded limit") == 51
        assert len(system.mail()) == 1


def test_nobody_sees_or_moves_another_customers_mail() -> None:
    """c2 and www-data can list nothing, read nothing but the policy of what is open to them, and move nothing."""
    with Sink(["-r", "DATA"]) as sink, System(mta=smtp(sink.port), default=["0/1h"]) as system:
        system.register(C1, "c1")
        system.register(C2, "c2")
        system.cli("vhost", "add", "--unregistered")
        with system.running():
            by_hand(system, "c1", C1, "no vhost at all", "corrupt")
            for _ in range(3):
                system.submit(C1, "c1")
            system.wait(lambda: len(system.held()) == 3 and list((system.spool / "corrupt").iterdir()), "they are held")
            held = system.held()
            system.cli("hold", "delete", "--yes", held[0])
            system.cli("hold", "release", held[1])
            system.wait(lambda: "deferred" in system.log(), "the MTA has deferred the one that is released")
        for vhost, user in ((C1, "c1"), (NOBODY_S, STRANGER)):
            system.submit(vhost, user)
        system.python("open(__import__('sys').argv[1], 'w')", system.spool / "vhosts" / C1 / "tmp/half", user="c1")
        everything = [*entries(system.spool), *entries(system.state)]
        for queue in ("active", "hold", "trash", "corrupt", f"vhosts/{C1}/new", f"vhosts/{C1}/tmp", f"vhosts/{UNREGISTERED}/new"):
            assert any(path.startswith(f"{system.spool}/{queue}/") for path in everything), queue
        shared = f"{system.spool}/vhosts/{UNREGISTERED}"
        his_own = [path for path in everything if os.lstat(path).st_uid == int(STRANGER)]
        assert len(his_own) == 1
        for user, open_to_him in (("c2", [f"{system.spool}/vhosts/{C2}", shared]), (SHARED, [shared]), (STRANGER, [shared])):
            done = json.loads(system.python(PROBE, user=user, input=json.dumps(everything)))
            own = his_own if user == STRANGER else []
            bells = [str(bell(system, os.path.basename(place))) for place in open_to_him]
            drops = [f"{place}/{name}" for place in open_to_him for name in ("new", "tmp")]
            assert done["listed"] == []
            assert done["read"] == sorted([*(f"{place}/policy" for place in open_to_him), *own], key=everything.index)
            assert sorted(done["written"]) == sorted([*drops, *bells, *own])
            # What is his own he may take back, until it is read.
            assert done["moved"] == own


def test_unregistered_claim_of_a_registered_name_is_held(system: System) -> None:
    """A name that has users is not to be had through the door for everybody, whatever the file says of its owner."""
    system.cli("vhost", "add", "--unregistered")
    by_hand(system, SHARED, UNREGISTERED, C1, "claimed", uid=system.uids["c1"])
    by_hand(system, "c2", UNREGISTERED, C1, "claimed too")
    by_hand(system, SHARED, UNREGISTERED, NOBODY_S, "free")
    with system.running():
        system.wait(lambda: len(system.rows()) == 3, "all are sent or held")
        system.wait_until_idle()
    www_data = pwd.getpwnam(SHARED).pw_uid
    assert outcome(system, "claimed") == ("held", C1, www_data, 0)
    assert outcome(system, "claimed too") == ("held", C1, system.uids["c2"], 0)
    assert outcome(system, "free") == ("released", NOBODY_S, www_data, 0)
    assert system.subjects() == ["free"]
    # It is not counted against the name's owner.
    assert [window["used"] for window in system.json("limits", "show", C1).get("windows", [])] in ([], [0])


def test_claims_in_a_registered_maildrop_grant_nothing(system: System) -> None:
    """Mail of c1's maildrop is c1's, whatever vhost and uid the file claims; a claim of another vhost is not sent."""
    by_hand(system, "c1", C1, C1, "another uid", uid=system.uids["c2"])
    by_hand(system, "c1", C1, C2, "another vhost")
    with system.running():
        system.wait(lambda: len(system.rows()) == 2, "both are looked at")
        system.wait_until_idle()
    assert outcome(system, "another uid") == ("released", C1, system.uids["c1"], 1)
    event, vhost, uid, _ = outcome(system, "another vhost")
    assert (event, vhost, uid) == ("held", C1, system.uids["c1"])
    assert system.subjects() == ["another uid"]


def test_mail_of_a_user_who_is_not_the_vhosts_is_held(system: System) -> None:
    """Root's files, the daemon's, and those of a user who has been taken from the list, are held with that reason."""
    for user in ("root", DAEMON, "c1"):
        by_hand(system, user, C1, C1, f"of {user}")
    (system.config.parent / f"vhosts.d/{C1}.toml").write_text('users = ["c2"]\n')
    with system.running():
        system.wait(lambda: len(system.rows()) == 3, "all are looked at")
    rows = {row["subject"]: row for row in system.rows()}
    for user, uid in (("root", 0), (DAEMON, system.uids[DAEMON]), ("c1", system.uids["c1"])):
        row = rows[f"of {user}"]
        assert (row["event"], row["vhost"], row["uid"], row["verified"]) == ("held", C1, uid, 0)
        assert user in row["reason"] or str(uid) in row["reason"]
    assert system.mail() == []


def test_group_with_foreign_members_is_not_the_gate() -> None:
    """Where a panel has put www-data into c2's group, c2 alone is let in, by an ACL, and alone can ring the bell."""
    with System(members={"c2": [SHARED]}) as system:
        system.register(C2, "c2")
        assert {user: system.enqueue(C2, "-t", user=user).returncode for user in ("c2", SHARED, "c1", STRANGER)} == {
            "c2": 0, SHARED: NOPERM, "c1": NOPERM, STRANGER: NOPERM,
        }  # fmt: skip
        gate = system.run("getfacl", "-cEp", system.spool / "vhosts" / C2).stdout.split()
        assert [entry for entry in gate if not entry.startswith("mask")] == [
            "user::rwx",
            "user:c2:--x",
            "group::---",
            "other::---",
        ]
        assert names(os.stat(system.spool / "vhosts" / C2), system)[:2] == (DAEMON, DAEMON)
        assert names(bell(system, C2).stat(), system)[:2] == (DAEMON, DAEMON)
        ring = ("python3", "-c", "import os, sys; os.utime(sys.argv[1])", str(bell(system, C2)))
        assert {user: system.run(*ring, user=user).returncode for user in ("c2", SHARED, "c1")} == {"c2": 0, SHARED: 1, "c1": 1}
        everything = entries(system.spool)
        done = json.loads(system.python(PROBE, user=SHARED, input=json.dumps(everything)))
        assert done == {"listed": [], "read": [], "written": [], "moved": []}
        with system.running():
            system.wait_for_mail(1)
        system.cli("check")


def test_several_users_of_one_vhost() -> None:
    """Two users share a vhost, by an ACL or by a group that is theirs alone, and neither can touch the other's mail."""
    with System(members={"both": ["c1", "c2"]}) as system:
        system.register("www.acl.example", "c1", "c2")
        system.register("www.group.example", "c1", "c2", group="both")
        for vhost in ("www.acl.example", "www.group.example"):
            found = {user: system.enqueue(vhost, "-t", user=user).returncode for user in ("c1", "c2", SHARED, STRANGER)}
            assert found == {"c1": 0, "c2": 0, SHARED: NOPERM, STRANGER: NOPERM}
            mails = [path for path in entries(system.spool / "vhosts" / vhost / "new")[1:]]
            theirs = [path for path in mails if os.stat(path).st_uid == system.uids["c1"]]
            assert (len(mails), len(theirs)) == (2, 1)
            done = json.loads(system.python(PROBE, user="c2", input=json.dumps(theirs)))
            assert done == {"listed": [], "read": [], "written": [], "moved": []}
        with system.running():
            system.wait_for_mail(4)
            system.wait_until_idle()
        assert {row["verified"] for row in system.rows()} == {1}
