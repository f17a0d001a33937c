"""What enqueue is compared with: the sendmail commands of Postfix and nullmailer, and a script that opens MySQL for every mail.

All as Debian packages them, unpacked into a directory of their own, and none with its daemon: what is measured is one process
that stores a mail, on the same disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from host import ROOT
from mariadb import PASSWORD, MariaDB
from servers import LIBRARIES, POSTFIX, Postfix

NULLMAILER = POSTFIX.parent / "nullmailer"
TIME = POSTFIX.parent / "time/usr/bin/time"
# Debian's own interpreter, which an installation has.
PYTHON = "/usr/bin/python3"

# The original's way: ask MySQL how much was sent, write a row, and hand the mail on to the MTA's command.
SCRIPT = """\
import subprocess, sys, time
import email.parser
import pymysql

message = sys.stdin.buffer.read()
header = email.parser.BytesHeaderParser().parsebytes(message)
log = pymysql.connect(unix_socket={socket!r}, user="creator", password={password!r}, database="secure_sendmail", autocommit=True)
with log.cursor() as cursor:
    cursor.execute("SELECT count(*) FROM sent WHERE vhost = %s AND at > %s", (sys.argv[1], time.time() - 300))
    cursor.execute("INSERT INTO sent VALUES (%s, %s, %s)", (sys.argv[1], time.time(), header["To"]))
sys.exit(subprocess.run([{sendmail!r}, "-t", "-i"], input=message).returncode)
"""


@dataclass
class Peer:
    """A command that takes a mail: how PHP is told of it, its environment, and where its mail lies, to be removed."""

    name: str
    command: str
    places: list[Path]
    environment: dict[str, str] = field(default_factory=dict)


class Peers:
    """All of them, as long as the context lasts."""

    def __init__(self) -> None:
        missing = [str(path) for path in (POSTFIX, NULLMAILER, TIME) if not path.exists()]
        assert not missing, f"{', '.join(missing)}: not there; make bench gets it"
        self.directory = Path(tempfile.mkdtemp(prefix="pss-peers-", dir="/tmp"))
        self._postfix = Postfix(1, message_size_limit=0)
        self._database = MariaDB()

    def __enter__(self) -> Self:
        self._database.start()
        self._database.root("CREATE TABLE sent (vhost varchar(255), at double, recipient text, KEY (vhost, at))")
        # It writes its configuration when it starts. Behind that its pickup is a FIFO that somebody has open, as if it ran.
        self._postfix.start()
        self._postfix.stop()
        pickup = self._postfix.directory / "queue/public/pickup"
        pickup.unlink(missing_ok=True)
        os.mkfifo(pickup)
        self._reader = os.open(pickup, os.O_RDONLY | os.O_NONBLOCK)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._reader)
        self._postfix.close()
        self._database.close()
        shutil.rmtree(self.directory)

    def postfix(self) -> Peer:
        environment = {"MAIL_CONFIG": f"{self._postfix.directory}/config", "LD_LIBRARY_PATH": str(LIBRARIES)}
        places = [self._postfix.directory / "queue/maildrop"]
        return Peer("Postfix sendmail -t -i", f"{POSTFIX}/usr/sbin/sendmail -t -i", places, environment)

    def nullmailer(self) -> Peer:
        """nullmailer, below a directory that it takes for the root of its own."""
        root = self.directory / "nullmailer"
        shutil.copytree(NULLMAILER / "usr", root)
        for name in ("queue/queue", "queue/tmp", "conf"):
            (root / name).mkdir(parents=True)
        os.mkfifo(root / "queue/trigger")
        # Debian's reads this one beside the directory of the others.
        (root / "mailname").write_text("mta.test\n")
        # Root needs no set-uid bit, and with it the program would not look at its environment.
        (root / "sbin/nullmailer-queue").chmod(0o755)
        environment = {"NULLMAILER_TEST_PREFIX": str(root)}
        return Peer("nullmailer sendmail -t -i", f"{root}/sbin/sendmail -t -i", [root / "queue/queue"], environment)

    def script(self) -> Peer:
        path = self.directory / "mysql.py"
        sendmail = self.postfix()
        program = sendmail.command.split()[0]
        path.write_text(SCRIPT.format(socket=str(self._database.socket), password=PASSWORD, sendmail=program))
        command = f"{PYTHON} {path} www.a.example -t -i"
        return Peer("a Python script, MySQL for every mail", command, sendmail.places, sendmail.environment)


def installed(directory: Path) -> Path:
    """The enqueue command as `make install` makes it, below DIRECTORY."""
    library = directory / "lib"
    shutil.copytree(ROOT / "enqueue", library / "enqueue", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([PYTHON, "-I", library / "enqueue/bundle.py", directory / "start"], check=True)
    compile_it = [PYTHON, "-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(library)]
    subprocess.run(compile_it, check=True)
    script = (ROOT / "enqueue/secure-sendmail-enqueue.in").read_text()
    program = directory / "secure-sendmail-enqueue"
    program.write_text(script.replace("@START@", f"{directory}/start/python3").replace("@LIBRARY@", str(library)))
    program.chmod(0o755)
    return program
