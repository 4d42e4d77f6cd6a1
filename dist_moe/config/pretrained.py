"""The Hugging Face folder that a run begins with: where it is, and what its config.json says of the model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_moe.config.renamed_keys import load_stored_config
from dist_moe.config.schema import Config
from dist_moe.errors import ConfigError, Violation
from dist_moe.untrusted import read_json

OWN_PREFIX = "dist_moe_"
"""Before the model_type of a weights folder that routes as its architecture cannot."""
SETTINGS = "config.json"


def tokenizer_folder(config: Config) -> Path | None:
    """Where the tokenizer of data.tokenizer=pretrained lies: the folder, or, where it is gone, a checkpoint's model."""
    if config.data.tokenizer != "pretrained" or config.model.pretrained is None:
        return None
    folder, checkpoint = Path(config.model.pretrained), next(own_checkpoints(config), None)
    return folder if is_there(folder) or checkpoint is None else checkpoint / "model"


def text_vocabulary(config: Config) -> int:
    """The tokens that a vocabulary may have: those asked for, or those that a pretrained model knows."""
    if config.data.tokenizer == "pretrained":
        size: int = config.model.config["vocab_size"]
        return size
    return config.data.vocabulary


def is_there(folder: Path) -> bool:
    """Whether it looks like a Hugging Face folder."""
    return (folder / SETTINGS).is_file()


def own_checkpoints(config: Config) -> Iterator[Path]:
    """The checkpoints that the run may go on from, the newest first; none is opened."""
    resume = config.checkpoint.resume
    if resume == "never":
        return
    if resume != "auto":
        found = [Path(resume)]
    else:
        named = (
            path
            for path in Path(config.run.dir).glob("checkpoints/step-*")
            if re.fullmatch(r"[0-9]{6,}", path.name[5:])
        )
        found = sorted(named, key=lambda path: int(path.name[5:]), reverse=True)
    yield from (path for path in found if (path / "config.yaml").is_file())


def stated_model(config: Config, cls: Any, known: set[str]) -> tuple[dict[str, Any], list[Violation]]:
    """What the folder of model.pretrained says of the model: every known key of the config class, as plain values.

    Where the folder is gone and the run may go on from a checkpoint, that tells what the folder said.
    """
    if config.model.pretrained is None:
        return {}, []
    folder = Path(config.model.pretrained)
    if is_there(folder):
        return _stated(folder, config.model.architecture, cls, known)
    for checkpoint in own_checkpoints(config):
        try:
            before = load_stored_config(checkpoint / "config.yaml").model
        except ConfigError:
            continue
        if before.pretrained is not None and before.architecture == config.model.architecture:
            return before.config, []
    rule = f"has no {SETTINGS}, and no checkpoint of the run is here to tell what it said"
    remedy = "give the folder of a Hugging Face model, on every host"
    return {}, [Violation("model.pretrained", config.model.pretrained, rule, remedy)]


def _stated(folder: Path, architecture: str, cls: Any, known: set[str]) -> tuple[dict[str, Any], list[Violation]]:
    def refused(rule: str, remedy: str) -> tuple[dict[str, Any], list[Violation]]:
        return {}, [Violation("model.pretrained", str(folder), rule, remedy)]

    try:
        raw = read_json(folder / SETTINGS, follow=True)
    except (OSError, ValueError) as error:
        return refused(f"has a {SETTINGS} that cannot be read ({error})", "give another folder")
    found = raw.get("model_type")
    if isinstance(found, str) and found.startswith(OWN_PREFIX):
        rule = f"routes as {found.removeprefix(OWN_PREFIX)} of its own cannot"
        return refused(rule, "go on from its checkpoint, with checkpoint.resume=PATH/step-NNNNNN")
    if found != architecture:
        return refused(f"holds a {found}", f"set model.architecture to it, or give the folder of a {architecture}")
    if raw.get("quantization_config") is not None:
        return refused("is quantized", "give its weights in bf16 or fp32")
    try:
        settings = cls.from_dict(raw)
        stated = {key: getattr(settings, key) for key in sorted(known) if hasattr(settings, key)}
        values: dict[str, Any] = json.loads(json.dumps(stated))
    except Exception as error:  # whatever the class of another library raises for values of any kind
        reason = " ".join(str(error.__cause__ or error).split())
        return refused(f"is refused by {cls.__name__} ({reason})", "give another folder")
    return values, []


def agreement(config: Config, stated: dict[str, Any]) -> list[Violation]:
    """The keys of model.config that the folder contradicts, and a tokenizer that no folder gives."""
    found = [
        Violation(f"model.config.{key}", value, f"differs from the {stated[key]} of model.pretrained", "leave it out")
        for key, value in config.model.config.items()
        if key in stated and stated[key] != value
    ]
    if config.data.tokenizer == "pretrained" and config.model.pretrained is None:
        rule, remedy = "is the tokenizer of no model", "set model.pretrained, or use bytes or bpe"
        found.append(Violation("data.tokenizer", "pretrained", rule, remedy))
    return found
