"""Whether a checkpoint is whole: every file, every tensor, every element of the optimizer, and finite numbers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dist_moe.checkpoint.format.hf_folder import indexed, stored_tensors, tensor_files
from dist_moe.checkpoint.format.hf_weights import (
    bias_in_files,
    find_weights,
    named_parameters,
    read_config,
    shaped_model,
)
from dist_moe.checkpoint.format.layout import step_of
from dist_moe.checkpoint.format.locate import list_checkpoints
from dist_moe.checkpoint.format.manifest import NAME, Manifest, find_damage, read_manifest, unlisted
from dist_moe.checkpoint.format.shard_reader import RANDOM, parse_key
from dist_moe.checkpoint.format.tensor_header import FLOATS, read_header
from dist_moe.checkpoint.training_state import Counters, read_balance, read_counters
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, load_config
from dist_moe.config.untrusted import printable
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.engine.optimizer_shards import MASTER, STEPS, moments_of
from dist_moe.errors import UserError
from dist_moe.model.convert import find_layers

ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)
AT_ONCE = 1 << 22


@dataclass
class Verdict:
    """What was checked of one checkpoint, and every fault that was found, in words."""

    folder: Path
    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def check(self, told: str, look: Callable[[], Iterator[str]]) -> None:
        """Take note of the faults of one kind; what cannot even be looked at is one."""
        self.checked.append(told)
        try:
            self.faults.extend(look())
        except (UserError, OSError, ValueError, SafetensorError) as error:
            self.faults.append(str(error))


def verify_checkpoints(path: Path) -> list[Verdict]:
    """Verify a checkpoint, or all of a run.dir or its checkpoints. Every file is read, one tensor at a time.

    Errors: CheckpointError where there is none.
    """
    several = [] if (path / NAME).exists() else list_checkpoints(path)
    if not several:
        return [verify(path, read_manifest(path))]
    verdicts = []
    for folder in several:
        try:
            verdicts.append(verify(folder, read_manifest(folder)))
        except UserError as error:
            verdicts.append(Verdict(folder, [NAME], [str(error)]))
    return verdicts


def verify(folder: Path, manifest: Manifest) -> Verdict:
    """Everything that can be known of a checkpoint without the run."""
    verdict, model, state = Verdict(folder), folder / "model", folder / "state"
    total = sum(entry.bytes for entry in manifest.files.values())
    files = f"{len(manifest.files)} files, {total:,} bytes: size and digest as in {NAME}, and no further file"
    verdict.check(files, lambda: iter([*unlisted(folder, manifest), *find_damage(folder, manifest, manifest.files)]))
    verdict.check("the step of the folder, the manifest and the numbers", lambda: _steps(folder, manifest))
    verdict.check("the index names the file of each tensor", lambda: _index(model))
    verdict.check("every tensor and every expert of the model, by name, shape and dtype", lambda: _fits(model))
    verdict.check("every element of the optimizer once, in tensors of the model", lambda: _elements(folder))
    verdict.check("balance of every MoE layer, with the bias that the weights hold", lambda: _balance(model, state))
    verdict.check("finite weights, biases, moments", lambda: _finite(folder))
    verdict.check("the tokenizer opens, and the model knows its tokens", lambda: _tokenizer(model))
    return verdict


def _steps(folder: Path, manifest: Manifest) -> Iterator[str]:
    for told, step in (("folder", step_of(folder)), ("numbers", read_counters(folder / "state").step)):
        if step not in (None, manifest.step):
            yield f"its {told} says step {step}, and its {NAME} step {manifest.step}"


def _index(model: Path) -> Iterator[str]:
    named, found = indexed(model), tensor_files(model)
    for name in sorted({*named, *found}):
        file = found[name].file.name if name in found else None
        if named.get(name) != file:
            yield f"{printable(name)} is in {file or 'no file'}, and in {named.get(name, 'no file')} by the index"


def _shaped(model: Path) -> PreTrainedModel:
    config, rule = read_config(model)
    return shaped_model(config, rule, ALONE, model)


def _fits(model: Path) -> Iterator[str]:
    find_weights(_shaped(model), ALONE, model)
    yield from ()


def _elements(folder: Path) -> Iterator[str]:
    state, config, counters = folder / "state", load_config(folder / "config.yaml"), read_counters(folder / "state")
    wanted = {one.name: one.numel for one in named_parameters(_shaped(folder / "model"), ALONE)}
    runs: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for path in sorted(state.glob("rank-*.safetensors")):
        for stored in read_header(path).values():
            kind, name, start = parse_key(stored)
            runs.setdefault(kind, {}).setdefault(name, []).append((start, start + stored.numel))
    states = runs.pop(RANDOM, {})
    if lacking := [rank for rank in range(min(counters.workers, 1 << 20)) if f"cpu/{rank}" not in states]:
        yield f"the random states of ranks {lacking[:10]} are missing"
    known = {*_moments(config), MASTER}
    yield from (
        f"the optimizer holds {kind!a}, which is nothing of {config.train.optimizer}" for kind in {*runs} - known
    )
    for kind in sorted(known & {*runs, *_kinds(config, counters)}):
        found = runs.get(kind, {})
        yield from (f"{kind} of {name!a}, which the model does not have" for name in sorted(set(found) - set(wanted)))
        if lacking_all := sorted(set(wanted) - set(found)):
            yield f"{kind} is missing of {len(lacking_all)} tensors, such as {lacking_all[0]}"
        for name in sorted(set(wanted) & set(found)):
            yield from _covered(f"{kind} of {name}", found[name], 1 if kind == STEPS else wanted[name])


def _kinds(config: Config, counters: Counters) -> set[str]:
    """What the optimizer must hold: nothing yet before the first step, and fp32 weights where the model's are not."""
    return {*(_moments(config) if counters.taken else ()), *([MASTER] if counters.bf16 else [])}


