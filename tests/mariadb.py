"""A private MariaDB on a loopback port, from Debian's package, in a directory of its own."""

import os
import subprocess
from typing import Any

import pymysql
from servers import HOST, _Server

from releaser.ledger import LOG_COLUMNS

PASSWORD = "not a secret"
# What README gives the releaser's user: no more is needed.
GRANTS = "INSERT, SELECT, DELETE"


class MariaDB(_Server):
    """Runs from start() to stop(), on the same files again after another start(). Database and users are made at first."""

    def __init__(self) -> None:
        super().__init__(None)
        self.data = self.directory / "data"
        self.socket = self.directory / "socket"
        self.options: list[str] = []
        subprocess.run(["chown", "mysql", self.directory], check=True)
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={self.data}", "--user=mysql", "--skip-test-db",
             "--auth-root-authentication-method=normal"],
            check=True, capture_output=True,
        )  # fmt: skip
        self._made = False

    def start(self) -> None:
        command = ["mariadbd", "--no-defaults", f"--datadir={self.data}", "--user=mysql", f"--socket={self.socket}",
                   f"--bind-address={HOST}", f"--port={self.port}", "--skip-name-resolve", f"--log-error={self.directory}/log",
                   "--innodb-flush-log-at-trx-commit=2", *self.options]  # fmt: skip
        self._start(command, self._answers, {})
        if not self._made:
            self._made = True
            self.root("CREATE DATABASE secure_sendmail CHARACTER SET utf8mb4", database=None)
            for user, rights in (("secure_sendmail", GRANTS), ("creator", "ALL PRIVILEGES")):
                self.root(f"CREATE USER {user}@'%' IDENTIFIED BY '{PASSWORD}'")
                self.root(f"GRANT {rights} ON secure_sendmail.* TO {user}@'%'")

    def root(self, sql: str, database: str | None = "secure_sendmail") -> list[tuple[Any, ...]]:
        """Run SQL as MariaDB's root, over the socket."""
        connection = pymysql.connect(unix_socket=str(self.socket), user="root", database=database, autocommit=True)
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def rows(self, columns: str = ", ".join(LOG_COLUMNS)) -> list[tuple[Any, ...]]:
        return self.root(f"SELECT {columns} FROM mail_log ORDER BY seq")

    def signal(self, number: int) -> None:
        os.kill(self._processes[0].server.pid, number)

    def _answers(self) -> bool:
        try:
            self.root("SELECT 1", database=None)
        except (pymysql.MySQLError, OSError):
            return False
        return True
