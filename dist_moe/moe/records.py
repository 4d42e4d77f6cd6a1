"""The records that the stages of an MoE layer pass on.

Shapes: T tokens, E experts, K experts a token takes, R rows (assignments) sent, Q rows received, e local experts.
"""

from typing import NamedTuple

from torch import Tensor

from dist_moe.moe.row_order import Placement, TokenRows


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
        weights_TK: As in `Routing`, with the graph.
    """

    logits_TE: Tensor
    ids_TK: Tensor
    mask_T: Tensor | None
    weights_TK: Tensor

    def at(self, place_T: Tensor, mask_T: Tensor | None) -> "RouterRecord":
        """Return the record of the tokens at these places.

        Args:
            place_T: int64.
            mask_T: Of them.
        """
        return RouterRecord(self.logits_TE[place_T], self.ids_TK[place_T], mask_T, self.weights_TK[place_T])

    def detached(self) -> "RouterRecord":
        """Return the record without the graph."""
        return self._replace(logits_TE=self.logits_TE.detach(), weights_TK=self.weights_TK.detach())


class Exchanged(NamedTuple):
    """How rows were exchanged.

    Attributes:
        placement: How the received rows were placed by expert.
        send: Rows sent to each rank of the expert-parallel group.
        receive: Rows received from each rank.
    """

    placement: Placement
    send: list[int]
    receive: list[int]


class DispatchHandle(NamedTuple):
    """What `combine` needs to return rows to their tokens.

    Attributes:
        rows: The rows of this rank's tokens, as they were sent, or placed if nothing was exchanged.
        exchanged: None if nothing was exchanged.
    """

    rows: TokenRows
    exchanged: Exchanged | None


class Dispatched(NamedTuple):
    """Rows on the rank of their experts.

    Attributes:
        rows_QD: Sorted by local expert. Where each expert's are padded, and after the last one's, there may be rows of
            any content, whose results nothing reads.
        weights_Q: The gate weight of each row, 0 for padding.
        ends_e: int32 on the device, the index after each local expert's last row.
        handle: For `combine`.
    """

    rows_QD: Tensor
    weights_Q: Tensor
    ends_e: Tensor
    handle: DispatchHandle
