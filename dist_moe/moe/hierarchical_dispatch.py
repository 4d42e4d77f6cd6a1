"""Dispatch in two hops: a token's row is sent once to each host with experts of the token, and from there to them.

With N hosts of G ranks each in an expert-parallel group:
1. A rank sends a token's row to the rank with its own local rank on each host where the token has experts, with the
   ids and gate weights of those experts, in one message per host.
2. That rank dispatches the row within its host, and sums the results by gate weight.
3. One row is returned for each that was sent, and the token's rank adds them up, at most one per host.

Between hosts a token sends at most min(K, N) rows, where flat dispatch sends K. Shapes: T tokens, D width, K slots a
token, N hosts, R rows sent, F assignments sent, Q rows received, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_moe.comm.exchange import exchange_rows
from dist_moe.comm.mesh import Mesh, NodeGroups
from dist_moe.comm.packed import exchange_packed
from dist_moe.config.sections.model import KernelsName
from dist_moe.moe.dispatch import sum_rows, take_rows
from dist_moe.moe.gather_sum import EMPTY
from dist_moe.moe.row_order import TokenRows

# (hidden_QD, ids_QK among the experts of a host, weights_QK, the mesh of the host) -> mixed_QD
ApplyExperts = Callable[[Tensor, Tensor, Tensor, Mesh], Tensor]


def hierarchical_dispatch_combine(
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: int,
    nodes: NodeGroups,
    apply_experts: ApplyExperts,
    kernels: KernelsName = "auto",
) -> Tensor:
    """Apply experts on all hosts to the tokens of this rank. Collective over the groups of `nodes`.

    Args:
        hidden_TD: The tokens of this rank.
        ids_TK: int64 in [-1, experts); -1 is an empty slot.
        weights_TK: Gate weights.
        experts: E, over all hosts.
        nodes: The groups between hosts and within one.
        apply_experts: Applies the experts of one host to the rows it received, over the ranks of `nodes.intra`.
        kernels: The implementations on a GPU, as `model.moe_kernels` names them.

    Returns:
        [T, D], zeros for a token without experts.
    """
    hosts = nodes.inter.expert_parallel
    group = nodes.inter.ep_group
    assert group is not None
    experts_of_host = experts // hosts
    host_TK = torch.where(ids_TK >= 0, ids_TK // experts_of_host, -1)
    taken_TNK = host_TK.unsqueeze(1) == torch.arange(hosts, device=ids_TK.device).view(1, -1, 1)
    # Rows ordered by host, then by token; a token has a slot for each host.
    host_R, token_R = taken_TNK.any(dim=2).t().nonzero(as_tuple=True)
    taken_RK = taken_TNK[token_R, host_R]
    counts_R = taken_RK.sum(dim=1)
    taken_N = torch.zeros(hosts, dtype=torch.int64, device=ids_TK.device).index_add_(0, host_R, counts_R)
    send_rows, send_taken = torch.stack([torch.bincount(host_R, minlength=hosts), taken_N]).tolist()
    row_TN = torch.full((len(hidden_TD), hosts), EMPTY, device=ids_TK.device)
    row_TN[token_R, host_R] = torch.arange(len(token_R), device=ids_TK.device)
    sent = TokenRows(token_R * hosts + host_R, token_R, row_TN)
    (arrived_QD, counts_Q, ids_F, weights_F), (rows, *_) = exchange_packed(
        [
            take_rows(hidden_TD, sent, kernels),
            counts_R.int(),
            (ids_TK % experts_of_host)[token_R][taken_RK].int(),
            weights_TK[token_R][taken_RK],
        ],
        [send_rows, send_rows, send_taken, send_taken],
        group,
    )
    ids_QK, weights_QK = _as_slots(counts_Q.long(), ids_F.long(), weights_F)
    mixed_QD = apply_experts(arrived_QD, ids_QK, weights_QK, nodes.intra)
    (returned_RD,) = exchange_rows([mixed_QD], rows, send_rows, group)
    return sum_rows(returned_RD, sent, kernels)


def _as_slots(counts_Q: Tensor, ids_F: Tensor, weights_F: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack consecutive assignments, counts_Q[q] of row q, to ids_QK (-1: an empty slot) and weights_QK."""
    max_slots = int(counts_Q.max()) if counts_Q.numel() else 0
    filled_QK = torch.arange(max_slots, device=counts_Q.device) < counts_Q.unsqueeze(1)
    ids_QK = torch.full(filled_QK.shape, -1, dtype=ids_F.dtype, device=ids_F.device)
    ids_QK[filled_QK] = ids_F
    return ids_QK, weights_F.new_zeros(filled_QK.shape).masked_scatter(filled_QK, weights_F)
