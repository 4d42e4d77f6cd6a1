"""Builds the Hugging Face model of a configuration without memory, and runs it once: each failure is a violation."""

import contextlib
import copy
import functools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

from dist_moe.errors import ABSENT, Violation
from dist_moe.families.model_class import model_class
from dist_moe.families.record import Family
from dist_moe.families.registry import family_of
from dist_moe.text import TYPES, listed, shown, type_words

LONGEST_REASON = 200
# Bytes in fp32, of few layers: a thousand times those of the largest published models.
LARGEST_MODEL = 10**15
ROPE_LOGGER = "transformers.modeling_rope_utils"
# How transformers begins its warnings of rotary parameters that it ignores, misses or does not know.
ROPE_COMPLAINTS = ("Unrecognized keys", "Missing", "`rope_parameters`'s")
ROPE_KEY = "rope_parameters"
WRONG_TYPE = re.compile(r"Field '\w+' expected (\w+), got")
Trial = Callable[[Mapping[str, Any]], str | None]


def trial_violations(
    architecture: str, arguments: Mapping[str, Any], refused: Set[str], own: Set[str], length: int
) -> list[Violation]:
    """Return one violation for each key with which the model cannot be built, initialized or run.

    The model has few layers, one of each kind. Where it fails, the key is found by leaving out one at a time.

    Args:
        architecture: Hugging Face's `model_type`.
        arguments: Keyword arguments of the config class, vocab_size included.
        refused: Keys that other rules refuse already; the model is tried with the defaults of the class for them.
        own: Keys of model.config; the others are those of model.pretrained.
        length: Tokens of a sequence.
    """
    tried = {key: value for key, value in arguments.items() if key not in refused}
    found: list[Violation] = []
    for key, reason in blamed(functools.partial(failure, architecture, length=length), tried):
        with_defaults = bool(refused or found)
        if with_defaults and (key is None or reason.startswith("RuntimeError")):
            break  # shapes that do not fit may be due to a default that took the place of a refused value
        if key is None:
            rule = f"makes a {architecture} that fails ({reason})"
            found.append(Violation("model.config", ABSENT, rule, "compare it with that of a published model"))
        else:
            found.append(_violation(architecture, key, tried[key], reason, key in own))
    return found


def blamed(trial: Trial, arguments: Mapping[str, Any]) -> Iterator[tuple[str | None, str]]:
    """Yield each key that makes a trial fail, and why, until it succeeds without them; None where no key is found.

    Args:
        trial: Returns why it fails with some of the arguments, or None.
        arguments: All of them.
    """
    remaining = dict(arguments)
    while (reason := trial(remaining)) is not None:
        key = _cause(trial, remaining, reason)
        yield key, reason
        if key is None:
            return
        del remaining[key]


def _violation(architecture: str, key: str, value: Any, reason: str, own: bool) -> Violation:
    default = default_of(architecture, key)
    rule = f"makes a model that fails ({reason})"
    if not own:
        rule = f"{rule}, and is the value of model.pretrained"
        return Violation(f"model.config.{key}", value, rule, "correct the config.json of that folder")
    remedy = "leave it out" if value == default else f"leave it out (the default is {shown(default)})"
    return Violation(f"model.config.{key}", value, rule, f"{remedy}, or give a value that the model accepts")


def expected_types(reason: str) -> str | None:
    """Return the types in a message of transformers about a value of another type, as in `a whole number or null`.

    None where it is another message, or names a type that a configuration does not have.
    """
    names = WRONG_TYPE.findall(reason)
    return listed(dict.fromkeys(map(type_words, names))) if names and TYPES.keys() >= set(names) else None


def _cause(trial: Trial, arguments: Mapping[str, Any], reason: str) -> str | None:
    """Return the key without which the model does not fail, or alone changes the failure; None if there is none."""
    changed = []
    for key in sorted(arguments, key=lambda key: not _is_suspect(key, arguments[key], reason)):
        other = trial({name: value for name, value in arguments.items() if name != key})
        if other is None:
            return key
        if other != reason:
            changed.append(key)
    return changed[0] if len(changed) == 1 else None


def _is_suspect(key: str, value: Any, reason: str) -> bool:
    """Whether the text of a failure has the key or its value."""
    return key in reason or value is None or isinstance(value, dict) or f"'{value}'" in reason


def default_of(architecture: str, key: str) -> Any:
    """Return the value of a key of model.config where it is left out."""
    from transformers import CONFIG_MAPPING

    return getattr(CONFIG_MAPPING[architecture](), key, None)


def failure(architecture: str, arguments: Mapping[str, Any], length: int) -> str | None:
    """Return why the model with these arguments, and few layers, fails at this many positions; None if it works."""
    return _failure_of(architecture, json.dumps(arguments, sort_keys=True, default=str), length)


