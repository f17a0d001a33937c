"""What every verb needs: the configuration, the ledger, who the actor is, and the bell that wakes the releaser."""

import os
from functools import cached_property

import click

from releaser import config, daemon, layout, private
from releaser.ledger import Ledger


class Failed(Exception):
    """The verb could not do what was asked; the text says why. Exit status 1."""


class Context:
    """Opened on first use, so that `vhost add` works before there is a ledger."""

    def __init__(self, file: str) -> None:
        self.file = file

    @cached_property
    def config(self) -> config.Config:
        return config.load(self.file)

    @property
    def spool(self) -> str:
        return self.config.spool

    @cached_property
    def ledger(self) -> Ledger:
        private.check(self.config.spool, self.config.state)
        return Ledger(self.config.state)

    @property
    def running(self) -> bool:
        return daemon.running(self.spool)

    def vhosts(self) -> list[str]:
        private.check(self.config.spool, self.config.state)
        try:
            return sorted(name for name in os.listdir(f"{self.spool}/vhosts") if layout.is_vhost(name))
        except FileNotFoundError:
            return []

    def known_vhost(self, name: str) -> str:
        if name not in self.vhosts():
            raise Failed(f"no vhost {name!r}; run: secure-sendmail vhost list")
        return name

    def ring(self) -> None:
        """Wake the releaser. If it fails, its scan finds the decision."""
        try:
            os.utime(f"{self.spool}/wake/{layout.CONTROL_BELL}")
        except OSError:
            pass


pass_context = click.make_pass_decorator(Context)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
