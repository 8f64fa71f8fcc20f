"""Rows of text for a terminal, whatever is in them."""

from __future__ import annotations

__all__ = ["aligned", "printable"]


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table. What is no printable character is shown as its escape."""
    rows = [[printable(word) for word in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [" ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def printable(text: str) -> str:
    """*text*, where what is no printable character is its escape."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
