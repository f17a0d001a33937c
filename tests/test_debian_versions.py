"""All of it runs with Debian 12's own PyMySQL, watchdog, click and rich, too, not only with the newest."""

import os
import subprocess
import sys
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


# Before the packages of .venv, which are the newest, for the tests as for the commands that they start.
DEBIAN = {**os.environ, "PYTHONPATH": "/usr/lib/python3/dist-packages", "PYTHONDONTWRITEBYTECODE": "1"}


def test_debians_packages_come_first() -> None:
    """What the next test rests on."""
    code = "import importlib.metadata as m, pymysql; print(pymysql.__file__, m.version('PyMySQL'), m.version('watchdog'))"
    found = subprocess.run([sys.executable, "-c", code], env=DEBIAN, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["/usr/lib/python3/dist-packages/pymysql/__init__.py", "1.0.2", "2.2.1"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", ["test_e2e_smtp.py", "test_mysql_log.py", "test_e2e_daemon.py"])
def test_smtp_mysql_and_watch_with_debians_packages(module: str) -> None:
    """The tests of SMTP, of the log in MySQL and of the watching daemon pass with Debian's packages as with the newest."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", ROOT / "tests" / module], env=DEBIAN, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:]
