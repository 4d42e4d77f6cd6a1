"""What is inside a checkpoint or a Hugging Face folder, told from its headers and its small files."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_moe.balance.load import max_vio
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_folder import EXPERT, FUSED, Source, raw_config, read_sources, tensor_files
from dist_moe.checkpoint.format.locate import resolve_path
from dist_moe.checkpoint.format.manifest import NAME, first_line, read_manifest
from dist_moe.checkpoint.format.shard_reader import RANDOM, parse_key
from dist_moe.checkpoint.format.tensor_header import Stored, read_header
from dist_moe.checkpoint.training_state import read_balance, read_counters
from dist_moe.config.pretrained import OWN_PREFIX
from dist_moe.config.untrusted import printable

BIAS = re.compile(r"(.+)\.gate\.(?:e_score_correction_bias|selection_bias)")
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """What there is, as plain values: sizes in bytes, and `None` for what a Hugging Face folder does not have.

    path: a step-NNNNNN folder, a run.dir or its checkpoints (the latest is taken), or a Hugging Face folder. No weight
    is read. Errors: CheckpointError and WeightsError for whatever is none of these.
    """
    folder = resolve_path(path)
    if not (folder / NAME).exists():
        found = tensor_files(folder)
        sources = {match[1]: Source(stored) for name, stored in found.items() if (match := BIAS.fullmatch(name))}
        biases = {layer: {"selection_bias": bias.float()} for layer, bias in read_sources(sources)}
        return {
            "folder": str(folder),
            "step": None,
            "steps_taken": None,
            "layout": None,
            "bytes": _sizes(folder, {}),
            "model": _model(folder, found),
            "optimizer": None,
            "balance": _balance(biases),
        }
    manifest, counters, model = read_manifest(folder), read_counters(folder / "state"), folder / "model"
    try:
        layers = read_balance(folder / "state")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'state'} cannot be used ({first_line(error)})") from None
    return {
        "folder": str(folder),
        "step": manifest.step,
        "steps_taken": counters.taken,
        "layout": counters.model_dump(include={"workers", "expert_parallel", "zero_stage", "bf16"}),
        "bytes": _sizes(folder, {"weights": "model/", "optimizer": "state/rank-"}),
        "model": _model(model, tensor_files(model)),
        "optimizer": _optimizer(folder / "state"),
        "balance": _balance(layers),
    }


def _sizes(folder: Path, parts: Mapping[str, str]) -> dict[str, int]:
    """Bytes by part: the files whose path begins as told, the rest, and all."""
    sizes = dict.fromkeys((*parts, "other", "all"), 0)
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            part = next((part for part, begin in parts.items() if name.startswith(begin)), "other")
            sizes[part] += path.stat().st_size
            sizes["all"] += path.stat().st_size
    return sizes


def _model(folder: Path, found: Mapping[str, Stored]) -> dict[str, Any]:
    named = raw_config(folder)["model_type"]
    experts: defaultdict[str, set[int]] = defaultdict(set)
    for name, stored in found.items():
        if match := EXPERT.fullmatch(name):
            experts[match[1]].add(int(match[2]))
        elif match := FUSED.fullmatch(name):
            experts[match[1]].update(range(min(stored.shape[0], 1 << 20) if stored.shape else 0))
    return {
        "model_type": printable(named),
        "opens_with": "dist-moe" if named.startswith(OWN_PREFIX) else "transformers",
        "tensors": len(found),
        "numbers": sum(stored.numel for stored in found.values()),
        "dtypes": dict(Counter(stored.dtype for stored in found.values())),
        "moe_layers": len(experts),
        "experts": sorted({len(ids) for ids in experts.values()}),
    }


def _optimizer(folder: Path) -> dict[str, int]:
    """Numbers that are held of each kind; the fp32 weights, where there are any, are the kind master."""
    optimizer_fragments: Counter[str] = Counter()
    for path in sorted(folder.glob("rank-*.safetensors")):
        for stored in read_header(path).values():
            kind, _, _ = parse_key(stored)
            optimizer_fragments[printable(kind)] += stored.numel
    optimizer_fragments.pop(RANDOM, None)
    return dict(optimizer_fragments)


def _balance(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for layer, values in layers.items():
        bias_E, load_E = values.get("selection_bias"), values.get("last_load")
        if bias_E is None or not bias_E.numel():
            continue
        found[printable(layer)] = {
            "bias_min": float(bias_E.min()),
            "bias_max": float(bias_E.max()),
            "bias_mean": float(bias_E.mean()),
            "max_vio": float(max_vio(load_E)) if load_E is not None and bool(load_E.any()) else None,
        }
    return found


def told(snapshot: Mapping[str, Any]) -> Iterator[str]:
    """The contents in lines."""
    model, layout, sizes = snapshot["model"], snapshot["layout"], snapshot["bytes"]
    yield printable(snapshot["folder"])
    if layout is not None:
        yield f"step {snapshot['step']}, {snapshot['steps_taken']} of them taken"
        yield (
            f"written by {layout['workers']} workers, expert parallel {layout['expert_parallel']}, ZeRO "
            f"{layout['zero_stage']}, {'bf16' if layout['bf16'] else 'fp32'}"
        )
    yield "size " + ", ".join(f"{part} {in_units(size)}" for part, size in sizes.items())
    experts = " or ".join(map(str, model["experts"])) or "no"
    dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in model["dtypes"].items())
    yield f"{model['model_type']}, which opens with {model['opens_with']}"
    yield f"{model['moe_layers']} MoE layers of {experts} experts"
    yield f"{model['tensors']} tensors ({dtypes}), {model['counters']:,} numbers"
    if snapshot["optimizer"] is not None:
        optimizer_fragments = ", ".join(f"{kind} {numel:,}" for kind, numel in snapshot["optimizer"].items())
        yield f"optimizer {optimizer_fragments or 'holds nothing'}"
    for layer, bias in snapshot["balance"].items():
        load = "" if bias["max_vio"] is None else f", MaxVio of the last step {bias['max_vio']:.3f}"
        yield f"{layer}: bias {bias['bias_min']:+.4f} to {bias['bias_max']:+.4f}, mean {bias['bias_mean']:+.4f}{load}"


def in_units(size: int) -> str:
    """Bytes in the largest unit of which there is one or more."""
    unit = max((power for power in range(len(UNITS)) if size >= 1 << 10 * power), default=0)
    return f"{size / (1 << 10 * unit):.1f} {UNITS[unit]}" if unit else f"{size} bytes"
