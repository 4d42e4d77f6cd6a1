"""Exports a checkpoint's weights into one file, tensor by tensor, so that memory never holds the model."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open

from dist_moe.checkpoint.errors import CheckpointError, without_remedy
from dist_moe.checkpoint.format.hf_folder import read_headers, read_raw_config
from dist_moe.checkpoint.format.layout import PARTIAL, resolve_path
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, find_damage, read_manifest
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.checkpoint.format.tensor_header import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    StoredTensor,
    read_header,
)
from dist_moe.checkpoint.inspect import BIAS_PATTERN
from dist_moe.config import load_stored_config
from dist_moe.data.cache import file_sha256
from dist_moe.engine.optimizer_shards import MASTER
from dist_moe.errors import ConfigError, reason_of
from dist_moe.families.composite import is_composite
from dist_moe.files import entries, exists, is_folder, sync_folder, write_atomically
from dist_moe.text import listed
from dist_moe.untrusted import read_text

Dtype = Literal["fp32", "bf16", "keep"]
CONFIG_NAME = "config.yaml"
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHUNK_NUMEL = 1 << 22


class Exported(NamedTuple):
    """What was exported.

    Attributes:
        source: The checkpoint.
        without_bias: Whether selection biases were left out, for which the family has no place.
        notice: What may be missing, in a line; "" where nothing is.
    """

    source: Path
    without_bias: bool
    notice: str = ""


def export(path: Path, out: Path, dtype: Dtype, plain: bool = False) -> Exported:
    """Write `out` with one model.safetensors, config.json and the tokenizer.

    Args:
        path: As `resolve_path`.
        out: A folder that does not exist or is empty; nothing is removed.
        dtype: Of the weights. `fp32` takes the optimizer's master weights where the checkpoint stores them. Selection
            biases and thresholds keep their dtype.
        plain: Write what the family's class of transformers saves, without selection biases that it has no place for.

    Raises:
        CheckpointError, WeightsError: The path is not a checkpoint, it is damaged, or `out` is not empty.
    """
    source = resolve_path(path)
    is_checkpoint = exists(source / MANIFEST_NAME)
    model = source / "model" if is_checkpoint else source
    partial = out.with_name(out.name + PARTIAL)
    _check_free(source, out, partial)
    if is_checkpoint:
        manifest = read_manifest(source)
        used = [name for name in manifest.files if name.startswith(("model/", "state/rank-"))]
        if damage := find_damage(source, manifest, used):
            raise CheckpointError(f"{source} is damaged: {listed(damage, last='and', most=3)}; export another one")
    try:
        partial.mkdir(parents=True)
        try:
            whole, notice = _composite_of(source) if plain else (None, "")
            without_bias = plain and _write_plain(source, model, partial, dtype, whole)
            if not plain:
                _write_folder(source, model, partial, dtype)
            _copy_files(model, partial, COPIED_FILES)
            if whole is not None:
                _copy_files(whole, partial, _processor_files(whole))
            os.rename(partial, out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = f"{reason_of(error)}: {error.filename or out}"
        remedy = "use a folder on a disk with free space and write permission"
        raise CheckpointError(f"{out} cannot be written ({reason}); {remedy}") from None
    return Exported(source, without_bias, notice)


def _write_plain(source: Path, model: Path, partial: Path, dtype: Dtype, whole: Path | None) -> bool:
    from dist_moe.checkpoint.format.plain_folder import write_plain  # imports the classes of transformers

    if dtype != "fp32":
        return write_plain(model, partial, dtype, None, whole)
    with ShardReader(source / "state") as masters:
        return write_plain(model, partial, dtype, masters, whole)


def _composite_of(source: Path) -> tuple[Path | None, str]:
    """Return the folder of the multimodal model whose language model a run trained, or None, and a notice.

    The notice is for the case that this is not known, since the folder that the run started from cannot be read.
    """
    if not exists(source / CONFIG_NAME):
        return (source if is_composite(read_raw_config(source)) else None), ""
    try:
        folder = load_stored_config(source / CONFIG_NAME).model.pretrained
        if folder is None:
            return None, ""
        raw = read_raw_config(Path(folder))
        return (Path(folder) if is_composite(raw) else None), ""
    except (ConfigError, CheckpointError, ValueError) as error:
        reason = without_remedy(error)
        return None, f"if the run started from a multimodal model, only its language model is written: {reason}"


def _processor_files(whole: Path) -> list[str]:
    """Return the names of the files of a multimodal model that are not its weights: processor, chat template."""
    names = [path.name for path in entries(whole) if path.suffix in (".json", ".jinja", ".txt") and path.is_file()]
    return sorted(name for name in names if not name.endswith(".index.json") and name != "config.json")


def _copy_files(model: Path, partial: Path, names: Iterable[str]) -> None:
    for name in names:
        if exists(model / name) and not exists(partial / name):
            write_atomically(partial / name, read_text(model / name, follow=True))


def _check_free(source: Path, out: Path, partial: Path) -> None:
    if os.path.islink(out) or (exists(out) and (not is_folder(out) or entries(out))):
        raise CheckpointError(f"{out} exists and is not an empty folder; use another name, or remove it")
    if os.path.islink(partial) or exists(partial):
        raise CheckpointError(f"{partial} exists, from another export that runs or was interrupted; remove it")
    # Path.resolve raises RuntimeError for links in a circle.
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
        raise CheckpointError(f"{out} is inside the checkpoint; use another folder")


def _write_folder(source: Path, model: Path, partial: Path, dtype: Dtype) -> None:
    raw_config, tensors = read_raw_config(model), read_headers(model)
    dtypes = {name: _target_dtype(stored, dtype) for name, stored in tensors.items()}
    # Larger elements first, so that the offset of each tensor is a multiple of its element size.
    order = sorted(tensors.values(), key=lambda stored: (-DTYPE_BYTES[dtypes[stored.name]], stored.name))
    path, digest = partial / "model.safetensors", hashlib.sha256()
    with contextlib.ExitStack() as stack:
        masters = stack.enter_context(ShardReader(source / "state")) if dtype == "fp32" else None
        paths = {stored.file for stored in order}
        files = {each: stack.enter_context(safe_open(each, framework="pt")) for each in paths}
        out_file = stack.enter_context(path.open("xb"))
        ours = _names_of_masters(model) if masters is not None else {}
        contents = (
            _read_bytes(stored, files[stored.file], masters, dtypes[stored.name], ours.get(stored.name, stored.name))
            for stored in order
        )
        blocks: Iterator[Any] = itertools.chain([_header(order, dtypes)], itertools.chain.from_iterable(contents))
        for block in blocks:
            digest.update(block)
            out_file.write(block)
        out_file.flush()
        os.fsync(out_file.fileno())
    if file_sha256(path) != digest.hexdigest() or set(read_header(path)) != set(tensors):
        raise CheckpointError(f"{path} does not hold what was written; check the storage")
    if dtype != "keep":
        raw_config["dtype"] = TORCH_NAMES[dtype]
        raw_config.pop("torch_dtype", None)
    write_atomically(partial / "config.json", json.dumps(raw_config, indent=2, sort_keys=True) + "\n")


def _target_dtype(stored: StoredTensor, dtype: Dtype) -> str:
    """The dtype in which a tensor is written, by safetensors' name."""
    # A selection bias in bf16 would lose the 0.001 that one step adds to it.
    is_state = BIAS_PATTERN.fullmatch(stored.name) or stored.name.endswith(".threshold")
    if dtype == "keep" or is_state or stored.dtype in INTEGER_DTYPES:
        return stored.dtype
    if stored.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{stored.name!a} is {stored.dtype}, not {', '.join(FLOAT_DTYPES)}; use --dtype keep")
    return "F32" if dtype == "fp32" else "BF16"


