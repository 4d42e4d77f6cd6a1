"""Writes a checkpoint's weights into one file, tensor by tensor: memory never holds the model."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_folder import raw_config, tensor_files
from dist_moe.checkpoint.format.layout import PARTIAL
from dist_moe.checkpoint.format.locate import resolve_path
from dist_moe.checkpoint.format.manifest import NAME, find_damage, read_manifest, sync_folder
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.checkpoint.format.tensor_header import FLOATS, ITEM_BYTES, Stored, read_header
from dist_moe.checkpoint.inspect import BIAS
from dist_moe.config.untrusted import read_text
from dist_moe.data.cache import file_sha256
from dist_moe.engine.optimizer_shards import MASTER

Dtype = Literal["fp32", "bf16", "keep"]
WORDS = {"fp32": "float32", "bf16": "bfloat16"}
ALONGSIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
AT_ONCE = 1 << 22


def export(path: Path, out: Path, dtype: Dtype) -> Path:
    """Write `out` with one model.safetensors, config.json and the tokenizer -> the checkpoint that it is of.

    dtype: of the weights; fp32 are the optimizer's, where the checkpoint keeps them. Selection biases and thresholds
    stay as they are. Errors: CheckpointError and WeightsError for a checkpoint that is none or is damaged, and for an
    `out` that holds something: nothing is removed.
    """
    source = resolve_path(path)
    whole = (source / NAME).exists()
    model = source / "model" if whole else source
    partial = out.with_name(out.name + PARTIAL)
    _check_free(source, out, partial)
    if whole:
        manifest = read_manifest(source)
        used = [name for name in manifest.files if name.startswith(("model/", "state/rank-"))]
        if wrong := find_damage(source, manifest, used):
            raise CheckpointError(f"{source} is damaged: {', '.join(wrong[:3])}; export another one")
    try:
        partial.mkdir(parents=True)
        try:
            _write(source, model, partial, dtype)
            os.rename(partial, out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error})") from None
    return source


def _check_free(source: Path, out: Path, partial: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise CheckpointError(f"{out} is there and is no empty folder; give another name, or remove it")
    if partial.is_symlink() or partial.exists():
        raise CheckpointError(f"{partial} is in the way: another export's, or what one left behind; remove it")
    if out.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{out} is inside of the checkpoint; give another place")


def _write(source: Path, model: Path, partial: Path, dtype: Dtype) -> None:
    raw, found = raw_config(model), tensor_files(model)
    planned = {name: _planned(stored, dtype) for name, stored in found.items()}
    # Larger numbers first, so that each begins at a multiple of its size.
    order = sorted(found.values(), key=lambda stored: (-ITEM_BYTES[planned[stored.name]], stored.name))
    path, digest = partial / "model.safetensors", hashlib.sha256()
    with contextlib.ExitStack() as stack:
        masters = stack.enter_context(ShardReader(source / "state")) if dtype == "fp32" else None
        files = {each: stack.enter_context(safe_open(each, framework="pt")) for each in {s.file for s in order}}
        file = stack.enter_context(path.open("xb"))
        values = (_values(stored, files[stored.file], masters, planned[stored.name]) for stored in order)
        parts: Iterator[Any] = itertools.chain([_header(order, planned)], itertools.chain.from_iterable(values))
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    if file_sha256(path) != digest.hexdigest() or set(read_header(path)) != set(found):
        raise CheckpointError(f"{path} does not hold what was written; see to the storage")
    if dtype != "keep":
        raw["dtype"] = WORDS[dtype]
        raw.pop("torch_dtype", None)
    (partial / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in ALONGSIDE:
        if (model / name).exists():
            (partial / name).write_text(read_text(model / name, follow=True), encoding="utf-8")


def _planned(stored: Stored, dtype: Dtype) -> str:
    """In which dtype a tensor is written. A selection bias in bf16 would lose what one step adds to it."""
    if dtype == "keep" or BIAS.fullmatch(stored.name) or stored.name.endswith(".threshold"):
        return stored.dtype
    if stored.dtype not in FLOATS:
        raise CheckpointError(f"{stored.name!a} is {stored.dtype} and not {', '.join(FLOATS)}; use --dtype keep")
    return "F32" if dtype == "fp32" else "BF16"


def _header(order: Sequence[Stored], planned: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: the length of what follows, and that as JSON, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for stored in order:
        word = planned[stored.name]
        end = at + stored.numel * ITEM_BYTES[word]
        entries[stored.name] = {"dtype": word, "shape": list(stored.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _values(stored: Stored, file: Any, masters: ShardReader | None, word: str) -> Iterator[memoryview]:
    """The bytes of a tensor in its new dtype, some millions of numbers at a time."""
    flat = file.get_tensor(stored.name).reshape(-1)
    mastered = masters if masters is not None and masters.holds(MASTER, stored.name) else None
    for start in range(0, stored.numel, AT_ONCE):
        part = flat[start : start + AT_ONCE]
        if mastered is not None:
            part = mastered.read(MASTER, stored.name, start, part.numel())
        if word != stored.dtype:
            part = part.to(torch.float32 if word == "F32" else torch.bfloat16)
        yield memoryview(part.contiguous().view(torch.uint8).numpy())
