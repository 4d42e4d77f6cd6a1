"""Gives a model another selection of experts, in place, such as threshold routing."""

import logging
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from torch import nn

from dist_moe.attach.observer import check_free
from dist_moe.checkpoint.format.hf_weights import TARGET
from dist_moe.checkpoint.format.model_tensors import SINGLE_RANK
from dist_moe.config.balancing import selection_violations
from dist_moe.config.combinations import refusal
from dist_moe.config.sections.router import RouterConfig
from dist_moe.errors import UserError
from dist_moe.families.registry import FAMILIES
from dist_moe.model.family.hash_router import make_router
from dist_moe.moe.router import Router
from dist_moe.moe.select import ExpertThreshold, Rule, ThresholdRouting, TopK
from dist_moe.probe.layers import find_layers, replace_child, text_config
from dist_moe.replace.experts import ReadLayer, placed_layers, read_layers
from dist_moe.replace.folder_names import read_folder_names
from dist_moe.replace.saving import has_known_family, save_by_this_package
from dist_moe.section import broken_fields

Model = TypeVar("Model", bound=nn.Module)
Selection = Literal["top_k", "threshold", "expert_threshold"]
FIELDS = ("threshold", "target_experts_per_token", "max_experts", "min_experts", "top_k", "score", "normalize",
          "scaling_factor")  # fmt: skip
"""Fields of the section `router` of a configuration that `route` takes."""
POLICY_OF = {"top_k": "none", "threshold": "none", "expert_threshold": "expert_threshold"}
"""A policy with which a selection is possible."""
logger = logging.getLogger("dist_moe")


def route(model: Model, selection: Selection = "threshold", **fields: Any) -> Model:
    """Give the routers of a Hugging Face MoE model another selection of experts, in place.

    With `threshold` a token takes experts in order of probability until their sum reaches a threshold (arXiv
    2403.07652). The family's routers compute the logits as before. The experts are computed by this package, since
    those of transformers need the same number for each token; their parameters stay the same objects. Call it before
    the optimizer and wrappers such as DDP are made, and `balance` afterwards, whose policies then reach the threshold
    and the gate weights.

    Args:
        model: The model, with its weights, not in a wrapper, and not sharded.
        selection: As `router.selection` of a configuration.
        fields: Fields of the section `router`: threshold, target_experts_per_token, max_experts, min_experts, top_k,
            score, normalize and scaling_factor. The others' defaults are those of the family, except that the gate
            weights of a variable number of experts are the scores themselves.

    Returns:
        `model`.

    Raises:
        UserError: A router or its experts compute something that is not known, or the fields do not fit together.
    """
    router = _check_fields(selection, fields)
    check_free(model)
    is_new = not placed_layers(model)
    if any(isinstance(layer.router, Router) for layer in find_layers(model)):
        _follow(model, router)
    else:
        found = read_layers(model)
        free = [layer for layer in found if layer.probed.table is None]
        if not free:
            raise UserError(f"no layer can be routed by another rule: {found[0].layer.name}: {found[0].probed.reason}")
        family = FAMILIES.get(getattr(text_config(model), "model_type", ""))
        divides = family is not None and family.divides_by_top_k
        rules = [_rule(router, _own_rule(layer), layer.probed.num_experts, divides) for layer in free]
        for layer, rule in zip(free, rules, strict=True):
            _replace(layer, rule)
        for layer in found:
            if layer.probed.table is not None:
                _replace(layer, rules[0])
                logger.warning("%s is routed as before: %s", layer.layer.name, layer.probed.reason)
    for module in model.modules():
        if isinstance(module, Router):
            module.target_experts_per_token = router.target_experts_per_token
    if not has_known_family(model):
        logger.warning(
            "%s cannot be saved as a folder with this routing: dist-moe train does not train it "
            "(docs/families.md); save model.state_dict()",
            type(model).__name__,
        )
    save_by_this_package(model)
    if is_new:
        read_folder_names(model)
    return model


