"""Fixtures of the end-to-end tests: an installation, and servers that a test has for itself."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from host import Host
from servers import Postfix, Sink, Wire


@pytest.fixture
def host() -> Iterator[Host]:
    """An installation with a maildir as the MTA, without limits, and two vhosts; the releaser is not started."""
    with Host() as installation:
        installation.add("www.a.example", "www.b.example")
        yield installation


@pytest.fixture
def sink() -> Iterator[Sink]:
    """An smtp-sink that takes everything."""
    with Sink() as server:
        yield server


@pytest.fixture
def postfix(sink: Sink) -> Iterator[Postfix]:
    """A private Postfix that passes all mail on to the sink."""
    with Postfix(sink.port) as server:
        yield server


@pytest.fixture
def wire(sink: Sink) -> Iterator[Wire]:
    """A recorder in front of the sink."""
    with Wire(sink.port) as relay:
        yield relay


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failed test, shows what its installation looked like."""
    report = yield
    host = getattr(item, "funcargs", {}).get("host")
    if report.when == "call" and report.failed and host is not None and host.spool.exists():
        report.sections.append(("installation", host.report()))
    return report
