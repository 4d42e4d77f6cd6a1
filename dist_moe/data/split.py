"""Assigns text to training or validation: whole documents by a hash of their names, or else blocks of text."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, groupby, islice
from operator import itemgetter
from typing import NamedTuple

from dist_moe.data.files import Document
from dist_moe.data.tokenizer import cut_pieces
from dist_moe.errors import DataError
from dist_moe.text import counted

# Separates this use of the hash from any other. The value was checked: at a fraction of 0.1 it holds out 9.0 % of the
# bytes of Shakespeare (a tragedy or problem play, a history, a comedy, a poem) and 8 to 9 % of those of the standard
# library (Python 3.11 to 3.13). Changing it moves documents between training and validation.
SALT = "dist_moe:"
# Large enough that few sequences end at the edge of a block; a short text has smaller blocks, so that it has several.
LARGEST_BLOCK, SMALLEST_BLOCK, BLOCKS = 1 << 14, 256, 50

Documents = Callable[[], Iterator[Document]]


def in_validation(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out for validation; the probability over names is `fraction`."""
    # The name of a file may hold bytes that are not UTF-8.
    digest = hashlib.sha256((SALT + name).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


class Part(NamedTuple):
    """A document, or the blocks of one that follow each other in the same split."""

    document: Document
    held_out: bool


@dataclass(frozen=True)
class Split:
    """How text is assigned.

    Attributes:
        fraction: Of the text that is held out; 0 where none is.
        documents: How many there are, where text is held out by blocks.
        size: The least characters of a block; 0 where whole documents are held out.
        blocks: How many there are, numbered through all documents.
    """

    fraction: float
    documents: int = 0
    size: int = 0
    blocks: int = 0

    @property
    def held_out(self) -> int:
        """The number of blocks that are held out, at least 1 and not all."""
        return min(self.blocks - 1, max(1, round(self.blocks * self.fraction)))

    @property
    def note(self) -> str:
        """What the user should know; "" where whole documents are held out."""
        if not self.size:
            return ""
        return (
            f"whole documents ({self.documents:,}) would leave one of the splits empty, so {self.held_out:,} of "
            f"{counted(self.blocks, 'block')} of about {self.size:,} characters are held out"
        )

    def parts(self, documents: Iterator[Document]) -> Iterator[Part]:
        """Yield all of the text in order. The pieces of a part must be read before the next part is asked for."""
        if not self.size:
            yield from (Part(document, in_validation(document.name, self.fraction)) for document in documents)
            return
        numbers = count()
        for document in documents:
            blocks = ((next(numbers), text) for text in _blocks(document, self.size))
            for held_out, run in groupby(blocks, key=lambda block: self._is_held_out(block[0])):
                number, text = next(run)
                pieces = chain([text], map(itemgetter(1), run))  # noqa: B031 (continues where next stopped)
                yield Part(Document(document.domain, f"{document.name}#{number}", pieces), held_out)

    def _is_held_out(self, block: int) -> bool:
        """Whether a block is held out; those that are lie evenly spread."""
        return (block + 1) * self.held_out // self.blocks > block * self.held_out // self.blocks


def choose_split(documents: Documents, fraction: float | None) -> Split:
    """Hold out whole documents, or blocks of text where that would leave a split empty.

    Args:
        documents: Returns a new iterator over the documents each time that it is called.
        fraction: What to hold out; None: nothing.

    Raises:
        DataError: The text is too short for two blocks.
    """
    if fraction is None:
        return Split(0.0)
    found: set[bool] = set()
    for document in documents():
        if _has_two_bytes(document):
            found.add(in_validation(document.name, fraction))
        if len(found) == 2:
            return Split(fraction)
    lengths = [sum(map(len, document.pieces)) for document in documents()]
    size = max(SMALLEST_BLOCK, min(LARGEST_BLOCK, sum(lengths) // BLOCKS))
    blocks = sum(1 for document in documents() for _ in _blocks(document, size))
    if blocks < 2:
        split, change = ("train", "lower") if found == {True} else ("validation", "raise")
        text = f"the text of {counted(sum(lengths), 'character')}"
        rule = f"leaves the {split} split empty, and {text} is too short to be divided"
        remedy = f"{change} data.validation_fraction, or give more text"
        raise DataError(f"data.validation_fraction={fraction}", rule, remedy)
    return Split(fraction, sum(map(bool, lengths)), size, blocks)


def _has_two_bytes(document: Document) -> bool:
    """Whether the text may have a token to predict; that of a single byte is one token, which nothing precedes."""
    head = "".join(piece[:2] for piece in islice(filter(None, document.pieces), 2))
    return len(head.encode()) > 1


def _blocks(document: Document, size: int) -> Iterator[str]:
    """Cut the text after white space; where there is none within twice the size, at every `size` characters."""
    for text in cut_pieces(document.pieces, size):
        start = 0
        while len(text) - start > 2 * size:
            yield text[start : start + size]
            start += size
        yield text[start:]
