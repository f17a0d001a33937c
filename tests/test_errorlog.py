"""Writing into error logs: never through a link, never made in a directory of others, never inside the spool."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from releaser import errorlog

# A user that owns nothing here.
OTHER = 12345


def test_made_in_a_directory_of_ours_and_appended(tmp_path: Path) -> None:
    """Each call adds one line."""
    for line in ("one", "two"):
        errorlog.append(str(tmp_path / "error.log"), line, ())
    assert (tmp_path / "error.log").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("path", ["spool/error.log", "state/error.log", "spool/../spool/x", "logs/../spool/x"])
def test_not_inside_spool_or_state(tmp_path: Path, path: str) -> None:
    """An error log that would become mail, or the ledger, is refused."""
    for name in ("spool", "state", "logs"):
        (tmp_path / name).mkdir()
    with pytest.raises(errorlog.NotWritten, match="must not lie in"):
        errorlog.append(str(tmp_path / path), "line", (str(tmp_path / "spool"), str(tmp_path / "state")))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Neither the file nor a directory on the way may be a symbolic link."""
    (tmp_path / "victim").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "real")
    for path in ("link", "way/error.log"):
        with pytest.raises(errorlog.NotWritten):
            errorlog.append(str(tmp_path / path), "line", ())
    assert (tmp_path / "victim").read_text() == "" and list((tmp_path / "real").iterdir()) == []


def test_only_a_regular_file(tmp_path: Path) -> None:
    """A FIFO that nobody reads does not hold the daemon, a directory is refused."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(errorlog.NotWritten):
            errorlog.append(str(tmp_path / name), "line", ())


@pytest.mark.server
def test_not_made_in_a_directory_of_others(tmp_path: Path) -> None:
    """There it must exist already: the daemon makes no files for a customer."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    subprocess.run(["chown", str(OTHER), theirs], check=True)
    with pytest.raises(errorlog.NotWritten, match="No such file"):
        errorlog.append(str(theirs / "error.log"), "line", ())
    (theirs / "error.log").write_text("")
    errorlog.append(str(theirs / "error.log"), "line", ())
    assert (theirs / "error.log").read_text() == "line\n"


def test_torn_line_is_no_success(tmp_path: Path) -> None:
    """Where only a part of the line has room, that is said, as where nothing has."""
    code = (
        "import resource, sys; from releaser import errorlog; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try:\n    errorlog.append(sys.argv[1], 'a line of more', ())\nexcept errorlog.NotWritten as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "error.log"], capture_output=True, text=True, check=True)
    assert "a part of the line only" in run.stdout and (tmp_path / "error.log").read_text() == "a line of "


def test_words_of_the_original() -> None:
    """The line that administrators' scripts look for."""
    line = errorlog.collected(1146488042, "656 rows", 168 * 3600)
    assert line.endswith("] [secure-sendmail] GC was run (656 rows older than 168 hours deleted)")
    assert line.startswith("[Mon May  1 ")
