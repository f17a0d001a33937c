"""Everything the command prints: tables for people, JSON for programs, text from mail made harmless."""

import io
import json
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from releaser.visible import visible


def console(target: io.StringIO) -> Console:
    """Renders into TARGET: rich ends the process where the reader of its own output has had enough."""
    terminal = sys.stdout.isatty()
    # Without a terminal nothing may be cut to its width.
    width = None if terminal else 250
    return Console(file=target, force_terminal=terminal, markup=False, highlight=False, emoji=False, width=width)


def confirm(verb: str, question: str, yes: bool) -> None:
    """Let a person answer QUESTION, unless YES is given; who says no ends the command. Raises click.UsageError without one."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"without a terminal, this {verb} needs --yes")
    click.confirm(question, abort=True)


# So many rows can be made ready before anybody notices that he waits.
PAGE = 100


def table(columns: list[str], rows: Iterable[list[object]], empty: str) -> None:
    """Print ROWS, or the sentence EMPTY where there are none. There may be many: each PAGE is printed as it comes, its
    columns as wide as it needs."""
    waiting = iter(rows)
    page = list(islice(waiting, PAGE))
    if not page:
        say(empty)
    header = True
    while page:
        made = Table(box=None, pad_edge=False, header_style="bold", show_header=header)
        for column in columns:
            made.add_column(column, overflow="fold")
        for row in page:
            made.add_row(*[Text(visible(str(value))) for value in row])
        rendered = io.StringIO()
        console(rendered).print(made)
        sys.stdout.write(rendered.getvalue())
        sys.stdout.flush()
        page, header = list(islice(waiting, PAGE)), False


def say(sentence: str) -> None:
    print(visible(sentence))


def complain(sentence: str) -> None:
    print(f"secure-sendmail: {visible(sentence)}", file=sys.stderr)


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def as_json_array(values: Iterable[Any]) -> None:
    """VALUES as one array, each printed as it comes: there may be millions."""
    begin = "["
    for value in values:
        print(begin + json.dumps(value), end="")
        begin = ",\n"
    print("[]" if begin == "[" else "]")
