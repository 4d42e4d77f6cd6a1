"""What `dist-moe train` does with a small model of a family: trained, saved, and opened by transformers."""

import contextlib
import io
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import CONFIG_MAPPING

from dist_moe.checkpoint.export import export
from dist_moe.checkpoint.format.hf_folder import read_raw_config
from dist_moe.checkpoint.format.hf_weights import load_weights, read_config
from dist_moe.checkpoint.format.model_tensors import SINGLE_RANK
from dist_moe.config import load_config, resolve
from dist_moe.config.model import known_keys
from dist_moe.config.pretrained import OWN_PREFIX
from dist_moe.families.composite import find_composite, is_composite
from dist_moe.families.model_class import model_class
from dist_moe.families.registry import FAMILIES
from dist_moe.model.build import empty_model, family_rule
from dist_moe.model.convert import find_layers
from dist_moe.train.loop import run
from dist_moe.worker.rank_info import rank_info_from_env
from tests.dist.pool import RankPool
from tests.families.balanced import TEXT, values_of
from tests.families.composite import build_composite, small_composite
from tests.families.record import make_record
from tests.families.small import small_config

ROOT = Path(__file__).resolve().parents[2]
STEPS, LAST, COMPARED, LIMIT_S = 20, 5, 3, 200
OVERRIDES = (
    *("data.sequence_length=32", f"train.steps={STEPS}", "train.global_batch_size=32", "train.micro_batch_size=8"),
    *("train.precision=fp32", "run.threads=1", "observe.interval=1", "observe.validation_sequences=8"),
    *("observe.tensorboard=false", "checkpoint.interval=0", "checkpoint.resume=never"),
    "balance.policy=quantile",
)
INITIALIZER_RANGE = 0.1
"""Larger than usual, so that routers are uneven at the start."""
VOCABULARY = 257
SAME_LOSS, SAME_LOGITS = 1e-5, 1e-4
"""Largest relative difference of a loss, and of a logit in units of the largest one."""


@dataclass(frozen=True)
class Trained:
    """The result of a family.

    Attributes:
        losses: Largest relative difference between the losses of one worker and of two expert-parallel ones, in the
            first steps; later a token that rounding moves to another expert makes it grow.
        before: MaxVio of the first step.
        after: Mean of the last steps.
        floor: The sampling floor of a step.
        opened: How transformers opened the weights: "folder", that of the checkpoint; "export", that of `--plain`;
            "multimodal": that of `--plain`, with the other weights of the multimodal model that the run started from.
        logits: Largest difference between its logits and those of this package, in units of the largest logit; of an
            encoder, between the last hidden states.
        documents: Whether rows are packed, or each document has its own.
        reason: Why it cannot be trained, or what failed; "" where nothing is wrong.
    """

    losses: float = math.nan
    before: float = math.nan
    after: float = math.nan
    floor: float = math.nan
    opened: str = ""
    logits: float = math.nan
    documents: str = ""
    reason: str = ""

    @property
    def works(self) -> bool:
        """Whether losses and logits are equal, and MaxVio falls to less than half, both without the sampling floor."""
        same = self.losses <= SAME_LOSS and self.logits <= SAME_LOGITS
        return not self.reason and same and self.after - self.floor < (self.before - self.floor) / 2


def settings_of(family: str) -> dict[str, Any]:
    """Return the section `model` of the small model of a family."""
    config = small_config(family)
    if hasattr(config, "initializer_range"):
        config.initializer_range = INITIALIZER_RANGE
    known = known_keys(type(config), FAMILIES[config.model_type]) - {"vocab_size"}
    given, default = config.to_dict(), CONFIG_MAPPING[config.model_type]().to_dict()
    keys = {key: given[key] for key in sorted(known) if key in given and given[key] != default.get(key)}
    keys |= {key: vars(config)[key] for key in sorted(known) if key not in given and key in vars(config)}
    for alias, key in config.attribute_map.items():
        if alias in known and key in given:
            keys[alias] = given[key]
    keys |= {key: VOCABULARY for key in keys if "vocab_size" in key}
    return {"architecture": config.model_type, "config": json.loads(json.dumps(keys))}


