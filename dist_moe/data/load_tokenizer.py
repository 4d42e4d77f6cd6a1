"""Loads the tokenizer in a folder: one that this package saved, or the byte-level BPE of a Hugging Face model."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dist_moe.data.tokenizer import CUT, Tokenizer, byte_alphabet
from dist_moe.errors import DataError
from dist_moe.untrusted import parse_json, read_json, read_text

NAME, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Where the pattern of a pre-tokenizer is not known, only this cut is safe: all of them begin a new token with a space
# that follows a letter.
CUT_ANY_PATTERN = re.compile(r"[a-z](?= )")
SEPARATORS = ("[SEP]", "</s>", "[PAD]")
NORMAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
KEEPS_ALL = {"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}


def load_tokenizer(folder: Path, byte_level: bool = True) -> Tokenizer:
    """Load the tokenizer of a folder, with the end token that its files name.

    Args:
        folder: The folder of a model, or of a tokenizer.
        byte_level: Refuse a tokenizer whose tokens are not the bytes of the text, as a language model needs. Another
            one, such as WordPiece, may name a separator in place of an end token.

    Raises:
        DataError: The folder has no tokenizer, it is not a byte-level BPE, or its files name no end token.
    """
    path = folder / NAME
    if not path.exists():
        raise DataError(str(path), "does not exist", "give a folder that a tokenizer was saved to")
    try:
        text = read_text(path, follow=True)
        settings = read_json(folder / SETTINGS, follow=True) if (folder / SETTINGS).exists() else {}
        spec = parse_json(text)
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        message = " ".join(str(error).split())[:200]
        raise DataError(str(path), f"cannot be used ({message})", "give the folder of another model") from None
    backend.encode_special_tokens = True  # not part of the file
    backend.no_truncation()
    backend.no_padding()
    if byte_level and (reason := next(_unsupported(spec, backend), None)):
        rule = f"is not a byte-level BPE: {reason}, so its tokens are not the bytes of the text"
        remedy = "use data.tokenizer=bytes or bpe, with a model that is initialized at random"
        raise DataError(str(path), rule, remedy)
    end = _end_token(folder, settings, backend, () if byte_level else SEPARATORS)
    if settings.get("eos_token") != end:
        settings["eos_token"] = end
    files = {NAME: text, SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}
    splits = spec.get("pre_tokenizer")
    pattern_is_known = (
        isinstance(splits, dict) and _kind(splits) == "ByteLevel" and splits.get("use_regex") is not False
    )
    return Tokenizer(backend, backend.get_vocab()[end], files, CUT if pattern_is_known else CUT_ANY_PATTERN)


def _end_token(folder: Path, settings: dict[str, Any], backend: tokenizers.Tokenizer, separators: Sequence[str]) -> str:
    """Return the end token of the tokenizer's settings, else of config.json, else of generation_config.json.

    separators: what it may be besides, in the last place.
    """
    named = settings.get("eos_token")
    end = named.get("content") if isinstance(named, dict) else named
    for name in ("config.json", "generation_config.json"):
        if end is None and (folder / name).exists():
            try:
                ids = read_json(folder / name, follow=True).get("eos_token_id")
            except (OSError, ValueError):
                continue
            first = ids[0] if isinstance(ids, list) and ids else ids
            end = backend.id_to_token(first) if type(first) is int and 0 <= first < 1 << 31 else None
    if end is None:
        named = (settings.get(key) for key in ("sep_token", "pad_token"))
        spelled = (each.get("content") if isinstance(each, dict) else each for each in named)
        end = next((each for each in (*spelled, *separators) if separators and each in backend.get_vocab()), None)
    if not isinstance(end, str) or backend.token_to_id(end) is None:
        rule = f"names no end token of its vocabulary (eos_token={end})"
        raise DataError(str(folder / SETTINGS), rule, "set eos_token there, or give the folder of another model")
    return end


def _unsupported(spec: dict[str, Any], backend: tokenizers.Tokenizer) -> Iterator[str]:
    """Yield each reason why a tokenizer is not a byte-level BPE that keeps all of a text."""
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
            yield "it adds a space before a text"
        elif _kind(step) not in ("ByteLevel", "Split", "Digits", "Punctuation"):
            yield f"its text is split by {_kind(step)}"
        elif step.get("behavior") not in (None, *KEEPS_ALL):
            yield "its splitting removes text"
    if "ByteLevel" not in kinds:
        yield "nothing turns a text into bytes"
    if "ByteLevel" not in [_kind(step) for step in _steps(spec.get("decoder"), "decoders")]:
        yield "nothing turns bytes into a text"
    alphabet, vocabulary = set(byte_alphabet()), set(backend.get_vocab(with_added_tokens=False))
    if missing := alphabet - vocabulary:
        yield f"it lacks {len(missing)} of the 256 bytes"
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if others := [token for token in vocabulary - added if not alphabet.issuperset(token)]:
        yield f"its token {min(others)!a} is not made of bytes"
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values() if not token.special):
        yield "its added tokens strip the white space around them"


def _steps(step: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a (nested) sequence, or the single step."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        for each in step.get(inner) or ():
            yield from _steps(each, inner)
    elif isinstance(step, dict):
        yield step


def _kind(step: Any) -> str:
    return str(step.get("type")) if isinstance(step, dict) else "nothing"