def _moments(config: Config) -> tuple[str, ...]:
    train = config.train
    return (*moments_of(train.optimizer, train.momentum), *([STEPS] if train.optimizer == "adamw" else []))


def _covered(told: str, runs: list[tuple[int, int]], numel: int) -> Iterator[str]:
    """The gaps and overlaps of [start, end) that should cover the elements 0 .. numel - 1."""
    at = 0
    for start, end in sorted(runs):
        if start > at:
            yield f"{told} lacks elements {at} to {start - 1}"
        elif start < at:
            yield f"{told} has elements {start} to {min(at, end) - 1} twice"
        at = max(at, end)
    if at < numel:
        yield f"{told} lacks elements {at} to {numel - 1}"
    elif at > numel:
        yield f"{told} has elements beyond the {numel} of the tensor"


def _balance(model: Path, state: Path) -> Iterator[str]:
    layers, shaped = read_balance(state), _shaped(model)
    names = bias_in_files(shaped, model)
    stored = dict(stored_tensors(model, names.values()))
    for layer in find_layers(shaped):
        kept: Mapping[str, Tensor] = layers.pop(layer.name, {})
        bias_E = kept.get("selection_bias")
        if bias_E is None or any(len(value) != layer.experts.experts for value in kept.values()):
            yield f"the balance of {layer.name} is not that of {layer.experts.experts} experts"
        elif layer.name in names and not torch.equal(stored[names[layer.name]].float(), bias_E):
            yield f"the bias of {layer.name} is another in the weights than in the balancer's state"
    yield from (f"balance of {name!a}, which is no MoE layer of the model" for name in layers)


def _finite(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*/*.safetensors")):
        floats = [stored.name for stored in read_header(path).values() if stored.dtype in FLOATS]
        with safe_open(path, framework="pt") as file:
            yield from (
                f"{path.relative_to(folder)} holds numbers that are not finite in {printable(name)}"
                for name in floats
                if not all(bool(part.isfinite().all()) for part in file.get_tensor(name).view(-1).split(AT_ONCE))
            )


def _tokenizer(model: Path) -> Iterator[str]:
    tokens, (config, _) = load_tokenizer(model).vocab_size, read_config(model)
    if tokens > config.vocab_size:
        yield f"the tokenizer has {tokens} tokens, and the model {config.vocab_size}"
