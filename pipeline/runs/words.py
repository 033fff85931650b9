"""Foreign words in what people read: names and texts that came with a model, a run or a file, made harmless.

A terminal obeys control characters, a Markdown page shows HTML, and a table ends where a cell breaks its line.
"""

from __future__ import annotations

import html
import re

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, line separators, and what turns the direction of writing."""
_MARKS = re.compile(r"([`*\[\]])")


def plain(text: str) -> str:
    r"""The text for a terminal or a log: what would steer it is written out, an escape character as \x1b."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The same in one line."""
    return " ".join(plain(text).split())


def markdown_words(text: str) -> str:
    """The text as words of a Markdown page: no HTML, no links, no other marks."""
    return _MARKS.sub(r"\\\1", html.escape(one_line(text), quote=False))


def code(text: str) -> str:
    """The text between backticks, which nothing in it can close."""
    return f"`{one_line(text).replace('`', chr(39))}`"
