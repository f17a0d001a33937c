"""Reading spool_layout.md and calling.md, the oracles: expected values come from a page, never from either program."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def text(name: str = "spool_layout.md") -> str:
    return (ROOT / name).read_text()


def section(page: str, name: str) -> list[str]:
    """The lines of the table or fence behind the comment `read by tests/: NAME`."""
    found = re.search(rf"<!-- read by tests/: {name} -->\n\n(.*?)\n\n(?=\S)(?![^\n]*```)", page + "\n\n.", re.DOTALL)
    assert found, f"the page has no section {name}"
    return found[1].rstrip("\n").split("\n")


def table(page: str, name: str) -> list[list[str]]:
    """The rows of a table below its two header lines, cells without back quotes."""
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in section(page, name)]
    return rows[2:]


def fence(page: str, name: str) -> str:
    """The text of a fence."""
    found = re.search(rf"<!-- read by tests/: {name} -->\n\n```\n(.*?)```", page, re.DOTALL)
    assert found, f"the page has no fence {name}"
    return found[1]


def without_row(page: str, name: str, number: int) -> str:
    """A copy of the page with one row of a table, or one line of a fence, removed."""
    start = page.index(f"<!-- read by tests/: {name} -->")
    head, rest = page[:start], page[start:].split("\n")
    first = 3 if rest[2] == "```" else 4
    del rest[first + number]
    return head + "\n".join(rest)


def queues_of(page: str) -> dict[frozenset[str], str]:
    """The documented states: the directories that have the message, and the state's name."""
    states = {}
    for line in fence(page, "states").splitlines():
        name, *words = line.split()
        states[frozenset(word[1:] for word in words if word.startswith("+"))] = name.rstrip(".")
    return states
