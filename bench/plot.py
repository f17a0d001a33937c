"""bench/scale.svg out of var/bench.json: messages a second, and memory, against vhosts, held messages and ledger rows.

Usage: python bench/plot.py
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
ACROSS = (("vhosts", "vhosts"), ("held", "held messages"), ("in the ledger", "rows in the ledger"))
DOWN = (("messages/s", "messages/s"), ("MB", "MB resident"))
WIDTH, HEIGHT, MARGIN = 240, 150, 50


def main() -> None:
    found = json.loads((HERE.parent / "var/bench.json").read_text())
    parts = []
    for row, (what, title) in enumerate(DOWN):
        columns = [_points(found, many, what) for many, _ in ACROSS]
        top = max((value for points in columns for _, value in points), default=1) * 1.2
        for column, points in enumerate(columns):
            x, y = MARGIN + column * (WIDTH + MARGIN), MARGIN + row * (HEIGHT + MARGIN)
            parts += _panel(x, y, f"{title} against {ACROSS[column][1]}", points, top)
    width, height = MARGIN + len(ACROSS) * (WIDTH + MARGIN), MARGIN + len(DOWN) * (HEIGHT + MARGIN)
    body = "\n".join(parts)
    (HERE / "scale.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def _points(found: dict[str, float], many: str, what: str) -> list[tuple[int, float]]:
    """(how many, value), by how many."""
    pattern = re.compile(rf"scale: ([0-9]+) {many}: {what}\Z")
    return sorted((int(match[1]), value) for key, value in found.items() if (match := pattern.match(key)))


def _panel(x: int, y: int, title: str, points: list[tuple[int, float]], top: float) -> list[str]:
    """A square with its title, and a line through POINTS, as far apart as they come, from 0 to TOP."""
    step = WIDTH / (len(points) + 1)
    places = [(x + step * (n + 1), y + HEIGHT * (1 - value / top)) for n, (_, value) in enumerate(points)]
    line = " ".join(f"{across:.0f},{down:.0f}" for across, down in places)
    parts = [
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>',
        f'<text x="{x}" y="{y - 8}">{title}</text>',
        f'<polyline points="{line}" fill="none" stroke="#2a6f97" stroke-width="2"/>',
    ]
    for (number, value), (across, down) in zip(points, places, strict=True):
        parts += [
            f'<circle cx="{across:.0f}" cy="{down:.0f}" r="3" fill="#2a6f97"/>',
            f'<text x="{across:.0f}" y="{down - 8:.0f}" text-anchor="middle">{value:,.0f}</text>',
            f'<text x="{across:.0f}" y="{y + HEIGHT + 14}" text-anchor="middle">{number:,}</text>',
        ]
    return parts


if __name__ == "__main__":
    main()
