"""Text from mail made harmless for whoever reads it: on a terminal, in a log, in a table of MySQL."""

import unicodedata

# Control, format (bidi marks among them), surrogate and private characters, line and paragraph separators.
UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def visible(text: str) -> str:
    """TEXT with every character that a terminal would obey, or not show, as an escape."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in UNSEEN else c for c in text)