def _check_fields(selection: str, fields: dict[str, Any]) -> RouterConfig:
    if unknown := sorted(fields.keys() - set(FIELDS)):
        raise UserError(f"{unknown[0]} is not a field of route; use {', '.join(FIELDS)}")
    if selection not in POLICY_OF:
        raise UserError(f"selection={selection!r} is not possible here; use {', '.join(POLICY_OF)}")
    try:
        return RouterConfig(selection=selection, **fields)  # type: ignore[arg-type]
    except ValidationError as error:
        raise UserError(broken_fields(error)) from None


def _follow(model: nn.Module, router: RouterConfig) -> None:
    """Change the rule of routers that are of this package."""
    found = [layer.router for layer in find_layers(model) if isinstance(layer.router, Router)]
    rules: list[Rule] = []
    for each in found:
        if isinstance(each.rule, ThresholdRouting) and router.model_fields_set == {"selection", TARGET}:
            filled = router.model_copy(update={"max_experts": each.rule.max_experts, "groups": 1})
            _check_selection(filled, each.num_experts)
            continue  # the threshold that was reached stays
        if not isinstance(each.rule, TopK):
            raise UserError(
                "the model has another selection already; begin with a model that was not routed, or give "
                f"{TARGET} alone"
            )
        rules.append(_rule(router, each.rule, each.num_experts))
    for each, rule in zip(found, rules, strict=bool(rules)):
        each.set_rule(rule)
        if not isinstance(rule, TopK):
            each.reset_state()  # a bias on the family's scores is not one on these


def _own_rule(layer: ReadLayer) -> TopK:
    if layer.probed.rule is None:
        reason = layer.probed.reason or "it selects by none of the known rules"
        raise UserError(f"{layer.layer.name} cannot be routed by another rule: {reason}")
    return layer.probed.rule


def _rule(router: RouterConfig, own: TopK, experts: int, divides: bool = False) -> Rule:
    """Return the rule of a layer.

    Args:
        router: The fields that were given.
        own: The rule of the family's router.
        experts: Of the layer.
        divides: Whether the family's router divides the gate weights by the number of experts a token takes, by which
            its block multiplies the result.

    Raises:
        UserError: The fields do not fit the layer.
    """
    varies = router.selection != "top_k"
    score = router.score or ("softmax" if router.selection == "threshold" else own.score)
    top_k, max_experts = router.top_k or own.top_k, router.max_experts or experts
    normalize = router.normalize if router.normalize is not None else own.normalize and not varies
    factor = router.scaling_factor or (1.0 if varies and not divides else own.routed_scaling_factor)
    update = {"score": score, "top_k": top_k, "normalize": normalize, "scaling_factor": factor}
    update |= {"max_experts": max_experts, "groups": 1} if varies else {"groups": own.groups}
    refused = refusal(router.selection, score, POLICY_OF[router.selection])
    if refused is not None:
        raise UserError(f"score={score} {refused.rule}; {refused.remedy}".replace("router.", ""))
    _check_selection(router.model_copy(update=update), experts)
    if top_k > experts:
        raise UserError(f"top_k={top_k} is more than the {experts} experts of a layer; use {experts} or fewer")
    if router.selection == "threshold":
        return ThresholdRouting(router.threshold, max_experts, normalize, factor)
    if router.selection == "expert_threshold":
        return ExpertThreshold(top_k, max_experts, router.min_experts, score, normalize, factor)
    return replace(own, top_k=top_k, score=score, normalize=normalize, routed_scaling_factor=factor)


def _check_selection(filled: RouterConfig, experts: int) -> None:
    for wrong in selection_violations(filled, experts):
        raise UserError(f"{wrong.key}={wrong.value} {wrong.rule}; {wrong.remedy}".replace("router.", ""))


def _replace(layer: ReadLayer, rule: Rule) -> None:
    found = layer.layer
    bias_E = None if layer.own is None else layer.own.read()
    if not layer.is_placed:
        layer.place_experts(SINGLE_RANK)
    with next(found.router.parameters()).device:
        router = make_router(found.router, layer.probed, rule, layer.own)
    if bias_E is not None and isinstance(rule, TopK):
        router.selection_bias.copy_(bias_E)
    router.train(found.router.training)
    replace_child(found, found.router, router)
