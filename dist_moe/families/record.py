"""What has to be known of a family of Hugging Face MoE models: one record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dist_moe.errors import Violation
from dist_moe.scores import Score


@dataclass(frozen=True)
class FeedForward:
    """Where a dense model keeps the feed-forward network of a layer, by names below the layer.

    Attributes:
        layers: Name of the list of layers, below the base model.
        block: The module that the MoE block takes the place of.
        projections: Projections of an expert -> the linear layers with their values: gate_proj, up_proj and down_proj
            without biases, or up_proj and down_proj, each with a bias.
        activation: The activation, after gate_proj if there is one, else after up_proj.
        norm: The norm whose output is the block's input.
        removed: What the block computes in addition to its own place; replaced by the identity.
    """

    layers: str
    block: str
    projections: Mapping[str, str]
    activation: str
    norm: str
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family of Hugging Face models: the names in its config class, and its MoE blocks.

    The router of a block is called with the hidden states and returns (logits, weights_TK, ids_TK); its experts are
    called with (hidden_TD, ids_TK, weights_TK), and hold `gate_up_proj` [E, 2F, D], `down_proj` [E, D, F] and `act_fn`.
    A family whose children are called in another way needs a field here and a branch in `dist_moe.model.convert`.
    A dense family has a `feed_forward`, which a block of this package with these children takes the place of.

    Attributes:
        architecture: Hugging Face's `model_type`.
        block: Class name of the MoE block.
        router: Name of the router among the block's children.
        experts: Name of the experts among the block's children.
        score: Gate function of the family's own router.
        shared_expert: Name of the shared expert among the block's children, if it is called after the experts and with
            the same hidden states.
        bias_name: Name of the selection bias in the family's weights, below the router; None where the architecture
            cannot express one.
        experts_key: Key of the config class with the number of routed experts of a layer.
        top_k_key: Key with the number of experts a token takes.
        normalize_key: Key that says whether a token's weights are divided by their sum; None if there is none, as in
            the following.
        scaling_factor_key: Key with the factor on the weights.
        groups_key: Key with the number of expert groups.
        topk_groups_key: Key with the number of groups a token may take experts from.
        undeclared_keys: Keys that the model's code reads although the config class does not declare them.
        positive_keys: Keys that the model needs to be 1 or more, besides those of every family.
        few_layers: Values of keys with which a model has 2 or 3 layers, MoE layers among them, for quick checks.
        unsupported_keys: Keys that ask for what is not built here -> (the accepted values, why others are refused).
        switched_keys: Keys without effect unless another key is true -> that key.
        file_keys: Keys of a published config.json that the config class does not have -> (the accepted values, why
            others are refused); none where any value is accepted, since the key does not define the model.
        rotary_keys_of_attention: Keys of rope_parameters that the attention reads, too.
        moe_layers: The indices of the MoE layers, from the Hugging Face config.
        layers_remedy: (key, what to do) where `moe_layers` is empty, from the Hugging Face config.
        shape_violations: What the model's code refuses although the config class accepts it, from the Hugging Face
            config; called once `positive_keys` are positive.
        feed_forward: Of a dense family; None for a family of MoE models.
        is_probed: Whether the layers of a model are found, and what its routers compute is verified, when it is built:
            of the families whose records were made by program. `block`, `router` and `experts` are then not used.
        defaults: Routing values that the family's router has without a key, by the fields of the section `router`.
        group_score: What a group of experts is chosen by.
        bias_on_probabilities: Whether the family adds a selection bias to the probabilities of its softmax.
        separates_documents: Whether a document is computed as in a row of its own where the positions of a row begin
            again.
        untrained: Modules below a layer that the loss gives no gradient, such as the indexer of sparse attention.
        encoder: Whether tokens attend to later ones, too.
        divides_by_top_k: Whether the router divides the gate weights by the number of experts a token takes.
    """

    architecture: str
    block: str
    router: str
    experts: str
    score: Score
    experts_key: str
    top_k_key: str
    few_layers: Mapping[str, Any]
    moe_layers: Callable[[Any], list[int]]
    layers_remedy: Callable[[Any], tuple[str, str]]
    shape_violations: Callable[[Any], list[Violation]]
    shared_expert: str | None = None
    bias_name: str | None = None
    normalize_key: str | None = None
    scaling_factor_key: str | None = None
    groups_key: str | None = None
    topk_groups_key: str | None = None
    undeclared_keys: tuple[str, ...] = ()
    positive_keys: tuple[str, ...] = ()
    unsupported_keys: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    switched_keys: Mapping[str, str] = field(default_factory=dict)
    file_keys: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    rotary_keys_of_attention: tuple[str, ...] = ()
    feed_forward: FeedForward | None = None
    encoder: bool = False
    is_probed: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    group_score: Literal["top_2", "max"] = "top_2"
    bias_on_probabilities: bool = False
    separates_documents: bool = True
    untrained: tuple[str, ...] = ()
    divides_by_top_k: bool = False

    def default_factor(self, settings: Any) -> float:
        """Return the factor on the gate weights where no key has it, from the Hugging Face config."""
        factor = float(self.defaults.get("scaling_factor", 1.0))
        return factor / getattr(settings, self.top_k_key) if self.divides_by_top_k else factor
