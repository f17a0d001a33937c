"""Everything the command prints: tables for people, JSON for programs, text from mail made harmless."""

import io
import json
import sys
from collections.abc import Iterable
from typing import Any

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


def table(columns: list[str], rows: Iterable[list[object]], empty: str) -> None:
    """Print ROWS, or the sentence EMPTY where there are none."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    count = 0
    for row in rows:
        count += 1
        made.add_row(*[Text(visible(str(value))) for value in row])
    if count:
        rendered = io.StringIO()
        console(rendered).print(made)
        sys.stdout.write(rendered.getvalue())
    else:
        say(empty)


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
