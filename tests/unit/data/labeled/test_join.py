"""How the texts of an example become one row: special tokens, pairs, and what is cut."""

from pathlib import Path

import pytest

from dist_moe.data.labeled.example import Example
from dist_moe.data.labeled.join import beginning, join, shorten, special_tokens
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.data.tokenizer import Tokenizer, byte_tokenizer
from dist_moe.errors import DataError
from tests.folders import make_wordpiece


def wordpiece(folder: Path) -> Tokenizer:
    """The tokenizer of an encoder's folder."""
    make_wordpiece(folder)
    return load_tokenizer(folder, byte_level=False)


def example(text: str, pair: str | None = None) -> Example:
    return Example("key", text, pair, "label")


def test_a_pair_has_the_special_tokens_of_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path / "model")
    assert (tokenizer.end_id, special_tokens(tokenizer, False), special_tokens(tokenizer, True)) == (3, 2, 3)
    single, pair = join([example("the films"), example("the film", "is good")], tokenizer, 32)
    assert (single.ids.tolist(), single.pair_start, single.is_cut) == ([2, 4, 5, 8, 3], 5, False)
    assert (pair.ids.tolist(), pair.pair_start, pair.is_cut) == ([2, 4, 5, 3, 6, 7, 3], 4, False)


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    (joined,) = join([example("[SEP]")], wordpiece(tmp_path / "model"), 32)
    assert joined.ids.tolist()[1:-1] != [3]


def test_without_special_tokens_each_text_ends_with_an_end_token() -> None:
    single, pair = join([example("ab"), example("ab", "c")], byte_tokenizer(), 32)
    assert (single.ids.tolist(), single.pair_start) == ([97, 98, 256], 3)
    assert (pair.ids.tolist(), pair.pair_start) == ([97, 98, 256, 99, 256], 3)


def test_the_longer_text_is_cut_first(tmp_path: Path) -> None:
    cut, pair = join([example("abcdef"), example("abcdefgh", "ij")], byte_tokenizer(), 6)
    assert (bytes(cut.ids[:-1].tolist()), cut.ids[-1], cut.is_cut) == (b"abcde", 256, True)
    assert (pair.ids.tolist(), pair.pair_start, pair.is_cut) == ([97, 98, 256, 105, 106, 256], 3, True)
    assert [shorten([9, 1], 4), shorten([1, 9], 4), shorten([9, 9], 5), shorten([2, 2], 4)] == [
        [3, 1],
        [1, 3],
        [3, 2],
        [2, 2],
    ]


def test_a_cut_pair_is_joined_without_the_rest_of_its_texts(tmp_path: Path) -> None:
    """The row is that of `truncate`, which keeps the rest in pieces that are joined with each other."""
    tokenizer = wordpiece(tmp_path / "model")
    texts = ("the films is good the film", "the film good " * 9)
    for length in (4, 8, 100):
        (joined,) = join([example(*texts)], tokenizer, length)
        first, second = (tokenizer.backend.encode(text, add_special_tokens=False) for text in texts)
        kept = shorten([len(first), len(second)], length - 3)
        parts = [beginning(text, size) for text, size in zip((first, second), kept, strict=True)]
        assert not any(part.overflowing for part in parts)
        first.truncate(kept[0])
        second.truncate(kept[1])
        assert [part.ids for part in parts] == [first.ids, second.ids]
        assert joined.ids.tolist() == tokenizer.backend.post_process(first, second).ids
        assert not tokenizer.backend.post_process(parts[0], parts[1]).overflowing
        assert joined.pair_start == len(first) + 2 and joined.is_cut == (length < 100)


def test_a_tokenizer_that_is_not_byte_level_is_for_labeled_texts_alone(tmp_path: Path) -> None:
    wordpiece(tmp_path / "model")
    with pytest.raises(DataError, match="is not a byte-level BPE: its model is WordPiece"):
        load_tokenizer(tmp_path / "model")
