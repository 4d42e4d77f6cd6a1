"""Tokenizers: every text decodes back, bytes are counted, and no text becomes the end token."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.data.tokenizer import END, Tokenizer, byte_tokenizer, cut, train_bpe
from dist_moe.errors import DataError

SAMPLE = (
    "The quality of mercy isn't strain'd,\n  it droppeth as the gentle rain from heaven.\n\n"
    "def f(x):\n    return x + 1\n"
)
TEXTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    st.text(alphabet="ab '.\n\t\r\x0b\x1c\x85 　1é日<|>"),
    st.lists(st.sampled_from([*SAMPLE.split(" "), END, " ", "\n", "    "])).map("".join),
)


def _bpe() -> Tokenizer:
    return train_bpe(iter([SAMPLE * 20, "der Rhein, 日本語, été " * 9]), 400)


BOTH = [byte_tokenizer(), _bpe()]


@pytest.mark.parametrize("tokenizer", BOTH, ids=["bytes", "bpe"])
@given(text=TEXTS)
def test_text_decodes_back_and_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
    assert tokenizer.end_id not in ids
    assert ids.tolist() == tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_byte_tokenizer_is_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    assert tokenizer.token_bytes_V.tolist() == [1] * 256 + [0]
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]


def test_bpe_has_merges_and_the_end_last() -> None:
    tokenizer = _bpe()
    assert 300 < tokenizer.vocab_size <= 400
    assert tokenizer.end_id == tokenizer.vocab_size - 1 == tokenizer.backend.token_to_id(END)
    assert tokenizer.token_bytes_V.max() > 3
    assert tokenizer.token_bytes_V[tokenizer.end_id] == 0
    assert len(tokenizer.encode(SAMPLE)) < len(SAMPLE) / 2


def test_end_token_decodes_to_nothing() -> None:
    tokenizer = _bpe()
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_id, *tokenizer.encode("b")]) == "ab"


@given(text=TEXTS, size=st.integers(1, 9))
def test_cutting_changes_no_token(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
    tokenizer = BOTH[1]
    ids = [each for piece in pieces for each in tokenizer.backend.encode(piece).ids]
    assert ids == tokenizer.backend.encode(text).ids


def test_long_text_is_encoded_in_pieces() -> None:
    tokenizer = BOTH[1]
    text = SAMPLE * 5_000
    assert len(list(cut(text, 65_536))) > 5
    short, long, empty = tokenizer.encode_batch([SAMPLE, text, ""])
    np.testing.assert_array_equal(short, tokenizer.encode(SAMPLE))
    np.testing.assert_array_equal(long, tokenizer.backend.encode(text).ids)
    assert len(empty) == 0


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(TEXTS, max_size=40))
def test_batch_is_each_text_alone(texts: list[str]) -> None:
    for tokenizer in BOTH:
        for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
            assert ids.tolist() == tokenizer.backend.encode(text).ids


def test_training_is_the_same_in_another_process() -> None:
    program = (
        "from tests.unit.data.test_tokenizer import _bpe; import hashlib;"
        "print(hashlib.sha256(_bpe().backend.to_str().encode()).hexdigest())"
    )
    answers = {subprocess.check_output([sys.executable, "-c", program], cwd=Path(__file__).parents[3]) for _ in "ab"}
    assert len(answers) == 1


@pytest.mark.parametrize("vocabulary", [0, 256])
def test_vocabulary_too_small(vocabulary: int) -> None:
    with pytest.raises(DataError, match=f"data.vocabulary={vocabulary} has no room for .*257"):
        train_bpe(iter(["x"]), vocabulary)


@pytest.mark.parametrize("tokenizer", BOTH, ids=["bytes", "bpe"])
def test_saved_tokenizer_loads_here_and_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, DeepseekV3Config

    text = f"  {SAMPLE} {END} été　\x00"
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
    np.testing.assert_array_equal(loaded.token_bytes_V, tokenizer.token_bytes_V)
    # With a model's config.json in the folder, transformers may choose the tokenizer class of that architecture.
    for with_model_config in (False, True):
        if with_model_config:
            DeepseekV3Config().save_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == text
        assert (len(theirs), theirs.eos_token_id) == (tokenizer.vocab_size, tokenizer.end_id)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path)
