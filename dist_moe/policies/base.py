"""The base classes of balancing policies: what each policy declares, and the fields that all of them have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field, field_validator

from dist_moe.errors import Violation
from dist_moe.policies.shares import SUM_TOLERANCE, shares_of_all
from dist_moe.section import Section
from dist_moe.text import counted

if TYPE_CHECKING:
    from torch import Tensor


class Refusal(NamedTuple):
    """Why a combination is refused, and what to do instead; in the error message both follow the refused value."""

    rule: str
    remedy: str


class RoutingValues(NamedTuple):
    """The part of a resolved configuration's routing that `Policy.violations` reads.

    Attributes:
        selection: `router.selection`.
        score: `router.score`.
        top_k: Experts that a token takes.
        groups: Expert groups; 1 is no groups.
        experts: Routed experts of a layer.
    """

    selection: str
    score: str
    top_k: int
    groups: int
    experts: int


class RuleState(NamedTuple):
    """What an update rule knows of a layer, and what it returns.

    Attributes:
        bias_E: [E] fp32, the selection bias.
        memory: The tensors of `Policy.memory` by name, [E] fp32. They are 0 before the first update, are kept in
            checkpoints, and are equal on every rank.
    """

    bias_E: Tensor
    memory: Mapping[str, Tensor]


class LayerCounts(Protocol):
    """The counts of one layer in one optimizer step, summed over all ranks: int64."""

    @property
    def load_E(self) -> Tensor:
        """[E], assignments that each expert received."""
        ...

    @property
    def k_histogram_K(self) -> Tensor:
        """[K], tokens that took 1, 2, .. K experts."""
        ...

    @property
    def top_k(self) -> int | None:
        """Experts that a token is to take on average; None for as many as the histogram has columns."""
        ...

    @property
    def margins_EQ(self) -> Tensor | None:
        """[E, Q], histograms of the margins; None where the policy does not need them."""
        ...


class Policy(Section):
    """A way to balance the load of the experts: the section `balance` of the configuration.

    A subclass is one policy. It sets `policy` to a Literal of its name, whose description follows the name in error
    messages and in the reference, adds its own fields, and overrides what differs.

    Attributes:
        moves_bias: Whether the policy updates the selection bias; see `BiasPolicy`.
        has_rate: Whether `rate` and `schedule` mean something to the policy.
        needs_margins: Whether the rule reads `LayerCounts.margins_EQ`, which costs time and communication.
        bias_is_log_weight: Whether the bias is the logarithm of a weight, which logits alone can have added.
        memory: Names of the tensors [E] that the rule keeps from step to step besides the bias.
    """

    policy: str
    rate: float = Field(
        default=0.001,
        ge=0,
        description="the change of an expert's bias in one optimizer step, in units of the score (of the logit for "
        "a softmax); ignored by a policy without a rate",
    )
    schedule: Literal["constant", "linear", "quadratic"] = Field(
        default="constant",
        description="the rate over the run: constant, linear or quadratic (both fall to 0 at train.schedule_steps, "
        "linearly, or as the square of the remaining fraction of the run)",
    )
    auxiliary_loss: float = Field(
        default=0.0,
        ge=0,
        description="the coefficient of the balance loss of each MoE layer, with any policy (0: off)",
    )
    auxiliary_scope: Literal["micro_batch", "sequence", "global_batch"] = Field(
        default="global_batch",
        description="the tokens over which the balance loss takes the load: micro_batch (on each worker), sequence, "
        "or global_batch (the whole previous one, over all workers)",
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="the coefficient of the z-loss, which keeps the router's logits small (0: off)",
    )

    orthogonality_loss: float = Field(
        default=0.0,
        ge=0,
        description="the coefficient of the router's orthogonality loss, the sum of |W W^T - 1| of each MoE layer "
        "(0: off; arXiv 2506.14038)",
    )

    moves_bias: ClassVar[bool] = False
    has_rate: ClassVar[bool] = False
    needs_margins: ClassVar[bool] = False
    bias_is_log_weight: ClassVar[bool] = False
    memory: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def name(cls) -> str:
        """The value of `balance.policy` that selects this policy."""
        return str(cls.model_fields["policy"].default)

    @classmethod
    def refusal(cls, selection: str, score: str) -> Refusal | None:
        """Why the policy does not work with this selection and gate function; None where it does."""
        return None

    def violations(self, routing: RoutingValues) -> list[Violation]:
        """What is wrong with these fields in a resolved configuration, with keys such as `router.top_k`."""
        return []

    def target_shares(self, experts: int) -> tuple[float, ...] | None:
        """The share of a layer's assignments that each expert is to receive; None for equal shares."""
        return None

    @property
    def bias_in_gate_weights(self) -> bool:
        """Whether the bias changes the gate weights too, and not the selection alone."""
        return False

    @property
    def bias_multiplies_scores(self) -> bool:
        """Whether a score is multiplied by exp(bias), where the bias would be added to it otherwise."""
        return False

    def frozen_at(self, taken: int) -> bool:
        """Whether no bias is updated any more after `taken` steps that were not skipped."""
        return False

    def rate_at(self, taken: int, schedule_steps: int) -> float:
        """The rate of the update after `taken` earlier ones; 0 for a policy without a rate, and once it is frozen.

        Args:
            taken: Steps before this one that were not skipped.
            schedule_steps: Steps over which a schedule falls to 0.
        """
        if not self.has_rate or self.frozen_at(taken):
            return 0.0
        if self.schedule == "constant":
            return self.rate
        remaining = max(0.0, 1.0 - taken / schedule_steps)
        return self.rate * (remaining if self.schedule == "linear" else remaining**2)

    def next_state(self, state: RuleState, counts: LayerCounts, rate: float) -> RuleState:
        """The next state of a layer; called only where `moves_bias`.

        A pure function: equal counts give an equal state on every rank. A rule without memory overrides `next_bias`
        alone.

        Args:
            state: The current state. Its tensors are not modified.
            counts: The counts of the layer in the last optimizer step, over all ranks.
            rate: `rate_at` of the step.

        Returns:
            New tensors, with the names of `memory`.
        """
        return RuleState(self.next_bias(state.bias_E, counts, rate), {})

    def next_bias(self, bias_E: Tensor, counts: LayerCounts, rate: float) -> Tensor:
        """The next selection bias of a layer, by a rule without memory.

        A pure function: equal counts give an equal bias on every rank.

        Args:
            bias_E: [E] fp32, the current bias. It is not modified.
            counts: The counts of the layer in the last optimizer step, over all ranks.
            rate: `rate_at` of the step.

        Returns:
            [E] fp32, a new tensor.
        """
        raise NotImplementedError(f"balance.policy={self.policy} moves no bias")


