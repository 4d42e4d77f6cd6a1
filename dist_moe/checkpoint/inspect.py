"""Describes a checkpoint or a Hugging Face folder from its headers and small files, without reading weights."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_moe.balancing.load import max_vio
from dist_moe.checkpoint.errors import USE_ANOTHER, CheckpointError
from dist_moe.checkpoint.format.hf_folder import (
    EXPERT_PATTERN,
    FUSED_PATTERN,
    TensorSource,
    read_headers,
    read_raw_config,
    read_sources,
)
from dist_moe.checkpoint.format.layout import resolve_path
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, read_manifest, reason_in_file
from dist_moe.checkpoint.format.shard_reader import RANDOM, parse_key
from dist_moe.checkpoint.format.tensor_header import StoredTensor, read_header
from dist_moe.checkpoint.training_state import BALANCE_FILE, read_balance, read_counters
from dist_moe.config.pretrained import OWN_PREFIX
from dist_moe.files import exists
from dist_moe.text import counted, format_bytes
from dist_moe.untrusted import printable

BIAS_PATTERN = re.compile(
    r"(.+?)(?:\.(?:gate|router|moe_statics))*\.(?:e_score_correction_bias|selection_bias|expert_bias)"
)
MAX_EXPERTS = 1 << 20


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Describe a checkpoint as plain values.

    Args:
        path: As `resolve_path`.

    Returns:
        Sizes in bytes; None for what a Hugging Face folder does not have.

    Raises:
        CheckpointError, WeightsError: The path is neither a checkpoint nor a Hugging Face folder, or is damaged.
    """
    folder = resolve_path(path)
    if not exists(folder / MANIFEST_NAME):
        stored = read_headers(folder)
        sources = {match[1]: TensorSource(stored[name]) for name in stored if (match := BIAS_PATTERN.fullmatch(name))}
        biases = {layer: {"selection_bias": bias.float()} for layer, bias in read_sources(sources)}
        return {
            "folder": str(folder),
            "step": None,
            "steps_taken": None,
            "layout": None,
            "bytes": _sizes(folder, {}),
            "model": _describe_model(folder, stored),
            "optimizer": None,
            "balance": _describe_balance(biases),
        }
    manifest, counters, model = read_manifest(folder), read_counters(folder / "state"), folder / "model"
    try:
        layers = read_balance(folder / "state")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'state' / BALANCE_FILE} cannot be used ({reason_in_file(error)}); {USE_ANOTHER}"
        ) from None
    return {
        "folder": str(folder),
        "step": manifest.step,
        "steps_taken": counters.taken,
        "layout": counters.model_dump(include={"workers", "expert_parallel", "zero_stage", "bf16"}),
        "bytes": _sizes(folder, {"weights": "model/", "optimizer": "state/rank-"}),
        "model": _describe_model(model, read_headers(model)),
        "optimizer": _describe_optimizer(folder / "state"),
        "balance": _describe_balance(layers),
    }


def _sizes(folder: Path, prefixes: Mapping[str, str]) -> dict[str, int]:
    """Total bytes of the files whose path begins with each prefix, of all others, and of all."""
    sizes = dict.fromkeys((*prefixes, "other", "all"), 0)
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), "other")
            sizes[part] += path.stat().st_size
            sizes["all"] += path.stat().st_size
    return sizes


def _describe_model(folder: Path, stored_by_name: Mapping[str, StoredTensor]) -> dict[str, Any]:
    model_type = read_raw_config(folder)["model_type"]
    experts: defaultdict[str, set[int]] = defaultdict(set)
    for name, stored in stored_by_name.items():
        if match := EXPERT_PATTERN.fullmatch(name):
            experts[match[1]].add(int(match[2]))
        elif match := FUSED_PATTERN.fullmatch(name):
            # An empty tensor may claim any number of experts.
            experts[match[1]].update(range(min(stored.shape[0], MAX_EXPERTS) if stored.shape else 0))
    return {
        "model_type": printable(model_type),
        "opens_with": "dist-moe" if model_type.startswith(OWN_PREFIX) else "transformers",
        "tensors": len(stored_by_name),
        "numbers": sum(stored.numel for stored in stored_by_name.values()),
        "dtypes": dict(Counter(stored.dtype for stored in stored_by_name.values())),
        "moe_layers": len(experts),
        "experts": sorted({len(ids) for ids in experts.values()}),
    }


def _describe_optimizer(folder: Path) -> dict[str, int]:
    """How many numbers of each kind are stored; the fp32 master weights, if any, are the kind `master`."""
    numels: Counter[str] = Counter()
    for path in sorted(folder.glob("rank-*.safetensors")):
        for stored in read_header(path).values():
            kind, _, _ = parse_key(stored)
            numels[printable(kind)] += stored.numel
    numels.pop(RANDOM, None)
    return dict(numels)


def _describe_balance(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float | None]]:
    described: dict[str, dict[str, float | None]] = {}
    for layer, values in layers.items():
        bias_E, load_E = values.get("selection_bias"), values.get("last_load")
        if bias_E is None or not bias_E.numel():
            continue
        described[printable(layer)] = {
            "bias_min": float(bias_E.min()),
            "bias_max": float(bias_E.max()),
            "bias_mean": float(bias_E.mean()),
            "max_vio": float(max_vio(load_E)) if load_E is not None and bool(load_E.any()) else None,
        }
    return described


def format_lines(description: Mapping[str, Any]) -> Iterator[str]:
    """Format the result of `inspect_checkpoint` as lines for people."""
    model, layout, sizes = description["model"], description["layout"], description["bytes"]
    yield printable(description["folder"])
    if layout is not None:
        yield f"step {description['step']}, {description['step'] - description['steps_taken']} skipped"
        yield (
            f"written by {counted(layout['workers'], 'worker')}, expert parallel {layout['expert_parallel']}, ZeRO "
            f"{layout['zero_stage']}, {'bf16' if layout['bf16'] else 'fp32'}"
        )
    yield "size: " + ", ".join(f"{part} {format_bytes(size)}" for part, size in sizes.items())
    *others, last = model["experts"] or [0]
    experts = " or ".join([*map(str, others), counted(last, "expert")])
    dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in model["dtypes"].items())
    yield f"model type {model['model_type']}, loads with {model['opens_with']}"
    yield f"{counted(model['moe_layers'], 'MoE layer')} of {experts}"
    yield f"{counted(model['tensors'], 'tensor')} ({dtypes}), {model['numbers']:,} numbers"
    if description["optimizer"] is not None:
        numels = ", ".join(f"{kind} {numel:,}" for kind, numel in description["optimizer"].items())
        yield f"optimizer: {numels or 'empty'}"
    for layer, bias in description["balance"].items():
        load = "" if bias["max_vio"] is None else f", MaxVio of the last step {bias['max_vio']:.3f}"
        yield f"{layer}: bias {bias['bias_min']:+.4f} to {bias['bias_max']:+.4f}, mean {bias['bias_mean']:+.4f}{load}"
