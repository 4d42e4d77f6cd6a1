"""Dispatch in two hops: a token's row goes to each host that holds experts of it once, and from there to its experts.

With N hosts of G ranks each, in an expert-parallel row:
1. A rank sends a token's row to the rank with its own place on each host where the token has experts, with the numbers
   and mixture weights of those experts, in one message to each host.
2. That rank is the token's home on its host: it dispatches within the host, and sums the results by mixture weight.
3. One row goes back for each that came, and the token's rank adds them up, at most one of each host.

In one hop a token sends K rows, here at most min(K, N), and only within hosts K. Shapes: T tokens, D width, K slots a
token, N hosts, R rows sent, F assignments sent, Q rows received, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_moe.comm.exchange import exchange_rows
from dist_moe.comm.mesh import Mesh, NodeGroups
from dist_moe.comm.packed import exchange_packed
from dist_moe.moe.dispatch import sum_rows, take_rows

# hidden_QD, ids_QK among the experts of a host, weights_QK -> mixed_QD
OnHost = Callable[[Tensor, Tensor, Tensor, Mesh], Tensor]


def hierarchical_dispatch_combine(
    hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: int, nodes: NodeGroups, on_host: OnHost
) -> Tensor:
    """Route the tokens of this rank through experts on all hosts -> mixed_TD; a token without experts gets 0.

    on_host: what mixes the tokens that a host was sent by the experts that it holds, over the ranks of `nodes.intra`.
    """
    hosts = nodes.inter.expert_parallel
    group = nodes.inter.ep_group
    assert group is not None
    of_host = experts // hosts
    host_TK = torch.where(ids_TK >= 0, ids_TK // of_host, -1)
    taken_TNK = host_TK.unsqueeze(1) == torch.arange(hosts, device=ids_TK.device).view(1, -1, 1)
    # Rows ordered by host, then by token; slot = token * N + host.
    host_R, token_R = taken_TNK.any(dim=2).t().nonzero(as_tuple=True)
    taken_RK = taken_TNK[token_R, host_R]
    counts_R = taken_RK.sum(dim=1)
    taken_N = torch.zeros(hosts, dtype=torch.int64, device=ids_TK.device).index_add_(0, host_R, counts_R)
    send_rows, send_taken = torch.stack([torch.bincount(host_R, minlength=hosts), taken_N]).tolist()
    slots_R = token_R * hosts + host_R
    (arrived_QD, counts_Q, ids_F, weights_F), (rows, *_) = exchange_packed(
        [
            take_rows(hidden_TD, slots_R, hosts),
            counts_R.int(),
            (ids_TK % of_host)[token_R][taken_RK].int(),
            weights_TK[token_R][taken_RK],
        ],
        [send_rows, send_rows, send_taken, send_taken],
        group,
    )
    ids_QK, weights_QK = _as_slots(counts_Q.long(), ids_F.long(), weights_F)
    mixed_QD = on_host(arrived_QD, ids_QK, weights_QK, nodes.intra)
    return sum_rows(exchange_rows(mixed_QD, rows, send_rows, group), slots_R, hidden_TD.shape[0], hosts)


def _as_slots(counts_Q: Tensor, ids_F: Tensor, weights_F: Tensor) -> tuple[Tensor, Tensor]:
    """Consecutive assignments, counts_Q[q] of row q, as ids_QK (-1: an empty slot) and weights_QK."""
    most = int(counts_Q.max()) if counts_Q.numel() else 0
    filled_QK = torch.arange(most, device=counts_Q.device) < counts_Q.unsqueeze(1)
    ids_QK = torch.full(filled_QK.shape, -1, dtype=ids_F.dtype, device=ids_F.device)
    ids_QK[filled_QK] = ids_F
    return ids_QK, weights_F.new_zeros(filled_QK.shape).masked_scatter(filled_QK, weights_F)
