"""The records that the stages of an MoE layer pass on.

Shapes: T tokens, E experts, K experts a token takes, R rows (assignments) sent, Q rows received, e local experts.
"""

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token takes, and with which weights.

    Attributes:
        ids_TK: int64, the experts of each token; -1 in every column of a token that is not routed (padding).
        weights_TK: The gate weights, in the scores' dtype; only they carry gradient to the router.
    """

    ids_TK: Tensor
    weights_TK: Tensor


class RouterRecord(NamedTuple):
    """The routing of one forward of a router, for the losses and the balancer.

    Attributes:
        logits_TE: fp32 or wider, with the graph.
        ids_TK: As in `Routing`.
        mask_T: bool, false for padding; None means no padding.
    """

    logits_TE: Tensor
    ids_TK: Tensor
    mask_T: Tensor | None


class DispatchHandle(NamedTuple):
    """What `combine` needs to return rows to their tokens.

    Attributes:
        slots_R: int64, index of each sent row among the flattened [T * K] slots.
        expert_order_Q: int64, the permutation that sorted the received rows by expert; None if nothing was exchanged.
        send: Rows sent to each rank of the expert-parallel group; empty if nothing was exchanged.
        receive: Rows received from each rank.
    """

    slots_R: Tensor
    expert_order_Q: Tensor | None
    send: list[int]
    receive: list[int]


class Dispatched(NamedTuple):
    """Rows on the rank of their experts.

    Attributes:
        rows_QD: Sorted by local expert.
        counts_e: int64 on the CPU, rows of each local expert.
        handle: For `combine`.
    """

    rows_QD: Tensor
    counts_e: Tensor
    handle: DispatchHandle
