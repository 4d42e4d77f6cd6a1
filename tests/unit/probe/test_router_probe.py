"""What a router computes: the rule of each family is found, and one that deviates from all of them is not accepted."""

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.moe.select import TopK
from dist_moe.probe.layers import FoundLayer, find_layers
from dist_moe.probe.own_bias import find_own_bias
from dist_moe.probe.router_copy import Call
from dist_moe.probe.router_probe import Places, Probed, find_places, probe_router, read_results
from dist_moe.probe.router_rule import Sample, fit_rule
from tests.attached import EXPERTS, make_model

WIDTH = 16
IN_ORDER = Places(0, 1, 2)
SIGMOID = TopK(2, "sigmoid", normalize=True)
SOFTMAX = TopK(2, "softmax", normalize=True)
RULES: list[tuple[str, dict[str, Any], TopK, str, Places]] = [
    ("qwen3_moe", {}, SOFTMAX, "ours", IN_ORDER),
    ("qwen3_moe", {"norm_topk_prob": False}, TopK(2, "softmax"), "ours", IN_ORDER),
    ("qwen3_moe", {"num_experts_per_tok": 5}, TopK(5, "softmax", normalize=True), "ours", IN_ORDER),
    ("mixtral", {}, SOFTMAX, "ours", IN_ORDER),
    ("gpt_oss", {}, SOFTMAX, "ours", IN_ORDER),
    ("granitemoe", {}, SOFTMAX, "ours", Places(2, 1, 0)),
    ("minimax_m2", {}, SIGMOID, "own", IN_ORDER),
    ("ernie4_5_moe", {}, TopK(2, "softmax", normalize=True, bias_on_probabilities=True), "own", IN_ORDER),
    ("afmoe", {"route_scale": 1.25}, TopK(2, "sigmoid", True, 1.25), "own", IN_ORDER),
    ("deepseek_v3", {}, TopK(2, "sigmoid", True, 2.5), "own", IN_ORDER),
    ("deepseek_v3", {"norm_topk_prob": False}, TopK(2, "sigmoid", False, 2.5), "own", IN_ORDER),
    (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
        TopK(2, "sigmoid", True, 1.5, groups=4, topk_groups=2),
        "own",
        IN_ORDER,
    ),
    (
        "deepseek_v2",
        {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "num_experts_per_tok": 3},
        TopK(3, "softmax", False, 1.0, groups=4, topk_groups=2, group_score="max"),
        "ours",
        IN_ORDER,
    ),
]
Kind = Literal[
    "plain", "temperature", "noisy_tokens", "detached", "straight_through", "lowest", "shared", "threshold", "shifted"
]


class Toy(nn.Module):
    """A softmax router of 2 experts a token, which may deviate from that in one way."""

    def __init__(self, kind: Kind = "plain") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.kind = kind

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = F.linear(hidden_TD, self.weight)
        scores_TE = (logits_TE / (2 if self.kind == "temperature" else 1)).softmax(dim=1)
        ids_TK = (-logits_TE if self.kind == "lowest" else logits_TE).topk(2, dim=1).indices
        if self.kind == "noisy_tokens":  # one token of 20
            other_TK = logits_TE.topk(3, dim=1).indices[:, 1:]
            ids_TK = torch.where((hidden_TD[:, :1] > 1.645), other_TK, ids_TK)
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.kind == "shared":  # divided by the sum of three
            weights_TK = weights_TK / scores_TE.topk(3, dim=1).values.sum(dim=1, keepdim=True)
        elif self.kind == "threshold":  # a weight below a quarter counts as none
            weights_TK = weights_TK.where(weights_TK > 0.25, 0.0)
        elif self.kind == "shifted":  # with the same gradients
            weights_TK = weights_TK + 0.1 * (hidden_TD[:, :1] > 0.5)
        elif self.kind == "detached":
            weights_TK = weights_TK.detach()
        elif self.kind == "straight_through":
            chosen_TK = logits_TE.gather(1, ids_TK)
            weights_TK = weights_TK.detach() + (chosen_TK - chosen_TK.detach())
        return logits_TE, weights_TK, ids_TK


class ToyBiased(nn.Module):
    """A sigmoid router with a bias of its own, which enters as its `kind` says."""

    def __init__(self, kind: Literal["plain", "weights", "temperature", "unused", "lowered", "scaled"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))
        self.kind = kind

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = F.linear(hidden_TD, self.weight)
        scores_TE = (logits_TE / (2 if self.kind == "temperature" else 1)).sigmoid()
        factor = {"unused": 0.0, "lowered": -1.0, "scaled": 3.0}.get(self.kind, 1.0)
        biased_TE = scores_TE + factor * self.get_buffer("expert_bias")
        ids_TK = biased_TE.topk(2, dim=1).indices
        return logits_TE, (biased_TE if self.kind == "weights" else scores_TE).gather(1, ids_TK), ids_TK


