"""The Hugging Face folder of model.pretrained: where it is, and the model that its config.json describes."""

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
"""Prefix of the model_type of a weights folder whose routing the architecture cannot express."""
SETTINGS = "config.json"


def tokenizer_folder(config: Config) -> Path | None:
    """The folder with the tokenizer of data.tokenizer=pretrained; without model.pretrained's, that of a checkpoint."""
    if config.data.tokenizer != "pretrained" or config.model.pretrained is None:
        return None
    folder, checkpoint = Path(config.model.pretrained), next(own_checkpoints(config), None)
    return folder if is_model_folder(folder) or checkpoint is None else checkpoint / "model"


def text_vocabulary(config: Config) -> int:
    """The maximum number of tokens of the vocabulary: data.vocabulary, or that of the pretrained model."""
    if config.data.tokenizer == "pretrained":
        size: int = config.model.config["vocab_size"]
        return size
    return config.data.vocabulary


def is_model_folder(folder: Path) -> bool:
    """Whether it has the config.json of a Hugging Face model."""
    return (folder / SETTINGS).is_file()


def own_checkpoints(config: Config) -> Iterator[Path]:
    """Yield the checkpoints that the run may resume from, the newest first, without opening them."""
    resume = config.checkpoint.resume
    if resume == "never":
        return
    if resume != "auto":
        checkpoints = [Path(resume)]
    else:
        candidates = (
            path
            for path in Path(config.run.dir).glob("checkpoints/step-*")
            if re.fullmatch(r"[0-9]{6,}", path.name[5:])
        )
        checkpoints = sorted(candidates, key=lambda path: int(path.name[5:]), reverse=True)
    yield from (path for path in checkpoints if (path / "config.yaml").is_file())


def stated_model(config: Config, cls: Any, known: set[str]) -> tuple[dict[str, Any], list[Violation]]:
    """Read the keys of the model from the folder of model.pretrained.

    If the folder does not exist any more and the run may resume from a checkpoint, they are read from that.

    Args:
        config: the configuration.
        cls: the Hugging Face config class.
        known: its keys that define the model.

    Returns:
        Every known key as a plain value, and what is wrong.
    """
    if config.model.pretrained is None:
        return {}, []
    folder = Path(config.model.pretrained)
    if is_model_folder(folder):
        return _stated(folder, config.model.architecture, cls, known)
    for checkpoint in own_checkpoints(config):
        try:
            previous = load_stored_config(checkpoint / "config.yaml").model
        except ConfigError:
            continue
        if previous.pretrained is not None and previous.architecture == config.model.architecture:
            return previous.config, []
    rule = f"has no {SETTINGS}, and the run has no checkpoint that holds its keys"
    remedy = "give the folder of a Hugging Face model, which every host can read"
    return {}, [Violation("model.pretrained", config.model.pretrained, rule, remedy)]


def _stated(folder: Path, architecture: str, cls: Any, known: set[str]) -> tuple[dict[str, Any], list[Violation]]:
    def refuse(rule: str, remedy: str) -> tuple[dict[str, Any], list[Violation]]:
        return {}, [Violation("model.pretrained", str(folder), rule, remedy)]

    try:
        raw = read_json(folder / SETTINGS, follow=True)
    except (OSError, ValueError) as error:
        return refuse(f"has a {SETTINGS} that cannot be read ({error})", "give another folder")
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type.startswith(OWN_PREFIX):
        rule = f"has routing that {model_type.removeprefix(OWN_PREFIX)} cannot express"
        return refuse(rule, "resume from its checkpoint, with checkpoint.resume=PATH/step-NNNNNN")
    if model_type != architecture:
        return refuse(f"holds a {model_type}", f"set model.architecture to it, or give the folder of a {architecture}")
    if raw.get("quantization_config") is not None:
        return refuse("is quantized", "give its weights in bf16 or fp32")
    try:
        settings = cls.from_dict(raw)
        stated = {key: getattr(settings, key) for key in sorted(known) if hasattr(settings, key)}
        values: dict[str, Any] = json.loads(json.dumps(stated))
    except Exception as error:  # the class of another library may raise anything for unexpected values
        reason = " ".join(str(error.__cause__ or error).split())
        return refuse(f"is refused by {cls.__name__} ({reason})", "give another folder")
    return values, []


def agreement(config: Config, stated: dict[str, Any]) -> list[Violation]:
    """What is wrong between `config` and the keys of model.pretrained."""
    violations = [
        Violation(f"model.config.{key}", value, f"differs from the {stated[key]} of model.pretrained", "leave it out")
        for key, value in config.model.config.items()
        if key in stated and stated[key] != value
    ]
    if config.data.tokenizer == "pretrained" and config.model.pretrained is None:
        rule, remedy = "needs the folder of a model", "set model.pretrained, or use bytes or bpe"
        violations.append(Violation("data.tokenizer", "pretrained", rule, remedy))
    return violations
