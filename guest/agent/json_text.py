"""JSON, written. The standard library's encoder imports regular expressions and with them half of ``re``'s world."""

from __future__ import annotations

_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), 0x7F)}
_ESCAPES[ord('"')] = '\\"'
_ESCAPES[ord("\\")] = "\\\\"


def dumps(value: object) -> str:
    """Return the JSON text of dicts with string keys, lists, strings, integers, booleans and None.

    Raises:
        TypeError: a value is something else.
    """
    if isinstance(value, str):
        return f'"{value if _is_plain(value) else value.translate(_ESCAPES)}"'
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dumps(key)}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dumps, value)) + "]"
    raise TypeError(f"{type(value).__name__} has no JSON text")


def _is_plain(text: str) -> bool:
    """Tell whether nothing in it is to be escaped. Nearly every text is such, and finding out is much cheaper."""
    return text.isprintable() and '"' not in text and "\\" not in text