def _multimodal_folder(family: str, folder: Path) -> dict[str, Any] | None:
    """Write the folder of a small model of a multimodal family; return the section `model`; None if it is not one."""
    changes: dict[str, Any] = {key: VOCABULARY for key in small_config(family).to_dict() if "vocab_size" in key}
    whole = small_composite(family, initializer_range=INITIALIZER_RANGE, **changes)
    if whole is None:
        return None
    path = folder / f"{family}-multimodal"
    build_composite(whole).save_pretrained(path)
    return {"pretrained": str(path)}


def write_examples(folder: Path) -> Path:
    """Write the lines of a text with two classes, prose and markup -> the file."""
    lines = [line for line in TEXT.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = ({"text": line, "label": "prose" if line[0].isalpha() else "markup"} for line in lines)
    path = folder / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def train(rank: int, world_size: int, path: str, overrides: list[str]) -> None:
    """Be one worker of a run."""
    resolved = resolve(load_config(Path(path), overrides), world_size)
    with contextlib.redirect_stdout(io.StringIO()):
        run(resolved, rank_info_from_env(os.environ))


def try_training(family: str, ranks: RankPool, folder: Path, pretrained: Path | None = None) -> Trained:
    """Train a small model on one worker and on two, and open its weights in transformers.

    Args:
        family: Its model_type.
        ranks: Two workers.
        folder: For what is written.
        pretrained: The folder that the run starts from; None for new weights, or those of a multimodal model.
    """
    architecture = small_config(family).model_type
    if architecture not in FAMILIES:
        make_record(family)  # raises the reason
    config = small_config(family)
    empty_model(config, family_rule(config, FAMILIES[architecture].score), SINGLE_RANK)  # so does this
    debug = yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text())
    started = {"pretrained": str(pretrained)} if pretrained else _multimodal_folder(family, folder)
    settings = {**debug, "model": started or settings_of(family)}
    if FAMILIES[architecture].encoder:
        settings |= {"task": {"kind": "classification"}, "data": {"sources": [str(write_examples(folder))]}}
    path = folder / f"{family}.yaml"
    path.write_text(yaml.safe_dump(settings))
    steps = {}
    for workers in (1, 2):
        run_dir = folder / f"{family}-{workers}"
        shutil.rmtree(run_dir, ignore_errors=True)
        overrides = [*OVERRIDES, f"run.dir={run_dir}", f"parallel.expert_parallel={workers}"]
        ranks.run(train, workers, str(path), overrides, timeout_s=LIMIT_S)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        steps[workers] = [line for line in lines if line["event"] == "step"]
    losses = [(one["loss"], two["loss"]) for one, two in zip(steps[1][:COMPARED], steps[2][:COMPARED], strict=True)]
    vio = [step["max_vio"] for step in steps[2]]
    opened, logits = compare_with_transformers(run_dir / "checkpoints" / f"step-{STEPS:06d}", folder / "plain")
    return Trained(
        losses=max(abs(one - two) / two for one, two in losses),
        before=vio[0],
        after=sum(vio[-LAST:]) / LAST,
        floor=steps[2][-1]["max_vio_floor"],
        opened=opened,
        logits=logits,
        documents="packed" if FAMILIES[architecture].separates_documents else "one a row",
    )


@torch.no_grad()
def compare_with_transformers(checkpoint: Path, out: Path) -> tuple[str, float]:
    """Open the weights of a checkpoint in transformers.

    Returns:
        By which folder, and the difference of the logits, or of the last hidden states of an encoder.
    """
    model = checkpoint / "model"
    ours = load_weights(model, SINGLE_RANK).eval()
    opened, part = "folder", ""
    if read_raw_config(model)["model_type"].startswith(OWN_PREFIX):
        opened = "export"
        shutil.rmtree(out, ignore_errors=True)
        if export(checkpoint, out, "keep", plain=True).without_bias:
            for layer in find_layers(ours):
                layer.router.selection_bias.zero_()
        model = out
    config, raw = read_config(model)[0], read_raw_config(model)
    kind = model_class(config, FAMILIES[config.model_type].encoder)
    if is_composite(raw):
        composite = find_composite(raw)
        opened, kind, part = "multimodal", type(composite.model), composite.head.rpartition(".")[0]
    theirs = kind.from_pretrained(model).eval().get_submodule(part)
    tokens_BS = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    found: list[Tensor] = [values_of(each(input_ids=tokens_BS, use_cache=False)) for each in (ours, theirs)]
    return opened, float((found[0] - found[1]).abs().max() / found[1].abs().max())
