"""What every verb needs: the configuration, the ledger, who the actor is, and the bell that wakes the releaser."""

import os
from functools import cached_property

import click

from releaser import config, daemon, identity, layout
from releaser.config import VhostSettings
from releaser.ledger import Ledger


class Failed(Exception):
    """The verb could not do what was asked; the text says why. Exit status 1."""


class Context:
    """What a verb opens in spool and state, it opens after settle(): as root no longer, but in private mode."""

    def __init__(self, file: str) -> None:
        self.file = file

    @cached_property
    def config(self) -> config.Config:
        return config.load(self.file)

    @cached_property
    def _settled(self) -> identity.Identity:
        return identity.settle(self.config.spool, self.config.state)

    def settle(self) -> identity.Identity:
        """Be who works on the spool from now on. Raises identity.NotOurs."""
        return self._settled

    @property
    def spool(self) -> str:
        self.settle()
        return self.config.spool

    @cached_property
    def ledger(self) -> Ledger:
        self.settle()
        return Ledger(self.config.state)

    @property
    def running(self) -> bool:
        return daemon.running(self.spool)

    @cached_property
    def vhosts(self) -> tuple[str, ...]:
        """The maildrops' names."""
        try:
            return tuple(sorted(name for name in os.listdir(f"{self.spool}/vhosts") if layout.is_maildrop(name)))
        except FileNotFoundError:
            return ()

    @cached_property
    def _own(self) -> frozenset[str]:
        return frozenset(self.vhosts) - {layout.UNREGISTERED}

    def known_vhost(self, name: str) -> str:
        """NAME in lower case, which has a maildrop, or may claim the shared one. Raises Failed."""
        name = name.lower()
        if name not in self.vhosts and not (layout.is_vhost(name) and layout.UNREGISTERED in self.vhosts):
            raise Failed(f"no vhost {name!r}; run: secure-sendmail vhost list")
        return name

    def settings(self, name: str) -> VhostSettings:
        """What holds for the vhost NAME."""
        return self.config.vhost(name) if name in self._own else self.config.unregistered(name)


def ring(spool: str) -> None:
    """Wake the releaser. If it fails, its scan finds what there is to do."""
    try:
        os.utime(f"{spool}/wake/{layout.CONTROL_BELL}")
    except OSError:
        pass


pass_context = click.make_pass_decorator(Context)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
