"""Everything the command prints: tables for people, JSON for programs, text from mail made harmless."""

import io
import json
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Control, format (bidi marks among them), surrogate and private characters, line and paragraph separators.
UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def visible(text: str) -> str:
    """TEXT with every character that a terminal would obey, or not show, as an escape."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in UNSEEN else c for c in text)


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
