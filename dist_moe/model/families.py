"""One adapter record per family signature: where a Hugging Face MoE block keeps its router and its experts."""

from dataclasses import dataclass

from dist_moe.config.family import Score


@dataclass(frozen=True)
class Adapter:
    """How the MoE blocks of one family are found and replaced.

    block: class name of the MoE block. router, experts: names of its children. The router is called with the hidden
    states and returns (logits, weights_TK, ids_TK); the experts are called with (hidden_TD, ids_TK, weights_TK).
    A family whose children are called otherwise gets a field here and a branch in `convert`.
    bias: name of the selection bias in the family's own weights, None where the architecture cannot express one.
    score: the gate function that the family's own code computes.
    """

    architecture: str
    block: str
    router: str
    experts: str
    bias: str | None
    score: Score


ADAPTERS: dict[str, Adapter] = {
    "deepseek_v3": Adapter("deepseek_v3", "DeepseekV3MoE", "gate", "experts", "e_score_correction_bias", "sigmoid"),
    "qwen3_moe": Adapter("qwen3_moe", "Qwen3MoeSparseMoeBlock", "gate", "experts", None, "softmax"),
}


def adapter_of(architecture: str) -> Adapter:
    """The record of `architecture`. Errors: ValueError that lists the families."""
    if architecture not in ADAPTERS:
        raise ValueError(f"model.architecture={architecture!r} has no adapter; use one of {sorted(ADAPTERS)}")
    return ADAPTERS[architecture]
