"""Opens the tokenizer of a folder: one that was saved here, or the byte-level BPE of a Hugging Face model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from dist_moe.config.untrusted import parse_json, read_json, read_text
from dist_moe.data.tokenizer import CUT, Tokenizer, byte_alphabet
from dist_moe.errors import DataError

NAME, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Where the pattern of a foreign pre-tokenizer is not known, only this is safe: they all begin a new token with a space
# that comes after a letter.
CUT_FOREIGN = re.compile(r"[a-z](?= )")
NORMAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
KEEPS_ALL = {"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, with the end token that its files name.

    Errors: DataError where the folder holds none, none that is a byte-level BPE, or none with an end token.
    """
    path = folder / NAME
    if not path.exists():
        raise DataError(str(path), "does not exist", "name a folder that a tokenizer was saved to")
    try:
        text = read_text(path, follow=True)
        settings = read_json(folder / SETTINGS, follow=True) if (folder / SETTINGS).exists() else {}
        spec = parse_json(text)
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise DataError(str(path), f"cannot be used ({reason})", "give the folder of another model") from None
    backend.encode_special_tokens = True  # not part of the file
    backend.no_truncation()
    backend.no_padding()
    if strange := next(_strange(spec, backend), None):
        rule = f"is no byte-level BPE: {strange}, so that its tokens are not the bytes of the text"
        raise DataError(str(path), rule, "use data.tokenizer=bytes or bpe with a model that begins at random")
    end = _end(folder, settings, backend)
    if settings.get("eos_token") != end:
        settings["eos_token"] = end
    files = {NAME: text, SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}
    splits = spec["pre_tokenizer"]
    known = _kind(splits) == "ByteLevel" and splits.get("use_regex") is not False
    return Tokenizer(backend, backend.get_vocab()[end], files, CUT if known else CUT_FOREIGN)


def _end(folder: Path, settings: dict[str, Any], backend: tokenizers.Tokenizer) -> str:
    """The end token: that of the tokenizer's settings, else the first of the model's, else of its generation's."""
    named = settings.get("eos_token")
    end = named.get("content") if isinstance(named, dict) else named
    for name in ("config.json", "generation_config.json"):
        if end is None and (folder / name).exists():
            try:
                found = read_json(folder / name, follow=True).get("eos_token_id")
            except (OSError, ValueError):
                continue
            first = found[0] if isinstance(found, list) and found else found
            end = backend.id_to_token(first) if type(first) is int and 0 <= first < 1 << 31 else None
    if not isinstance(end, str) or backend.token_to_id(end) is None:
        rule = f"names no end token of its vocabulary (eos_token={end})"
        raise DataError(str(folder / SETTINGS), rule, "set eos_token there, or give the folder of another model")
    return end


def _strange(spec: dict[str, Any], backend: tokenizers.Tokenizer) -> Iterator[str]:
    """In what a tokenizer is no byte-level BPE that keeps all of a text, in words."""
    model = spec["model"]
    if model.get("type") != "BPE":
        yield f"its model is {model.get('type')}"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            yield f"it has a {key}"
    normal = [_kind(step) for step in _steps(spec.get("normalizer"), "normalizers")]
    if other := [kind for kind in normal if kind not in NORMAL_FORMS]:
        yield f"its text is changed by {other[0]}"
    splits = list(_steps(spec.get("pre_tokenizer"), "pretokenizers"))
    kinds = [_kind(step) for step in splits]
    for step in splits:
        if _kind(step) == "ByteLevel" and step.get("add_prefix_space"):
            yield "it puts a space before a text"
        elif _kind(step) not in ("ByteLevel", "Split", "Digits", "Punctuation"):
            yield f"its text is split by {_kind(step)}"
        elif step.get("behavior") not in (None, *KEEPS_ALL):
            yield "its splitting removes text"
    if "ByteLevel" not in kinds:
        yield "nothing turns a text into bytes"
    if "ByteLevel" not in [_kind(step) for step in _steps(spec.get("decoder"), "decoders")]:
        yield "nothing turns bytes into a text"
    alphabet, vocabulary = set(byte_alphabet()), set(backend.get_vocab(with_added_tokens=False))
    if lacking := alphabet - vocabulary:
        yield f"it lacks {len(lacking)} of the 256 bytes"
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if foreign := [token for token in vocabulary - added if not alphabet.issuperset(token)]:
        yield f"its token {min(foreign)!a} is not made of bytes"
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values() if not token.special):
        yield "its added tokens swallow the white space beside them"


def _steps(step: Any, inner: str) -> Iterator[dict[str, Any]]:
    """The steps of a sequence, which may hold further ones; or the one that there is."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        for each in step.get(inner) or ():
            yield from _steps(each, inner)
    elif isinstance(step, dict):
        yield step


def _kind(step: Any) -> str:
    return str(step.get("type")) if isinstance(step, dict) else "nothing"
