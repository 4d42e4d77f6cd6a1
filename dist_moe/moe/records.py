"""The records that travel between the stages of an MoE layer.

Shapes: T tokens, E experts, K experts a token takes, R rows (assignments) sent, Q rows received, e local experts.
"""

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token takes, and with which weights.

    ids_TK: int64, the experts of each token, -1 in every column of a token that is not routed (padding).
    weights_TK: the mixture weights, in the scores' dtype; only they carry gradient to the router.
    """

    ids_TK: Tensor
    weights_TK: Tensor


class RouterRecord(NamedTuple):
    """What one forward of a router leaves behind, for the losses and the balancer.

    logits_TE: fp32 or wider, with the graph. ids_TK: as in Routing. mask_T: bool, the tokens that exist; None
    means all.
    """

    logits_TE: Tensor
    ids_TK: Tensor
    mask_T: Tensor | None


class DispatchHandle(NamedTuple):
    """What `combine` needs to bring rows back to their tokens.

    slots_R: int64, place of each sent row in the flattened [T * K] slots.
    expert_order_Q: int64, the permutation that sorted the received rows by expert; None where nothing was exchanged.
    send, receive: rows per rank of the expert-parallel group, both ways; empty where nothing was exchanged.
    """

    slots_R: Tensor
    expert_order_Q: Tensor | None
    send: list[int]
    receive: list[int]


class Dispatched(NamedTuple):
    """Rows at their experts: rows_QD sorted by local expert, counts_e (int64, on the CPU) rows of each."""

    rows_QD: Tensor
    counts_e: Tensor
    handle: DispatchHandle
