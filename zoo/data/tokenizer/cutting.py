r"""Long documents in pieces whose tokens, joined, are those of the whole.

What a tokenizer does at a place may depend on what is around it: runs of white space, merges across any border, a space
that it puts before the first word. So a cut is taken only where the tokens next to it depend on nothing further away.
With `left` and `right` the text on both sides of it, 2,048 characters each,

    encode(left + right) = encode(left) + tail,        and encode(left[1:] + right) = encode(left[1:]) + the same tail

(the second excludes a run of one token repeated, whose borders follow from where the text begins). The piece that
begins there is encoded after `left`, and the tokens of `left` are dropped: nothing is put before it that the document
has not. A part in which no such place is found is encoded in one go, up to 16 million characters.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from zoo.errors import UsageError

_ZONES, _ZONE = 4, 512  # parts of a piece that are searched, and the characters of each
_TRIES = 4  # of each kind of place in a zone

# Where a tokenizer is likely to cut, likeliest first: around line ends, white space, punctuation; between any two.
_PLACES = tuple(map(re.compile, (r"\s*\n\s*", r"\s+", r"[^\w\s]+", r"[^\s]")))


class Piece(NamedTuple):
    context: str  # what stands before it in the document, to be encoded with it; its tokens are known already
    text: str


class Sizes(NamedTuple):
    """In characters. A piece is longer than twice the context."""

    piece: int = 1 << 20
    context: int = 1 << 11
    longest: int = 1 << 24


SIZES = Sizes()


def pieces(
    blocks: Iterable[str], encode: Callable[[Sequence[str]], Sequence[Sequence[int]]], name: str, sizes: Sizes
) -> Iterator[Piece]:
    """A document, given in blocks, cut anew.

    Args:
      encode: of several texts, their tokens.
      name: of the document, for messages.

    Raises:
      UsageError: more than `sizes.longest` characters in which no place for a cut is found.
    """
    rest = context = ""
    tried = 0  # characters of `rest` that are known to hold no place
    for block in blocks:
        rest += block
        while len(rest) - tried >= sizes.piece + sizes.context:
            cut = _find(rest, max(tried, sizes.context, sizes.piece // 2), encode, sizes.context)
            if cut is None:
                tried = len(rest) - sizes.context
                break
            yield Piece(context, rest[:cut])
            context, rest, tried = rest[cut - sizes.context : cut], rest[cut:], 0
        if len(rest) > sizes.longest:
            raise UsageError(
                f"{name}: {len(rest):,} characters without a place where this tokenizer surely separates two tokens; "
                "break it into lines or documents, or use another tokenizer"
            )
    if rest:
        yield Piece(context, rest)


def _find(text: str, start: int, encode: Callable, context: int) -> int | None:
    """A place for a cut in `text` from `start` on, with `context` characters after it: near the end if it can be."""
    last = len(text) - context
    for stop in range(last, start, -max(1, (last - start) // _ZONES)):
        for place in _PLACES:
            spans = [match.span() for match in place.finditer(text, max(start, stop - _ZONE), stop)]
            for cut in dict.fromkeys(itertools.chain(*reversed(spans[-_TRIES:]))):
                if start <= cut and _is_safe(text[cut - context : cut], text[cut : cut + context], encode):
                    return cut
    return None


def _is_safe(left: str, right: str, encode: Callable) -> bool:
    whole, before, whole_later, before_later = map(list, encode([left + right, left, left[1:] + right, left[1:]]))
    tail = whole[len(before) :]
    return whole == before + tail and whole_later == before_later + tail
