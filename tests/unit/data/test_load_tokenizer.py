"""`load_tokenizer`: tokens have the bytes of the text, text never becomes a special token, others are refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.data.corpus import prepare
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.errors import DataError
from tests.folders import END, THINK, make_tokenizer

TEXT = f"The router's load,\nétait 12 naïve!\n\n  日本語 {END} {THINK}x</think> <|endoftext|>"


def test_ids_are_those_of_the_file_and_their_bytes_those_of_the_text(tmp_path: Path) -> None:
    backend = make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    backend.encode_special_tokens = True
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == backend.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.token_bytes_V[ids].sum() == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    special = [backend.get_vocab()[word] for word in (END, "<|endoftext|>")]
    assert tokenizer.end_id == special[0] and tokenizer.token_bytes_V[special].tolist() == [0, 0]
    assert not np.isin(special, ids).any(), "a text that spells them is encoded as text"
    assert backend.token_to_id(THINK) in ids


def test_a_long_text_is_cut_where_no_token_is(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer, text = load_tokenizer(tmp_path), "A token. The load,\n\nof experts!\n" * 6000
    assert len(text) > 2 * 65_536
    assert tokenizer.encode(text).tolist() == tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_a_saved_tokenizer_loads_back_from_an_equal_file(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "there", chat_template="x")
    load_tokenizer(tmp_path / "there").save(tmp_path / "here")
    files = [(tmp_path / side / "tokenizer.json").read_bytes() for side in ("there", "here")]
    assert files[0] == files[1]
    assert load_tokenizer(tmp_path / "here").end_id == load_tokenizer(tmp_path / "there").end_id
    assert json.loads((tmp_path / "here/tokenizer_config.json").read_text())["chat_template"] == "x"


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>", "special": True}}}, "<|endoftext|>"),
        ({"tokenizer_config.json": {}, "config.json": {"eos_token_id": "END"}}, END),
        ({"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": ["END", 0]}}, END),
        ({"tokenizer_config.json": {"eos_token": "<nowhere>"}}, None),
        ({"tokenizer_config.json": {}, "config.json": {"eos_token_id": 10**30}}, None),
    ],
)
def test_the_end_token_is_the_one_that_the_files_name(tmp_path: Path, files: dict[str, Any], word: str | None) -> None:
    backend = make_tokenizer(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content).replace('"END"', str(backend.token_to_id(END))))
    if word is None:
        with pytest.raises(DataError, match="names no end token"):
            load_tokenizer(tmp_path)
        return
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_id == backend.token_to_id(word)
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").end_id == tokenizer.end_id


def change(spec: Any, dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for name in path:
        spec = spec[int(name) if name.isdecimal() else name]
    spec[last] = value


@pytest.mark.parametrize(
    ("dotted", "value", "reason"),
    [
        ("normalizer", {"type": "Lowercase"}, "its text is changed by Lowercase"),
        ("pre_tokenizer", {"type": "Whitespace"}, "its text is split by Whitespace"),
        ("pre_tokenizer", None, "nothing turns a text into bytes"),
        ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "its splitting removes text"),
        ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "it adds a space before a text"),
        ("decoder", None, "nothing turns bytes into a text"),
        ("model.dropout", 0.1, "it has a dropout"),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "its model is WordLevel"),
    ],
)
def test_a_tokenizer_that_is_not_a_byte_level_bpe_is_refused(
    tmp_path: Path, dotted: str, value: Any, reason: str
) -> None:
    make_tokenizer(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec, dotted, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=f"is not a byte-level BPE: {reason}"):
        load_tokenizer(tmp_path)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "deep": lambda path: path.write_text("[" * 100_000),
    "not a tokenizer": lambda path: path.write_text('{"model": {"type": "BPE"}}'),
    "no object": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_not_a_tokenizer_is_refused_without_blocking(tmp_path: Path, case: str) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    HOSTILE[case](tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="cannot be used"):
        load_tokenizer(tmp_path)


def test_the_fingerprint_depends_on_the_file_of_the_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"expert {n} {END}", "name": str(n)}) + "\n" for n in range(30)))

    def tokenize(vocabulary: int) -> Any:
        return prepare([str(text)], "pretrained", vocabulary, 0.3, tmp_path / "cache", tmp_path / "model")

    make_tokenizer(tmp_path / "model")
    first = tokenize(320)
    assert (first.train.tokens == first.tokenizer.end_id).sum() == len(first.train.starts_N1) - 1
    size = first.tokenizer.vocab_size
    assert tokenize(size).fingerprint == first.fingerprint
    with pytest.raises(DataError, match=f"tokenizer.json has {size} tokens, and the model {size - 1}"):
        tokenize(size - 1)
    make_tokenizer(tmp_path / "model", eos_token="<|endoftext|>")
    assert tokenize(320).fingerprint != first.fingerprint
    make_tokenizer(tmp_path / "model")
    assert tokenize(320).fingerprint == first.fingerprint
    spec = json.loads((tmp_path / "model/tokenizer.json").read_text())
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(spec, indent=3))
    assert tokenize(320).fingerprint != first.fingerprint, "the file has changed"
