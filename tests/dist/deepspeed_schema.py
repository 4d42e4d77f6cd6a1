"""Reads from the installed DeepSpeed which keys its JSON has, and their defaults."""

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple, get_args

from pydantic_core import PydanticUndefined


class Key(NamedTuple):
    """A key of DeepSpeed's JSON and its default, as in JSON; None and False where it is not known."""

    default: Any
    has_default: bool


UNKNOWN = Key(None, False)
# What a mapping must hold for DeepSpeed to read the rest of it.
FILLED: dict[str, dict[str, Any]] = {
    "optimizer": {"type": "adam"},
    "expert_parallel": {"enabled": False},
    "checkpoint": {"tag_validation": "WARN"},
    "aio": {"use_gds": False},
}


class Asked(dict[str, Any]):
    """A mapping that records which keys are asked for, and with which default."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.asked: dict[str, Key] = {}

    def __contains__(self, name: object) -> bool:
        self.asked.setdefault(str(name), UNKNOWN)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.asked.setdefault(name, UNKNOWN)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Record the name and the default."""
        self.asked[name] = Key(default, True)
        return super().get(name, default)

    def keys(self) -> Any:
        """Return itself, which records what is looked for in it."""
        return self

    def __copy__(self) -> "Asked":
        return self

    def __deepcopy__(self, memo: Any) -> "Asked":
        return self


def read_schema(rank: int, world_size: int) -> dict[str, Key]:
    """Return every key that DeepSpeed reads, by dotted name.

    Scalars and plain mappings are found by giving mappings that record what is asked for, the rest from the pydantic
    models. A model that no key is known for is an error.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    top = Asked(train_batch_size=1)
    config = DeepSpeedConfig(top)
    found = dict(top.asked)
    for model_of, model in _models().items():
        found[model_of] = UNKNOWN
        found.update(_fields(model, f"{model_of}.", DeepSpeedConfigModel))
    for name in top.asked:
        found.update(_below(name, DeepSpeedConfig))
    found.update({f"pipeline.{name}": Key(value, True) for name, value in config.pipeline.items()})
    for name in re.findall(r"""["'](\w+)["'] in config\b""", inspect.getsource(deepspeed.initialize)):
        found.setdefault(name, UNKNOWN)
    used = {type(value) for value in vars(config).values() if isinstance(value, DeepSpeedConfigModel)}
    unknown = used - set(_models().values()) - {type(config.monitor_config)}
    assert not unknown, f"{unknown} belong to keys that are not in _models"
    return found


def _models() -> dict[str, type]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, DeepSpeedMonitorConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    monitors = {"tensorboard": TensorBoardConfig, "wandb": WandbConfig, "csv_monitor": CSVConfig, "comet": CometConfig}
    assert set(monitors) == set(DeepSpeedMonitorConfig.model_fields)
    return {
        **monitors,
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "weight_quantization": WeightQuantConfig,
    }


def _fields(model: Any, prefix: str, base: type) -> Iterator[tuple[str, Key]]:
    """The fields of a pydantic model under their names and aliases, and those of models in it."""
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        key = UNKNOWN if default is PydanticUndefined else Key(_json(default), True)
        for one in {name, field.alias or name}:
            yield f"{prefix}{one}", key
            for inner in [field.annotation, *get_args(field.annotation)]:
                if isinstance(inner, type) and issubclass(inner, base):
                    yield from _fields(inner, f"{prefix}{one}.", base)


def _below(name: str, read: Any) -> Iterator[tuple[str, Key]]:
    """What DeepSpeed asks for in the mapping of one key of the top; nothing where it takes no mapping."""
    inner = Asked(FILLED.get(name, {}))
    if name == "optimizer":
        inner["params"] = Asked()
    try:
        read(Asked({"train_batch_size": 1, name: inner}))
    except Exception:  # a scalar, or a key that DeepSpeed has removed
        return
    yield from ((f"{name}.{key}", value) for key, value in inner.asked.items())
    for below, value in inner.items():
        if isinstance(value, Asked):
            yield from ((f"{name}.{below}.{key}", known) for key, known in value.asked.items())


def _json(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
