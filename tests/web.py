"""Real Apache, with PHP as its module and in php-fpm pools, on the host of system.py; on a loopback port."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import Self

from servers import HOST, free_port
from system import PATH, SHARED, System, child

MODULES = Path("/usr/lib/apache2/modules")

# A page that sends one mail, and says what mail() said and who it ran as.
PAGE = """<?php
$to = $_GET["to"] ?? "one@x.example";
$sent = mail($to, $_GET["subject"] ?? "subject", "text", "From: user@$_SERVER[SERVER_NAME]");
echo PHP_SAPI, " ", posix_getuid(), " ", $sent ? "accepted" : "refused", "\\n";
"""

APACHE = """ServerRoot {directory}
ServerName localhost
Listen {host}:{port}
PidFile {directory}/apache.pid
Mutex file:{directory}
ErrorLog {directory}/error.log
LogLevel warn
User {user}
Group {user}
StartServers 2
LoadModule mpm_prefork_module {modules}/mod_mpm_prefork.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_fcgi_module {modules}/mod_proxy_fcgi.so
LoadModule php_module {php}
PHPINIDir {directory}
"""

SITE = """<VirtualHost *>
    ServerName {vhost}
    DocumentRoot {directory}/{vhost}
    <FilesMatch "\\.php$">
        SetHandler "{handler}"
    </FilesMatch>
    php_admin_value sendmail_path "{sendmail_path}"
</VirtualHost>
"""

FPM = """[global]
error_log = {directory}/fpm.log
daemonize = no
"""

POOL = """[{user}]
user = {user}
group = {user}
listen = {directory}/{user}.sock
listen.owner = {shared}
listen.mode = 0600
pm = static
pm.max_children = 2
catch_workers_output = yes
php_admin_value[sendmail_path] = "{sendmail_path}"
"""


class Web:
    """Apache, and php-fpm where a site has a pool. Sites are added before the start."""

    def __init__(self, system: System) -> None:
        self.port = free_port()
        self.directory = system.directory / "web"
        self._system = system
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pools = False
        (php,) = MODULES.glob("libphp*.so")
        self.directory.mkdir(mode=0o755)
        self._apache = self.directory / "apache.conf"
        self._fpm = self.directory / "fpm.conf"
        self._apache.write_text(
            APACHE.format(directory=self.directory, host=HOST, port=self.port, user=SHARED, modules=MODULES, php=php)
        )
        self._fpm.write_text(FPM.format(directory=self.directory))
        (self.directory / "php.ini").write_text("mail.add_x_header = On\n")

    def site(self, vhost: str, sendmail_path: str, pool: str = "") -> None:
        """A website whose PHP is Apache's module or, where a pool's user is named, php-fpm's."""
        root = self.directory / vhost
        root.mkdir(mode=0o755)
        for name in ("mail.php", "shop.php"):
            (root / name).write_text(PAGE)
            (root / name).chmod(0o644)
        handler = f"proxy:unix:{self.directory}/{pool}.sock|fcgi://{pool}/" if pool else "application/x-httpd-php"
        with self._apache.open("a") as file:
            file.write(SITE.format(vhost=vhost, directory=self.directory, handler=handler, sendmail_path=sendmail_path))
        if pool:
            self._pools = True
            with self._fpm.open("a") as file:
                file.write(POOL.format(user=pool, directory=self.directory, shared=SHARED, sendmail_path=sendmail_path))

    def start(self) -> None:
        """Returns when both answer."""
        if self._pools:
            program = sorted(Path("/usr/sbin").glob("php-fpm?*"))[-1]
            self._start(program, "--nodaemonize", "--fpm-config", self._fpm, "-c", self.directory / "php.ini")
        self._start("/usr/sbin/apache2", "-DFOREGROUND", "-f", self._apache)
        sockets = [f"{line.split('=')[1].strip()}" for line in self._fpm.read_text().splitlines() if line.startswith("listen =")]
        self._system.wait(
            lambda: self._answers() and all(Path(path).is_socket() for path in sockets), "Apache and php-fpm answer"
        )

    def get(self, vhost: str, path: str = "mail.php", **query: str) -> str:
        """What the page prints; it must be there."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        try:
            connection.request("GET", f"/{path}?{urllib.parse.urlencode(query)}", headers={"Host": vhost})
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        assert answer.status == 200, f"{answer.status}: {body}\n{self.error_log()}"
        return body

    def error_log(self) -> str:
        """Apache's own, where the errors of the commands that the module starts go as well."""
        log = self.directory / "error.log"
        return log.read_text() if log.exists() else ""

    def stop(self) -> None:
        while self._processes:
            process = self._processes.pop()
            if process.poll() is None:
                os.kill(child(process.pid), signal.SIGTERM)
            process.wait(30)

    def _start(self, *command: str | Path) -> None:
        with (self.directory / "stderr").open("ab") as log:
            process = subprocess.Popen(
                # Apache ends its whole process group, to which nsenter must not belong.
                self._system.words(["setsid", *command]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": PATH, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        self._processes.append(process)

    def _answers(self) -> bool:
        for process in self._processes:
            said = (self.directory / "stderr").read_text()
            assert process.poll() is None, f"{process.args!r} ended with {process.returncode}: {said}{self.error_log()}"
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except OSError:
            return False
        finally:
            connection.close()
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            error.add_note(f"Apache: ...{self.error_log()[-3000:]}")
        self.stop()