class ToyScaled(Toy):
    """As Gemma 4: it returns probabilities, and multiplies the gate weights by a factor of each expert."""

    def __init__(self, scales_weights: bool = True) -> None:
        super().__init__()
        self.per_expert_scale = nn.Parameter(torch.linspace(0.5, 2, EXPERTS))
        self.other_scale = nn.Parameter(torch.ones(EXPERTS))
        self.scales_weights = scales_weights

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weights_TK, ids_TK = super().forward(hidden_TD)
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        scale_TK = self.per_expert_scale[ids_TK]
        return logits_TE.softmax(dim=1), weights_TK * (scale_TK if self.scales_weights else scale_TK.square()), ids_TK


def probe(router: nn.Module, groups: tuple[int, int] = (1, 1)) -> Probed:
    block = nn.Module()
    layer = FoundLayer("mlp", block, router, nn.Identity())
    return probe_router(layer, find_own_bias(layer), groups)


@pytest.mark.parametrize(("family", "changes", "rule", "bias", "places"), RULES)
def test_trap_T99_the_rule_of_each_family_is_found(
    family: str, changes: dict[str, Any], rule: TopK, bias: str, places: Places
) -> None:
    model: Any = make_model(family, **changes)
    groups = (getattr(model.config, "n_group", None) or 1, getattr(model.config, "topk_group", None) or 1)
    for layer in find_layers(model):
        assert probe_router(layer, find_own_bias(layer), groups) == Probed(EXPERTS, rule.top_k, places, rule, bias)  # type: ignore[arg-type]


def test_a_softmax_router_without_deviations_is_accepted() -> None:
    assert probe(Toy()) == Probed(EXPERTS, 2, IN_ORDER, TopK(2, "softmax"), "ours")


def test_probabilities_and_a_factor_of_each_expert_are_found() -> None:
    found = probe(ToyScaled())
    assert found == Probed(EXPERTS, 2, Places(0, 1, 2, True), SOFTMAX, "ours", "", "per_expert_scale")
    assert (probe(ToyScaled(scales_weights=False)).rule, probe(ToyScaled(scales_weights=False)).bias) == (None, None)


@pytest.mark.parametrize("kind", ["temperature", "noisy_tokens", "lowest", "shared", "threshold", "shifted"])
def test_trap_T99_a_router_with_another_rule_is_not_selected_again(kind: Kind) -> None:
    found = probe(Toy(kind))
    assert (found.rule, found.bias) == (None, None)
    assert found.reason.startswith("it selects 2 of 8 experts by none of the known rules (gate functions softmax, sig")


@pytest.mark.parametrize("kind", ["detached", "straight_through"])
def test_trap_T99_gate_weights_with_another_gradient_are_not_replaced(kind: Kind) -> None:
    plain, found = Toy(), Toy(kind)
    hidden_TD = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(plain(hidden_TD), found(hidden_TD), strict=True)), "equal values"
    assert (probe(found).rule, probe(found).bias) == (None, None)


def test_trap_T99_the_sparse_mixer_of_phi_is_not_accepted() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "phimoe", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=2, vocab_size=32,
    )  # fmt: skip
    (layer,) = find_layers(AutoModelForCausalLM.from_config(config))
    found = probe_router(layer, find_own_bias(layer))
    assert (found.num_experts, found.top_k, found.rule, found.bias) == (EXPERTS, 2, None, None)


def test_groups_that_the_configuration_does_not_name_are_not_guessed() -> None:
    model = make_model("deepseek_v2", n_group=4, topk_group=1, topk_method="group_limited_greedy")
    layer = find_layers(model)[0]
    assert probe_router(layer, None).rule is None
    assert probe_router(layer, None, (4, 1)).rule is not None


def test_a_bias_of_its_own_with_the_known_rule() -> None:
    assert probe(ToyBiased("plain")) == Probed(EXPERTS, 2, IN_ORDER, TopK(2, "sigmoid"), "own")


@pytest.mark.parametrize("kind", ["weights", "temperature", "scaled"])
def test_trap_T99_a_bias_in_an_unknown_rule_is_used_without_a_rule(
    kind: Literal["weights", "temperature", "scaled"],
) -> None:
    """The family's own bias raises experts with any gate weights; a policy that reads logits is refused."""
    found = probe(ToyBiased(kind))
    assert (found.bias, found.rule) == ("own", None)


@pytest.mark.parametrize("kind", ["unused", "lowered"])
def test_trap_T99_a_tensor_that_does_not_raise_an_expert_is_no_selection_bias(
    kind: Literal["unused", "lowered"],
) -> None:
    found = probe(ToyBiased(kind))
    assert found.bias is None
    assert found.reason == "its expert_bias does not raise the selection of an expert"


