"""Finds out what a router computes, and how a bias enters its selection, by calling a copy of it.

Nothing is assumed from names: a rule is accepted where the results agree with it, and refused otherwise.

Shapes: T tokens, D model width, E experts, K experts a token takes.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.moe.select import TopK
from dist_moe.probe.layers import FoundLayer
from dist_moe.probe.own_bias import OwnBias
from dist_moe.probe.router_copy import Call, RouterCopy
from dist_moe.probe.router_rule import SCORES, Groups, Sample, fit_rule

BiasPlace = Literal["own", "ours"]
LARGE = 1e3
"""A bias with which every token selects an expert, in units of any score."""
PROBABILITIES = 1e-4
"""How far the sum of the probabilities of a token may be from 1."""
RAISED = 4
"""Experts whose bias is tried."""


class Places(NamedTuple):
    """Where a router has its results, by their index in the tuple that it returns.

    Attributes:
        logits: Of the logits [.., E]; None where they are those of its child `gate`.
        weights: Of the gate weights [.., K].
        ids: Of the experts [.., K].
        are_probabilities: Whether the place of the logits has probabilities, whose logarithms are logits.
    """

    logits: int | None
    weights: int
    ids: int
    are_probabilities: bool = False


class Results(NamedTuple):
    """The results of a router.

    Attributes:
        logits_TE: Before the gate function; None where the router does not return them.
        weights_TK: The gate weights.
        ids_TK: The experts.
    """

    logits_TE: Tensor | None
    weights_TK: Tensor
    ids_TK: Tensor


class Probed(NamedTuple):
    """What a probe found out of a router.

    Attributes:
        num_experts: E.
        top_k: K.
        places: Where it has its results.
        rule: What it computes of its logits, and where its own bias enters; None where no known rule does.
        expert_scale: Name of the router's parameter [E] that the gate weights are multiplied by; None for none.
        bias: `own`: the model has a selection bias; `ours`: it has none, and the results of the router can be selected
            again with one; None for neither.
        reason: Why it is neither.
        table: Name of the router's buffer with the experts of each token id, which it takes; None for none.
    """

    num_experts: int
    top_k: int
    places: Places
    rule: TopK | None
    bias: BiasPlace | None
    reason: str = ""
    expert_scale: str | None = None
    table: str | None = None


def probe_router(layer: FoundLayer, own: OwnBias | None, groups: Groups = (1, 1)) -> Probed:
    """Find out what the router of a layer computes, by calling a copy of it.

    Args:
        layer: The layer.
        own: What may be its selection bias.
        groups: Of the configuration of the model.

    Raises:
        UserError: The router is called with more than the hidden states, and with a table the ids of the tokens; or its
            results cannot be identified.
    """
    copy = RouterCopy(layer.router, own)
    if copy.table is not None:
        return _probe_table(copy, copy.table)
    with torch.enable_grad():
        call = copy.call(None if own is None else torch.zeros(1))
        places = find_places(call)
        sample = _sample(call, places)
        experts, top_k = sample.logits_TE.shape[1], sample.ids_TK.shape[1]
        rule, scale = fit_rule(sample, groups), None
        if own is None:
            if rule is None:
                rule, scale = _fit_with_scale(copy, sample, groups)
            reason = "" if rule else _unknown(top_k, experts)
            if places.logits is None:
                rule, reason = None, "it does not return its logits, so that nothing can be selected again"
            return Probed(experts, top_k, places, rule, "ours" if rule else None, reason, scale)
        drawn_E = torch.randn(experts, generator=torch.Generator().manual_seed(2)) / 4
        biased = fit_rule(_sample(copy.call(drawn_E), places), groups, drawn_E)
        if biased is not None or _raises_experts(copy, places, experts):
            return Probed(experts, top_k, places, biased, "own")
        return Probed(experts, top_k, places, rule, None, f"its {own.name} does not raise the selection of an expert")


def _probe_table(copy: RouterCopy, table: str) -> Probed:
    """Find out what a router with a table computes: its experts depend on the ids of the tokens alone."""
    call = copy.call(None)
    places = find_places(call)
    sample = _sample(call, places)
    experts, top_k = sample.logits_TE.shape[1], sample.ids_TK.shape[1]
    drawn_TK = copy.draw_table(experts)
    again = copy.call(None)
    if not torch.equal(_sample(again, find_places(again)).ids_TK, drawn_TK):
        raise UserError(
            f"the router is called with the ids of the tokens, and its experts are not those of its {table}"
        )
    reason = "its router takes the experts of a table by the ids of the tokens, which no bias moves"
    return Probed(experts, top_k, places, None, None, reason, table=table)


def find_places(call: Call) -> Places:
    """Find the results of a router in what it returned.

    Raises:
        UserError: It returned something else than logits, gate weights and ids.
    """
    tensors = {place: value for place, value in enumerate(call.returned) if isinstance(value, Tensor)}
    ids = [place for place, value in tensors.items() if is_ids(value)]
    floats = {place: value for place, value in tensors.items() if value.is_floating_point()}
    weights = [place for place, value in floats.items() if ids and value.shape == tensors[ids[0]].shape]
    logits = [place for place, value in floats.items() if place not in weights and value.ndim >= 2]
    if len(ids) != 1 or len(weights) != 1 or len(logits) > 1 or not (logits or call.gate_logits is not None):
        shapes = ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors.values())
        raise UserError(
            f"the router returns {shapes or 'no tensor'}, in which logits, gate weights and ids of experts cannot "
            "be identified"
        )
    return Places(logits[0] if logits else None, weights[0], ids[0], bool(logits) and _sum_to_1(tensors[logits[0]]))


def is_ids(value: Any) -> bool:
    """Whether a value is ids of experts [.., K]: integers for each token."""
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) and value.ndim >= 2


def read_results(returned: Sequence[Tensor], places: Places, gate_logits: Tensor | None = None) -> Results:
    """Return the results of a router, with one row for each token.

    Args:
        returned: By the router.
        places: Of its results.
        gate_logits: What its child `gate` returned.
    """
    logits = gate_logits if places.logits is None else returned[places.logits]
    if logits is not None and places.are_probabilities:
        logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
    weights, ids = returned[places.weights], returned[places.ids]
    return Results(None if logits is None else _rows(logits), _rows(weights), _rows(ids))


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _sum_to_1(values: Tensor) -> bool:
    return bool((values >= 0).all()) and bool(((values.sum(dim=-1) - 1).abs() < PROBABILITIES).all())


def _fit_with_scale(copy: RouterCopy, sample: Sample, groups: Groups) -> tuple[TopK | None, str | None]:
    """Find a rule whose gate weights are multiplied by a factor of each expert, and the parameter with the factors."""
    for name, scale_E in copy.parameters():
        if scale_E.shape == (sample.logits_TE.shape[1],):
            rule = fit_rule(sample._replace(weights_TK=sample.weights_TK / scale_E[sample.ids_TK]), groups)
            if rule is not None:
                return rule, name
    return None, None


def _sample(call: Call, places: Places) -> Sample:
    results = read_results(call.returned, places, call.gate_logits)
    assert results.logits_TE is not None
    return Sample(call.hidden_TD, results.logits_TE, results.weights_TK, results.ids_TK.long())


def _raises_experts(copy: RouterCopy, places: Places, experts: int) -> bool:
    """Whether every token selects an expert with a large bias, and none one with a small bias."""
    for expert in range(min(experts, RAISED)):
        for bias, expected in ((LARGE, 1.0), (-LARGE, 0.0)):
            bias_E = torch.zeros(experts)
            bias_E[expert] = bias
            ids_TK = _sample(copy.call(bias_E), places).ids_TK
            if float((ids_TK == expert).any(dim=1).float().mean()) != expected:
                return False
    return True


def _unknown(top_k: int, experts: int) -> str:
    return (
        f"it selects {top_k} of {experts} experts by none of the known rules (gate functions {', '.join(SCORES)}, with "
        "and without normalization and groups)"
    )