def _header(order: Sequence[StoredTensor], dtypes: Mapping[str, str]) -> bytes:
    """The header of a safetensors file: the length of the JSON, and the JSON, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for stored in order:
        dtype = dtypes[stored.name]
        end = offset + stored.numel * DTYPE_BYTES[dtype]
        entries[stored.name] = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _names_of_masters(model: Path) -> dict[str, str]:
    """Return the names of master weights by those in the files, where they differ."""
    from dist_moe.checkpoint.format.hf_weights import names_in_files  # imports the classes of transformers

    return {name: ours for ours, name in names_in_files(model).items()}


def _read_bytes(
    stored: StoredTensor, file: Any, masters: ShardReader | None, dtype: str, name: str
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in its target dtype, CHUNK_NUMEL elements at a time."""
    flat = file.get_tensor(stored.name).reshape(-1)
    reader = masters if masters is not None and masters.has(MASTER, name) else None
    for start in range(0, stored.numel, CHUNK_NUMEL):
        chunk = flat[start : start + CHUNK_NUMEL]
        if reader is not None:
            chunk = reader.read(MASTER, name, start, chunk.numel())
        if dtype != stored.dtype:
            chunk = chunk.to(torch.float32 if dtype == "F32" else torch.bfloat16)
        yield memoryview(chunk.contiguous().view(torch.uint8).numpy())
