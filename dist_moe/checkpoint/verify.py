"""Verifies a checkpoint completely: every file, every tensor, every element of the optimizer, and finite numbers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dist_moe.checkpoint.format.hf_folder import read_headers, read_index, read_tensors
from dist_moe.checkpoint.format.hf_weights import (
    bias_names,
    build_empty_model,
    find_weights,
    read_config,
)
from dist_moe.checkpoint.format.layout import list_checkpoints, resolve_path, step_of
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, Manifest, find_damage, find_unlisted, read_manifest
from dist_moe.checkpoint.format.model_tensors import SINGLE_RANK, parameter_slices
from dist_moe.checkpoint.format.shard_reader import RANDOM, parse_key
from dist_moe.checkpoint.format.tensor_header import FLOAT_DTYPES, read_header
from dist_moe.checkpoint.training_state import Counters, read_balance, read_counters
from dist_moe.config import Config, load_stored_config
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.engine.optimizer_shards import MASTER, STEPS, moment_names
from dist_moe.errors import UserError
from dist_moe.files import exists
from dist_moe.model.convert import find_layers
from dist_moe.text import counted
from dist_moe.untrusted import printable

CHUNK_NUMEL = 1 << 22
MAX_WORKERS = 1 << 20


@dataclass
class Verdict:
    """The result for one checkpoint.

    Attributes:
        folder: The checkpoint.
        checked: What was checked, in words.
        faults: Every fault, in words.
    """

    folder: Path
    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def check(self, what: str, find_faults: Callable[[], Iterator[str]]) -> None:
        """Record the faults of one check; a check that cannot be completed is a fault."""
        self.checked.append(what)
        try:
            self.faults.extend(find_faults())
        except (UserError, OSError, ValueError, SafetensorError) as error:
            self.faults.append(str(error))


def verify_checkpoints(path: Path) -> list[Verdict]:
    """Verify a checkpoint, or all checkpoints of a run.dir. Every file is read, one tensor at a time.

    Raises:
        CheckpointError: There is none.
    """
    folders = [path] if exists(path / MANIFEST_NAME) else list_checkpoints(path) or [resolve_path(path)]
    verdicts = []
    for folder in folders:
        try:
            verdicts.append(verify(folder, read_manifest(folder)))
        except UserError as error:
            verdicts.append(Verdict(folder, [MANIFEST_NAME], [str(error)]))
    return verdicts


def verify(folder: Path, manifest: Manifest) -> Verdict:
    """Check everything that can be checked without the run."""
    verdict, model, state = Verdict(folder), folder / "model", folder / "state"
    total = sum(entry.bytes for entry in manifest.files.values())
    verdict.check(
        f"{counted(len(manifest.files), 'file')}, {total:,} bytes: size and digest as in {MANIFEST_NAME}, "
        "no further files",
        lambda: iter([*find_unlisted(folder, manifest), *find_damage(folder, manifest, manifest.files)]),
    )
    verdict.check("the step in folder name, manifest and counters", lambda: _check_steps(folder, manifest))
    verdict.check("the index names the file of each tensor", lambda: _check_index(model))
    verdict.check("every tensor and every expert of the model, by name, shape and dtype", lambda: _check_weights(model))
    verdict.check("every element of the optimizer once, in tensors of the model", lambda: _check_optimizer(folder))
    verdict.check("balance state of every MoE layer, bias equal to the weights'", lambda: _check_balance(model, state))
    verdict.check("weights, biases and moments are finite", lambda: _check_finite(folder))
    verdict.check("the tokenizer loads and fits the vocabulary of the model", lambda: _check_tokenizer(model))
    return verdict


def _check_steps(folder: Path, manifest: Manifest) -> Iterator[str]:
    steps = {"the folder name": step_of(folder), "training.json": read_counters(folder / "state").step}
    for source, step in steps.items():
        if step not in (None, manifest.step):
            yield f"{source} has step {step}, and {MANIFEST_NAME} step {manifest.step}"


def _check_index(model: Path) -> Iterator[str]:
    index, stored = read_index(model), read_headers(model)
    for name in sorted({*index, *stored}):
        file = stored[name].file.name if name in stored else None
        if index.get(name) != file:
            yield f"{printable(name)} is in {file or 'no file'}, and in {index.get(name, 'no file')} by the index"


def _empty_model(model: Path) -> PreTrainedModel:
    config, rule = read_config(model)
    return build_empty_model(config, rule, SINGLE_RANK, model)


def _check_weights(model: Path) -> Iterator[str]:
    find_weights(_empty_model(model), SINGLE_RANK, model)
    yield from ()


def _check_optimizer(folder: Path) -> Iterator[str]:
    config, counters = load_stored_config(folder / "config.yaml"), read_counters(folder / "state")
    numels = {part.name: part.numel for part in parameter_slices(_empty_model(folder / "model"), SINGLE_RANK)}
    ranges: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for path in sorted((folder / "state").glob("rank-*.safetensors")):
        for stored in read_header(path).values():
            kind, name, start = parse_key(stored)
            ranges.setdefault(kind, {}).setdefault(name, []).append((start, start + stored.numel))
    rng_states = ranges.pop(RANDOM, {})
    if missing := [rank for rank in range(min(counters.workers, MAX_WORKERS)) if f"cpu/{rank}" not in rng_states]:
        yield f"the random states of ranks {missing[:10]} are missing"
    known = {*_optimizer_kinds(config), MASTER}
    for kind in {*ranges} - known:
        yield f"the optimizer state has {kind!a}, which {config.train.optimizer} does not use"
    for kind in sorted(known & {*ranges, *_required_kinds(config, counters)}):
        stored_ranges = ranges.get(kind, {})
        for name in sorted(set(stored_ranges) - set(numels)):
            yield f"{kind} of {name!a}, which the model does not have"
        if absent := sorted(set(numels) - set(stored_ranges)):
            yield f"{kind} is missing for {counted(len(absent), 'tensor')}, such as {absent[0]}"
        for name in sorted(set(numels) & set(stored_ranges)):
            yield from _check_coverage(f"{kind} of {name}", stored_ranges[name], 1 if kind == STEPS else numels[name])


def _required_kinds(config: Config, counters: Counters) -> set[str]:
    """What must be stored: moments after the first step, and master weights if the model is not fp32."""
    return {*(_optimizer_kinds(config) if counters.taken else ()), *([MASTER] if counters.bf16 else [])}


def _optimizer_kinds(config: Config) -> tuple[str, ...]:
    train = config.train
    return (*moment_names(train.optimizer, train.momentum), *([STEPS] if train.optimizer == "adamw" else []))


def _check_coverage(what: str, ranges: list[tuple[int, int]], numel: int) -> Iterator[str]:
    """Yield the gaps and overlaps of ranges [start, end) that should cover elements 0 to numel - 1."""
    position = 0
    for start, end in sorted(ranges):
        if start > position:
            yield f"{what} lacks elements {position} to {start - 1}"
        elif start < position:
            yield f"{what} has elements {start} to {min(position, end) - 1} twice"
        position = max(position, end)
    if position < numel:
        yield f"{what} lacks elements {position} to {numel - 1}"
    elif position > numel:
        yield f"{what} has elements beyond the {numel} of the tensor"


def _check_balance(model: Path, state: Path) -> Iterator[str]:
    layers, empty_model = read_balance(state), _empty_model(model)
    names = bias_names(empty_model, model)
    biases = dict(read_tensors(model, names.values()))
    for layer in find_layers(empty_model):
        values: Mapping[str, Tensor] = layers.pop(layer.name, {})
        bias_E = values.get("selection_bias")
        if bias_E is None or any(len(value) != layer.experts.num_experts for value in values.values()):
            yield f"the balance state of {layer.name} is not for {counted(layer.experts.num_experts, 'expert')}"
        elif layer.name in names and not torch.equal(biases[names[layer.name]].float(), bias_E):
            yield f"the bias of {layer.name} in the weights differs from the balance state"
    yield from (f"balance state of {name!a}, which is not an MoE layer of the model" for name in layers)


def _check_finite(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*/*.safetensors")):
        names = [stored.name for stored in read_header(path).values() if stored.dtype in FLOAT_DTYPES]
        with safe_open(path, framework="pt") as file:
            yield from (
                f"{path.relative_to(folder)} holds non-finite numbers in {printable(name)}"
                for name in names
                if not _is_finite(file.get_tensor(name))
            )


def _is_finite(tensor: Tensor) -> bool:
    # In chunks: isfinite allocates a mask of the size of its input.
    return all(bool(chunk.isfinite().all()) for chunk in tensor.view(-1).split(CHUNK_NUMEL))


def _check_tokenizer(model: Path) -> Iterator[str]:
    tokens, (config, _) = load_tokenizer(model).vocab_size, read_config(model)
    if tokens > config.vocab_size:
        yield f"the tokenizer has {counted(tokens, 'token')}, and the model {config.vocab_size}"
