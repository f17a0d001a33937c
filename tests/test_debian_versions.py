"""The daemon and the command run with Debian 12's own watchdog, click and rich, on Debian's Python."""

import os
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

ROOT = Path(__file__).parent.parent
PYTHON = "/usr/bin/python3"
# Bells work where mail is out long before the next scan, which is 30 seconds after the start.
BEFORE_A_SCAN = 20


def test_a_bell_wakes_the_releaser_and_the_command_lists(tmp_path: Path) -> None:
    """watchdog 2.2.1 reports a bell otherwise than 7.1 does; both wake the releaser."""
    (tmp_path / "etc").mkdir(mode=0o700)
    file = tmp_path / "etc/releaser.toml"
    file.write_text(
        f'spool = "{tmp_path}/spool"\nstate = "{tmp_path}/state"\n[mta]\nurl = "maildir:{tmp_path}/mail"\n'
        '[limits]\ndefault = ["1/1h"]\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

    def command(*words: str) -> str:
        run = [PYTHON, "-m", "releaser.cli.main", "--config", str(file), *words]
        return subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout

    versions = subprocess.run(
        [PYTHON, "-c", "import importlib.metadata as m; print(m.version('watchdog'), m.version('click'), m.version('rich'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert versions.stdout.split() == ["2.2.1", "8.1.3", "13.3.1"]
    command("vhost", "add", "www.a.example")
    with (tmp_path / "log").open("w") as log:
        daemon = subprocess.Popen([PYTHON, "-m", "releaser.daemon", "--config", str(file)], env=environment, stderr=log)
    try:
        deadline = time.monotonic() + BEFORE_A_SCAN
        while "started" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        for subject in ("out", "held [/b]"):
            enqueue = [
                PYTHON,
                "-IS",
                "-c",
                "import sys; sys.path.insert(0, sys.argv.pop(1)); from enqueue.main import main; main()",
            ]
            message = f"To: a@x.example\nSubject: {subject}\n\ntext\n".encode()
            subprocess.run([*enqueue, ROOT, "--spool", tmp_path / "spool", "www.a.example", "-t"], input=message, check=True)
        while "nothing is held" in command("hold", "list") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert time.monotonic() < deadline
        assert "held [/b]" in command("hold", "list")
        assert len(list((tmp_path / "mail/new").iterdir())) == 1
    finally:
        daemon.terminate()
    assert daemon.wait() == 0