class BiasPolicy(Policy):
    """A policy that updates a selection bias of each expert after each optimizer step.

    Attributes:
        center_by_default: What `center=None` means.
    """

    freeze_at: int | None = Field(
        default=None, ge=0, description="the optimizer steps after which no bias moves any more, or null (never)"
    )
    center: bool | None = Field(
        default=None,
        description="whether each layer's biases are shifted to mean 0 after an update: true, false or null (the "
        "policy's own default)",
    )

    moves_bias: ClassVar[bool] = True
    center_by_default: ClassVar[bool] = True

    @property
    def centers(self) -> bool:
        """`center`, or the policy's own default."""
        return self.center_by_default if self.center is None else self.center

    def frozen_at(self, taken: int) -> bool:
        """Whether no bias is updated any more after `taken` steps that were not skipped."""
        return self.freeze_at is not None and taken >= self.freeze_at


class SharesPolicy(BiasPolicy):
    """A bias policy whose experts may have different targets."""

    shares: list[float] | dict[str, float] | None = Field(
        default=None,
        description="the share of the assignments that each expert of a layer is to receive: a list with a number "
        "(above 0) for each expert, which sums to 1; a mapping from the ids of some experts to theirs, which leaves "
        "the rest to the others in equal parts; or null (equal shares)",
    )

    @field_validator("shares", mode="before")
    @classmethod
    def _ids_as_texts(cls, shares: Any) -> Any:
        return {str(key): value for key, value in shares.items()} if isinstance(shares, Mapping) else shares

    def violations(self, routing: RoutingValues) -> list[Violation]:
        """Refuse shares that are not one positive number per expert with sum 1, or that tokens cannot give."""
        if self.shares is None:
            return []
        rule, remedy = _wrong_shares(self.shares, routing)
        if rule:
            return [Violation("balance.shares", self.shares, rule, remedy)]
        if self.auxiliary_loss:
            rule = "evens the load, which balance.shares makes uneven"
            return [Violation("balance.auxiliary_loss", self.auxiliary_loss, rule, "set it to 0, or leave out shares")]
        return []

    def target_shares(self, experts: int) -> tuple[float, ...] | None:
        """The share of a layer's assignments that each expert is to receive; None for equal shares.

        Args:
            experts: Routed experts of a layer. `violations` has checked that the shares are for as many.
        """
        return None if self.shares is None else shares_of_all(self.shares, experts)


def _wrong_shares(shares: list[float] | dict[str, float], routing: RoutingValues) -> Refusal:
    """What is wrong with `balance.shares`; an empty rule where nothing is."""
    experts, total = routing.experts, math.fsum(shares.values() if isinstance(shares, dict) else shares)
    if isinstance(shares, list) and len(shares) != experts:
        return Refusal(f"has {counted(len(shares), 'value')} for the {counted(experts, 'expert')}", "give one for each")
    if isinstance(shares, dict) and (unknown := [key for key in shares if key not in map(str, range(experts))]):
        return Refusal(f"names {unknown[0]!r}, which is no expert", f"use ids from 0 to {experts - 1}")
    if min(shares.values() if isinstance(shares, dict) else shares, default=1.0) <= 0:
        return Refusal("has a share that is not above 0", "give each expert a share above 0")
    if len(shares) == experts and abs(total - 1) > SUM_TOLERANCE:
        return Refusal(f"has the sum {total:.6g}", "give shares with the sum 1")
    if len(shares) < experts and total >= 1:
        return Refusal(f"has the sum {total:.6g}, which leaves nothing for the other experts", "give less")
    rest = (1 - total) / max(1, experts - len(shares)) if len(shares) < experts else 0.0
    largest = max([*(shares.values() if isinstance(shares, dict) else shares), rest])
    if routing.selection != "threshold" and largest * routing.top_k >= 1 - SUM_TOLERANCE and experts > routing.top_k:
        rule = f"gives an expert {largest:.4g} of the assignments, and a token takes an expert at most once"
        return Refusal(rule, f"give less than 1 / {routing.top_k}, the share of an expert that every token takes")
    return Refusal("", "")