@functools.lru_cache(maxsize=128)
def _failure_of(architecture: str, arguments_json: str, length: int) -> str | None:
    from transformers import CONFIG_MAPPING

    family = family_of(architecture)
    # The class writes into the dictionaries that it is given, so it gets new ones.
    arguments = {**json.loads(arguments_json), **copy.deepcopy(dict(family.few_layers))}
    try:
        with complaints_about_rope() as complaints:
            settings = CONFIG_MAPPING[architecture](**arguments)
        if complaints:
            return f"{ROPE_KEY}: {' '.join(' '.join(complaints).split())}"[:LONGEST_REASON]
        _run(settings, family, length)
    except Exception as error:  # the class of another library may raise anything
        return " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:LONGEST_REASON]
    return None


@contextlib.contextmanager
def complaints_about_rope() -> Iterator[list[str]]:
    """Collect what transformers only warns of: rotary parameters that it does not know, and ignores."""
    complaints: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith(ROPE_COMPLAINTS):
            return True
        if message not in complaints:
            complaints.append(message)
        return False

    logger = logging.getLogger(ROPE_LOGGER)
    logger.addFilter(collect)
    try:
        yield complaints
    finally:
        logger.removeFilter(collect)


def _run(settings: Any, family: Family, length: int) -> None:
    """Build the model on the meta device, and run it on two tokens, with stand-ins for what this package replaces."""
    import torch

    if not family.is_probed:
        settings._attn_implementation = "sdpa"
    meta = torch.device("meta")
    with torch.no_grad():
        with meta:
            model = model_class(settings, family.encoder)._from_config(settings, dtype=torch.float32)
        if (needed := sum(4 * parameter.numel() for parameter in model.parameters())) > LARGEST_MODEL:
            raise ValueError(f"a few layers of it have {needed:,} bytes of weights, and no machine {LARGEST_MODEL:,}")
        if family.is_probed:  # building the model compares what its routers and experts compute
            return
        _check_state(model, family)
        _replace(model, settings, family, (1, length - 1, settings.max_position_embeddings - 1))
        # Initial values depend on the settings too; the meta device would draw none.
        model._init_weights(torch.nn.Linear(1, 1))
        model._init_weights(torch.nn.Embedding(1, 1))
        model.train()
        with meta:
            # A mask of four dimensions is used as it is; transformers computes no other from the (absent) values.
            model(
                input_ids=torch.zeros(1, 2, dtype=torch.long),
                attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool),
                use_cache=False,
            )


def _check_state(model: Any, family: Family) -> None:
    """Raise ValueError where routers or experts have a state that those of this package do not have, or save."""
    known: dict[str, set[str | None]] = {
        family.router: {"weight", family.bias_name},
        family.experts: {"gate_up_proj", "down_proj"},
    }
    for block in model.modules():
        if type(block).__name__ != family.block:
            continue
        for name, state in known.items():
            part = block.get_submodule(name)
            extra = sorted({key for key, _ in (*part.named_parameters(), *part.named_buffers())} - state)
            if extra:
                raise ValueError(f"the {name} of its MoE layers have the state {', '.join(extra)}, which is not saved")


def _replace(model: Any, settings: Any, family: Family, last: Iterable[int]) -> None:
    """Replace the router, the experts and the rotary embeddings of a model on the meta device, in place.

    The tables of the rotary embeddings are computed for the positions 0 and each of `last`: at the end of a sequence
    they may be others than at its beginning.
    """
    import torch

    class Router(torch.nn.Module):
        def forward(self, hidden_TD: Any) -> tuple[None, None, None]:
            return None, None, None

    class Experts(torch.nn.Module):
        def forward(self, hidden_TD: Any, ids_TK: Any, weights_TK: Any) -> Any:
            return hidden_TD

    class Rotary(torch.nn.Module):
        """Computes the embeddings on the CPU, since some kinds of them read the positions."""

        def __init__(self, rotary: Any) -> None:
            super().__init__()
            self.rotary = rotary

        def forward(self, hidden_BSD: Any, position_ids: Any, *rest: Any) -> tuple[Any, ...]:
            for position in last:
                with torch.device("cpu"):
                    tables = self.rotary(torch.zeros(1, 2, 1), torch.tensor([[0, position]]), *rest)
                if not all(torch.isfinite(table).all() for table in tables):
                    raise ValueError(f"the rotary embeddings are not finite at position {position}")
            return tuple(table.to("meta") for table in tables)

    for module in list(model.modules()):
        if type(module).__name__ == family.block:
            setattr(module, family.router, Router())
            setattr(module, family.experts, Experts())
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, Rotary(type(child)(settings)))
