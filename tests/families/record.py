"""The record of a family, made by changing one key at a time and looking at what its router then computes."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from dist_moe.errors import UserError
from dist_moe.families.composite import composite_class, find_composite
from dist_moe.families.model_class import find_language_model_class, language_model_class, model_class
from dist_moe.model.convert import make_local, remove_unreached
from dist_moe.model.family.experts import check_experts
from dist_moe.moe.select import TopK
from dist_moe.probe.layers import FoundLayer, expert_groups, find_layers
from dist_moe.probe.own_bias import find_own_bias
from dist_moe.probe.routed_layers import unify_layers
from dist_moe.probe.router_probe import Probed, probe_router
from tests.families.balanced import values_of
from tests.families.composite import build_composite, small_composite
from tests.families.small import EXPERT_KEYS, EXPERTS, LENGTH, TOP_K, TOP_K_KEYS, VOCABULARY, build, small_config

FACTOR = 1.75
CLOSE = 1e-3
MOST_TIES = 0.2
"""Share of the tokens for which sparse attention may have equal scores to select by."""


def make_record(family: str) -> dict[str, Any]:
    """Return the record of a family.

    Raises:
        UserError: `dist-moe train` cannot train it, with the reason.
    """
    config = small_config(family)
    encoder = is_encoder(family)
    if not encoder and find_language_model_class(config) is None:
        _check_part(family, config)
    layer, probed = _probe(family)
    own = find_own_bias(layer)
    rule = probed.rule
    if rule is None:
        raise UserError(probed.reason or "its router selects by none of the known rules")
    _check_experts(layer)
    _check_runs(family)
    return {
        "model_type": config.model_type,
        "encoder": encoder or None,
        "experts_class": type(layer.experts).__name__,
        "score": rule.score,
        "bias_name": own and own.name,
        "bias_on_probabilities": rule.bias_on_probabilities,
        **_keys(family, rule),
        "separates_documents": _separates_documents(family),
        "untrained": _untrained(family),
    }


@functools.cache
def is_encoder(family: str) -> bool:
    """Whether transformers has no language model of a family, but a text model whose tokens see later ones."""
    config = small_config(family)
    if find_language_model_class(config) is not None or small_composite(family) is not None:
        return False
    if type(config) not in MODEL_MAPPING or config.is_encoder_decoder:
        return False
    return sees_later_tokens(build(config))


@torch.no_grad()
def sees_later_tokens(model: Any) -> bool:
    """Whether the last token changes what a model computes of the tokens before."""
    tokens = torch.randint(VOCABULARY, (1, LENGTH // 4), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    first, second = (values_of(model.eval()(input_ids=each, use_cache=False))[:, :-1] for each in (tokens, changed))
    return not torch.allclose(first, second, atol=1e-5)


@torch.no_grad()
def _check_part(family: str, config: PreTrainedConfig) -> None:
    """Raise UserError unless a multimodal model has this language model, and its logits are equal."""
    whole = small_composite(family)
    if whole is None:
        raise UserError(f"transformers has no language model for a {type(config).__name__}, alone or as a part")
    kind = composite_class(whole).__name__
    if not kind.endswith("ForConditionalGeneration"):
        raise UserError(f"a {kind} does not predict the next token")
    try:
        theirs: Any = build_composite(whole).eval()
        composite = find_composite(json.loads(whole.to_json_string(use_diff=False)))
        ours = language_model_class(whole.get_text_config())._from_config(whole.get_text_config()).eval()
    except ValueError as error:
        raise UserError(str(error)) from None
    state = theirs.state_dict()
    ours.load_state_dict({name: state[composite.name_of(name)] for name in ours.state_dict()})
    tokens = torch.randint(VOCABULARY, (2, LENGTH // 4))
    part = theirs.get_submodule(composite.head.rpartition(".")[0])
    first, second = (each(input_ids=tokens, use_cache=False).logits for each in (part, ours))
    if not torch.allclose(first, second, atol=1e-5):
        raise UserError(f"a {kind} predicts text in another way than a language model")


def _probe(family: str, **changes: Any) -> tuple[FoundLayer, Probed]:
    with torch.device("meta"):
        model = build(small_config(family, **changes))
    remove_unreached(model, tuple(_untrained(family) or ()))
    layer = unify_layers(model)[-1]
    return layer, probe_router(layer, find_own_bias(layer), expert_groups(model))


def _build_trained(family: str) -> PreTrainedModel:
    """Build the small model that is trained: an encoder, or a language model."""
    config = small_config(family)
    config._experts_implementation = "eager"
    model: PreTrainedModel = model_class(config, is_encoder(family))._from_config(config)
    return model


def _rule_with(family: str, **changes: Any) -> TopK | None:
    """Return the rule of the small model with other values of keys; None where there is none."""
    try:
        return _probe(family, **changes)[1].rule
    except Exception:  # classes of another library raise errors of any type
        return None


def _keys(family: str, rule: TopK) -> dict[str, Any]:
    config = small_config(family)
    given = config.to_dict()
    declared = [field.name for field in dataclasses.fields(config)]
    declared.sort(key=lambda name: name in config.attribute_map)  # other names of a key come last
    found: dict[str, Any] = {"experts_key": None, "top_k_key": None, "normalize_key": None, "scaling_factor_key": None}
    if _probe(family, **dict.fromkeys(given.keys() & EXPERT_KEYS, 2 * EXPERTS))[1].num_experts != EXPERTS:
        found["experts_key"] = next((key for key in declared if key in EXPERT_KEYS), None)
    changed_top_k = _rule_with(family, **dict.fromkeys(given.keys() & TOP_K_KEYS, TOP_K + 1))
    if changed_top_k is not None and changed_top_k.top_k == TOP_K + 1:
        found["top_k_key"] = next((key for key in declared if key in TOP_K_KEYS), None)
    given = {key: getattr(config, key) for key in declared if key in given or key in config.attribute_map}
    for key, value in _named(given, bool, "norm"):
        changed = _rule_with(family, **{key: not value})
        if changed is not None and changed.normalize != rule.normalize:
            found["normalize_key"] = key
    for key, value in _named(given, (int, float), "scal", "factor", "multiplier"):
        changed = _rule_with(family, **{key: FACTOR * value})
        if changed is not None and abs(changed.routed_scaling_factor / rule.routed_scaling_factor - FACTOR) < CLOSE:
            found["scaling_factor_key"] = key
    grouped = _rule_with(family, n_group=4, topk_group=2) if "n_group" in given and "topk_group" in given else None
    if grouped is not None and (grouped.groups, grouped.topk_groups) == (4, 2):
        found |= {"groups_key": "n_group", "topk_groups_key": "topk_group", "group_score": grouped.group_score}
    if found["experts_key"] is None:
        raise UserError("none of the known keys has its number of experts")
    factor = rule.routed_scaling_factor
    if found["scaling_factor_key"] is None and changed_top_k is not None and _divides(rule, changed_top_k):
        found["divides_by_top_k"], factor = True, factor * TOP_K
    defaults = {"normalize": rule.normalize, "scaling_factor": factor}
    if found["top_k_key"] is None:
        raise UserError("none of the known keys has the number of experts a token takes")
    found["defaults"] = {name: value for name, value in defaults.items() if found[f"{name}_key"] is None}
    return found


def _divides(rule: TopK, changed: TopK) -> bool:
    """Whether the factor on the gate weights is smaller with more experts a token, in proportion."""
    more = changed.top_k / rule.top_k
    return more > 1 and abs(changed.routed_scaling_factor * more / rule.routed_scaling_factor - 1) < CLOSE


def _named(given: dict[str, Any], kinds: Any, *words: str) -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        is_kind = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
        if is_kind and (kinds is bool or value) and any(word in key for word in words):
            yield key, value


def _check_experts(layer: FoundLayer) -> None:
    try:
        check_experts(layer.experts, lambda original, experts: make_local(original, experts, "auto"))
    except ValueError as error:
        raise UserError(str(error)) from None
    except Exception as error:  # modules of another library raise errors of any type
        raise UserError(f"its experts are called in another way ({type(error).__name__}: {error})") from None


@torch.no_grad()
def _check_runs(family: str) -> None:
    """Raise UserError where a forward of the model runs a layer more than once: a record holds one run."""
    model: Any = _build_trained(family).eval()
    runs: list[str] = []
    for layer in find_layers(model):
        layer.router.register_forward_pre_hook(lambda module, args, name=layer.name: runs.append(name))
    model(input_ids=torch.randint(VOCABULARY, (1, LENGTH // 4)), use_cache=False)
    if repeated := sorted({name for name in runs if runs.count(name) > 1}):
        raise UserError(f"a forward runs {repeated[0]} {runs.count(repeated[0])} times")


@functools.cache
def _untrained(family: str) -> list[str] | None:
    """Return the outermost modules below a layer of whose weights none gets a gradient."""
    torch.manual_seed(0)
    model: Any = _build_trained(family).train()
    tokens = torch.randint(VOCABULARY, (2, LENGTH // 2))
    values_of(model(input_ids=tokens, use_cache=False)).square().mean().backward()
    trained: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        below = re.search(r"\.\d+\.(.+)", name)
        if below is not None and parameter.requires_grad:
            trained[below[1]] = trained.get(below[1], False) or parameter.grad is not None
    found = {_outermost(name, trained) for name, has_gradient in trained.items() if not has_gradient}
    return sorted(found) or None


def _outermost(name: str, trained: dict[str, bool]) -> str:
    """Return the outermost module with this parameter none of whose parameters is trained."""
    parts = name.split(".")
    prefixes = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return next(
        each for each in prefixes if not any(trained[other] for other in trained if other.startswith(f"{each}."))
    )


@torch.no_grad()
def _separates_documents(family: str) -> bool:
    """Whether a document is computed as in a row of its own, where the positions of a row begin again at 0.

    No token may depend on another document. Sparse attention selects by scores of which some are equal, so that a few
    tokens differ with the place of the document in its row; with attention to chunks of the row, most of them do.
    """
    torch.manual_seed(0)
    model = _build_trained(family).eval()
    first, length = LENGTH // 4 - 5, LENGTH // 4  # no multiple of the length of a chunk
    positions = torch.cat([torch.arange(first), torch.arange(length)]).unsqueeze(0)
    tokens = torch.randint(VOCABULARY, (1, first + length))
    changed = torch.cat([(tokens[:, :first] + 1) % VOCABULARY, tokens[:, first:]], dim=1)
    packed, other = (
        values_of(model(input_ids=each, position_ids=positions, use_cache=False))[:, first:]
        for each in (tokens, changed)
    )
    alone = values_of(model(input_ids=tokens[:, first:], use_cache=False))
    differs = ~torch.isclose(packed, alone, atol=1e-5).all(dim=-1)
    return bool(torch.allclose(packed, other, atol=1e-5)) and float(differs.float().mean()) < MOST_TIES
