"""Strings that others wrote, made safe to print: a terminal obeys control characters, whoever sent them."""

import re

# C0 but tab and line feed, DEL, C1, line and paragraph separators, marks that reorder a line, halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""`text` with what a terminal would obey, or could not show, as escapes such as \x1b; lines stay lines."""
    return _UNSAFE.sub(lambda match: _escaped(match[0]), str(text))


def one_line(text: object) -> str:
    r"""`printable`, with tabs and line feeds as \t and \n too: for names, fields of a table and warnings."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def brief(text: object, width: int = 200) -> str:
    """`one_line`, and of what is longer than `width` its beginning."""
    text = str(text)
    return one_line(text if len(text) <= width else f"{text[:width]}...")


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]