def call_of(*returned: Any, gate_logits: Tensor | None = None) -> Call:
    return Call(torch.zeros(5, WIDTH), returned, gate_logits)


LOGITS, WEIGHTS, IDS = torch.randn(5, EXPERTS), torch.rand(5, 2), torch.randint(EXPERTS, (5, 2))


def test_results_are_told_apart_by_shape_and_type() -> None:
    assert find_places(call_of(None, IDS.int(), WEIGHTS, "x", LOGITS)) == Places(4, 2, 1)
    assert find_places(call_of(WEIGHTS, IDS, gate_logits=LOGITS)) == Places(None, 0, 1)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ((LOGITS,), r"float32\[5, 8\], in which"),
        ((LOGITS, WEIGHTS), r"float32\[5, 8\], float32\[5, 2\], in which"),
        ((WEIGHTS, IDS), r"float32\[5, 2\], int64\[5, 2\], in which"),
        ((LOGITS, LOGITS, WEIGHTS, IDS), r"float32\[5, 8\], float32\[5, 8\], float32\[5, 2\], int64\[5, 2\], in which"),
        ((LOGITS, WEIGHTS, IDS, IDS), "int64"),
        ((LOGITS, WEIGHTS.flatten(), IDS.flatten()), r"int64\[10\]"),
        (
            (None,),
            "the router returns no tensor, in which logits, gate weights and ids of experts cannot be identified",
        ),
    ],
)
def test_results_that_are_not_told_apart_are_refused(returned: tuple[Any, ...], shown: str) -> None:
    with pytest.raises(UserError, match=shown):
        find_places(call_of(*returned))


def test_results_have_one_row_for_each_token() -> None:
    returned = [LOGITS[:4].view(2, 2, -1), WEIGHTS[:4].view(2, 2, -1), IDS[:4].view(2, 2, -1)]
    found = read_results(returned, IN_ORDER)
    assert all(torch.equal(a, b[:4]) for a, b in zip(found, (LOGITS, WEIGHTS, IDS), strict=True))  # type: ignore[arg-type]
    kept = read_results([WEIGHTS, IDS], Places(None, 0, 1), gate_logits=LOGITS)
    assert kept.logits_TE is not None and torch.equal(kept.logits_TE, LOGITS)
    assert read_results([WEIGHTS, IDS], Places(None, 0, 1)).logits_TE is None


def test_probabilities_are_read_as_logits() -> None:
    assert find_places(call_of(LOGITS.softmax(dim=1), WEIGHTS, IDS)) == Places(0, 1, 2, True)
    for values in (LOGITS, LOGITS.sigmoid(), LOGITS.softmax(dim=1) - 0.01):
        assert find_places(call_of(values, WEIGHTS, IDS)) == IN_ORDER
    probabilities_TE = LOGITS.softmax(dim=1)
    probabilities_TE[0, 0] = 0.0
    found = read_results([probabilities_TE, WEIGHTS, IDS], Places(0, 1, 2, True)).logits_TE
    assert found is not None and bool(found.isfinite().all())
    torch.testing.assert_close(found.softmax(dim=1)[1:], LOGITS.softmax(dim=1)[1:])


def sample(factor: float = 1.0, bias_E: Tensor | None = None, flipped: int = 0) -> Sample:
    """Softmax routing of 200 tokens in a few obvious lines; `flipped` of them take the third expert, not the first."""
    generator = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(200, WIDTH, generator=generator, requires_grad=True)
    logits_TE = hidden_TD @ torch.randn(WIDTH, EXPERTS, generator=generator)
    order_TE = (logits_TE if bias_E is None else logits_TE + bias_E).argsort(dim=1, descending=True)
    ids_TK = order_TE[:, :2].clone()
    ids_TK[:flipped, 0] = order_TE[:flipped, 2]
    return Sample(hidden_TD, logits_TE, factor * logits_TE.softmax(dim=1).gather(1, ids_TK), ids_TK)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.826, 1 / 3])
def test_the_factor_on_the_gate_weights_is_found(factor: float) -> None:
    rule = fit_rule(sample(factor))
    assert rule is not None and (rule.score, rule.normalize) == ("softmax", False)
    assert rule.routed_scaling_factor == pytest.approx(factor, rel=1e-5)


def test_a_bias_over_logits_is_told_from_one_over_probabilities() -> None:
    bias_E = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(4)) / 2
    rule = fit_rule(sample(bias_E=bias_E), bias_E=bias_E)
    assert rule == TopK(2, "softmax")
    assert fit_rule(sample(bias_E=bias_E), bias_E=-bias_E) is None
    assert fit_rule(sample(bias_E=bias_E)) is None


def test_trap_T99_few_tokens_with_almost_equal_scores_may_differ() -> None:
    assert fit_rule(sample(flipped=2)) == TopK(2, "softmax")
    assert fit_rule(sample(flipped=3)) is None
