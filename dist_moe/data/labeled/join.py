"""Joins the texts of examples into the token ids of one row each, at most as long as the model's sequences."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from dist_moe.data.labeled.example import Example
from dist_moe.data.tokenizer import Tokenizer

AT_ONCE = 1024


class JoinedText(NamedTuple):
    """The tokens of an example.

    Attributes:
        ids: int64 [tokens].
        pair_start: Where the second text begins; the number of tokens where there is none.
        is_cut: Whether tokens were left out.
    """

    ids: np.ndarray
    pair_start: int
    is_cut: bool


def join(examples: Sequence[Example], tokenizer: Tokenizer, length: int) -> Iterator[JoinedText]:
    """Yield the tokens of each example: its texts, and the special tokens that the tokenizer puts around them.

    A tokenizer whose file names none gets an end token after each text. Where an example is longer than `length`
    tokens, tokens are left out at the end of the longer of its texts.
    """
    for start in range(0, len(examples), AT_ONCE):
        group = examples[start : start + AT_ONCE]
        firsts = tokenizer.backend.encode_batch([each.text for each in group], add_special_tokens=False)
        pairs = [each.text_pair for each in group if each.text_pair is not None]
        seconds = iter(tokenizer.backend.encode_batch(pairs, add_special_tokens=False))
        for example, first in zip(group, firsts, strict=True):
            yield _join(tokenizer, first, None if example.text_pair is None else next(seconds), length)


def special_tokens(tokenizer: Tokenizer, is_pair: bool) -> int:
    """Return how many special tokens a row has."""
    own: int = tokenizer.backend.num_special_tokens_to_add(is_pair)
    return own or 1 + is_pair


def _join(tokenizer: Tokenizer, first: Encoding, second: Encoding | None, length: int) -> JoinedText:
    texts = [first] if second is None else [first, second]
    sizes = [len(each) for each in texts]
    kept = shorten(sizes, length - special_tokens(tokenizer, second is not None))
    texts = [beginning(text, size) for text, size in zip(texts, kept, strict=True)]
    first, second = texts[0], texts[1] if second is not None else None
    is_cut = kept != sizes
    if not tokenizer.backend.num_special_tokens_to_add(second is not None):
        parts = [[*text.ids, tokenizer.end_id] for text in texts]
        return JoinedText(np.array([*chain.from_iterable(parts)], dtype=np.int64), len(parts[0]), is_cut)
    joined = tokenizer.backend.post_process(first, second)
    types = list(joined.type_ids)
    pair_start = types.index(1) if second is not None and 1 in types else len(types)
    return JoinedText(np.array(joined.ids, dtype=np.int64), pair_start, is_cut)


def beginning(text: Encoding, size: int) -> Encoding:
    """Return the first tokens of a text alone.

    `Encoding.truncate` keeps the rest in pieces, and post-processing a pair joins each piece of one text with each of
    the other: time in the square of the length.
    """
    if len(text) <= size:
        return text
    names = ("ids", "type_ids", "tokens", "offsets", "special_tokens_mask", "attention_mask")
    state: dict[str, Any] = {name: getattr(text, name)[:size] for name in names}
    state |= {"words": text.word_ids[:size], "overflowing": [], "sequence_ranges": {}}
    part = Encoding()
    part.__setstate__(json.dumps(state).encode())
    return part


def shorten(sizes: Sequence[int], room: int) -> list[int]:
    """Return how many tokens of one or two texts are kept, so that they have room: the longer one is cut first."""
    if sum(sizes) <= room:
        return list(sizes)
    if len(sizes) == 1:
        return [max(0, room)]
    shorter = min(*sizes, max(0, room) // 2)
    longer = max(0, room) - shorter
    return [longer, shorter] if sizes[0] >= sizes[1] else [shorter, longer]
