"""Text in messages and names: values cut short, and no character that a terminal obeys."""

import re
import reprlib

# Control characters but tab and newline (C0, DEL, C1), marks that change the direction of text,
# line separators, and halves of surrogate pairs, which no encoding can write.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """Return text for a terminal: characters that could control it are written as escapes."""
    return UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def brief(value: object) -> str:
    """Return a value as Python writes it, cut to some eighty characters for a message."""
    text = printable(_repr.repr(value))
    return text if len(text) <= 80 else f"{text[:50]}...{text[-20:]}"


def shorten(text: str, most: int = 300) -> str:
    """Return text on one line, cut to a number of characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 3]}..."


class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write numbers of more than 4,300 digits.
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 128 else repr(x)


_repr = _Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 3, 60, 60


def one_line(text: str, most: int = 300) -> str:
    """Return text of several lines as one of at most that many characters."""
    return shorten(" ".join(text.split()), most)
