"""Trees that a customer has made are removed whole, whatever is in them; gates; what a policy has room for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from releaser import config, incidents, policy, provision
from releaser.batch import Batch
from releaser.ledger import Ledger
from releaser.limits import parse

# Deeper than Python's stack.
DEPTH = 3000


def removed(parent: Path, name: str) -> int:
    fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return provision.remove_tree(fd, name)
    finally:
        os.close(fd)


def test_remove_tree_of_everything(tmp_path: Path) -> None:
    """Files, links, FIFOs and directories go, what a link points to stays, and so does what lies beside it."""
    for name in ("outside", "beside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("stays")
    tree = tmp_path / "tree"
    (tree / "new/a/b").mkdir(parents=True)
    (tree / "new/a/b/file").write_text("goes")
    (tree / "tmp").symlink_to(tmp_path / "outside")
    (tree / "new/link").symlink_to(tmp_path / "outside/file")
    os.mkfifo(tree / "new/fifo")
    (tree / "new/closed").mkdir(mode=0)
    assert removed(tmp_path, "tree") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "outside"]
    assert [(tmp_path / name / "file").read_text() for name in ("outside", "beside")] == ["stays", "stays"]


def test_remove_tree_deeper_than_any_stack(tmp_path: Path) -> None:
    """3,000 directories in each other are gone; so is a tree that is gone already."""
    dig = "import os, sys\nos.chdir(sys.argv[1])\nfor _ in range(int(sys.argv[2])):\n    os.mkdir('d')\n    os.chdir('d')\n"
    (tmp_path / "tree").mkdir()
    subprocess.run([sys.executable, "-c", dig + "open('f', 'w')", tmp_path / "tree", str(DEPTH)], check=True)
    assert removed(tmp_path, "tree") == 1
    assert removed(tmp_path, "tree") == 0
    assert list(tmp_path.iterdir()) == []


def test_remove_tree_of_a_link_removes_nothing(tmp_path: Path) -> None:
    """A link in the place of the tree is refused."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "tree").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError):
        removed(tmp_path, "tree")
    assert (tmp_path / "outside").is_dir() and (tmp_path / "tree").is_symlink()


@pytest.mark.parametrize("users", [("nobody-of-that-name",), ("root",), ("0",)])
def test_gate_for_nobody_and_for_root_is_refused(users: tuple[str, ...]) -> None:
    """A user that does not exist, and the one that passes every gate, are no customers."""
    with pytest.raises(provision.Refused):
        provision.gate(users, None)


def test_gate_of_a_number_is_an_access_control_list() -> None:
    """A uid without an account has no group of its own."""
    assert provision.gate(("54321", "54322", "54321"), None) == provision.Gate(uids=(54321, 54322))


@pytest.mark.parametrize("name", ["4294967295", "4294967296", "-1", "\u0661\u0662", "none-of-that-name", ""])
def test_group_that_is_none_is_refused(name: str) -> None:
    """Neither the kernel's word for no group, nor digits of another script, is a number of one."""
    with pytest.raises(provision.Refused):
        provision.group(name)
    assert provision.group("4294967294") == 4294967294 and provision.group(None) is None


def test_rights_in_words(tmp_path: Path) -> None:
    """What is given is what is found, and each difference is named."""
    fd = os.open(tmp_path, provision.LOOK)
    right = provision.rights(fd)._replace(mode=0o710)
    provision.give(fd, right)
    assert provision.rights(fd) == right and provision.wrong(right, right, False) == ""
    said = provision.wrong(right, right._replace(uid=54321, mode=0o700), True)
    assert "must belong to uid 54321, mode 0710, must be 0700" in said
    os.close(fd)


def test_policy_has_room_for_the_latest_warnings(tmp_path: Path) -> None:
    """However many vhosts are over their limits, enqueue reads the policy whole, the latest warnings in it."""
    (tmp_path / "etc").mkdir(mode=0o700)
    file = tmp_path / "etc/releaser.toml"
    file.write_text(f'spool = "{tmp_path}/spool"\nstate = "{tmp_path}"\n')
    settings = config.load(str(file))
    book = Ledger(str(tmp_path), create=True)
    found = incidents.Incidents(settings, book, settings.vhost)
    names = [f"{'a' * 63}.{'b' * 63}.{number:04}.example" for number in range(500)]
    for name in names:
        assert found.over(Batch(book), name, parse(["10/1m"])[0], "hold")
    text = policy.render(settings, "_unregistered", "0" * 32, 1, found.warnings(names), 0.0)
    assert len(text) < 65536 and text.endswith(b"\nEnd: 1\n")
    assert names[-1].encode() in text and names[0].encode() not in text
    assert text.count(b"Warning: ") > 50
