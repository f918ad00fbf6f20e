"""Text that somebody else has chosen, a guest above all, made safe to show."""

from __future__ import annotations


def readable(text: str) -> str:
    """Return text that cannot command a terminal: what is not to be seen, line ends excepted, becomes a replacement."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
