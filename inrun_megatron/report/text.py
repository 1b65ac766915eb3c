"""Text from the data as it may stand on a line: nothing in it steers the terminal, nothing is too long."""

from __future__ import annotations

import unicodedata

_SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str) -> str:
    """`text` on one line: control, format and other invisible characters as escapes, so that no text from the data
    can steer the terminal or hide."""
    return "".join(_SHORT_ESCAPES.get(character) or _escape(character) for character in text)


def printable_lines(text: str) -> str:
    """`printable` with line breaks and tabs left as they are."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)


def _escape(character: str) -> str:
    # C*: control, format (bidi overrides), surrogate, private, unassigned. Zl, Zp: line and paragraph separators.
    category = unicodedata.category(character)
    if category[0] != "C" and category not in ("Zl", "Zp"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shorten(text: str, characters: int, keep_end: bool = False) -> str:
    """Cut to `characters` with "..." at the cut; `keep_end` cuts the beginning (paths)."""
    if len(text) <= characters:
        return text
    return "..." + text[len(text) - characters + 3 :] if keep_end else text[: characters - 3] + "..."
