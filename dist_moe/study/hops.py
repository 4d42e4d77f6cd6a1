"""An MoE layer whose experts lie on several hosts: its exchange in one hop (flat) and in two (hierarchical), in turns.

Both are the layer of a training run, forward and backward, over the same ranks with the same tokens, experts and
weights. Routing is uniform: every token takes K different experts, drawn by chance.

Shapes: T tokens, D width, K experts a token, E experts, F expert width.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from dist_moe.comm.init import init_distributed, set_threads
from dist_moe.comm.mesh import Mesh, make_mesh, ranks_per_node
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.study.table import fitted_table
from dist_moe.worker.rank_info import rank_info_from_env

TOKENS = (16, 128, 1024)
EXPERTS_OF_RANK = 16
EXPERT_WIDTH = 16
"""Small, so that the time is that of the exchange."""
WARM_UP = 2
TIMEOUT_S = 120.0
FLAT, HIERARCHICAL = "flat", "hierarchical"


@dataclass(frozen=True)
class Size:
    """What every rank routes: so many tokens of `width` fp32 numbers, each to `top_k` experts."""

    tokens: int
    top_k: int
    width: int


@dataclass(frozen=True)
class Hops:
    """One size, measured: both dictionaries by the name of the exchange.

    times_s: the median of a forward and backward, on the slowest rank. between_bytes: what all ranks together send to
    ranks of other hosts in it, rows and their gradients without the counts, numbers and weights that go along.
    difference: the greatest between the outputs and gradients of both, relative to the greatest value of each tensor.
    """

    size: Size
    times_s: dict[str, float]
    between_bytes: dict[str, int]
    difference: float

    @property
    def ratio(self) -> float:
        """How many times longer the flat one takes."""
        return self.times_s[FLAT] / self.times_s[HIERARCHICAL]


def run(sizes: Sequence[Size], repetitions: int, out: Path | None) -> list[Table]:
    """Join the job that a launcher started, and measure -> the table on rank 0, none elsewhere.

    out: a file for the same as JSON. Errors: PlaceError; MeshError where the ranks do not lie on several hosts, as many
    on each.
    """
    rank_info = rank_info_from_env(os.environ)
    set_threads(1, rank_info)
    with init_distributed(rank_info, "auto", TIMEOUT_S) as dist_context:
        mesh = make_mesh(rank_info.world_size, ranks_per_node(HIERARCHICAL, rank_info.world_size))
        found = measure(mesh, sizes, repetitions, dist_context.device)
    if rank_info.rank != 0:
        return []
    if out is not None:
        out.write_text(json.dumps([asdict(one) | {"ratio": one.ratio} for one in found], indent=1) + "\n")
    experts = EXPERTS_OF_RANK * rank_info.world_size
    title = f"{rank_info.world_size} ranks of several hosts by {dist_context.backend}, {experts} experts, medians of {repetitions}"
    return [fitted_table(title, HEADINGS, rows(found))]


def measure(mesh: Mesh, sizes: Sequence[Size], repetitions: int, device: torch.device) -> list[Hops]:
    """Every size on a mesh of one row over several hosts; the same on every rank."""
    return [_measure_size(mesh, size, repetitions, device) for size in sizes]


def _measure_size(mesh: Mesh, size: Size, repetitions: int, device: torch.device) -> Hops:
    meshes = {FLAT: replace(mesh, nodes=None), HIERARCHICAL: mesh}
    torch.manual_seed(mesh.rank)
    local = GroupedExperts(EXPERTS_OF_RANK, size.width, EXPERT_WIDTH, F.silu).to(device)
    for parameter in local.parameters():
        torch.nn.init.normal_(parameter, std=size.width**-0.5)
    experts = EXPERTS_OF_RANK * mesh.expert_parallel
    ids_TK = torch.rand(size.tokens, experts).topk(size.top_k).indices.to(device)
    hidden_TD = torch.randn(size.tokens, size.width, device=device)
    weights_TK = torch.rand(size.tokens, size.top_k, device=device)
    taken_s: dict[str, list[float]] = {name: [] for name in meshes}
    results: dict[str, list[Tensor]] = {}
    order = list(meshes)
    for repetition in range(-WARM_UP, repetitions):
        order.reverse()
        for name in order:
            layer = ExpertParallelLayer(local, experts, meshes[name])
            _wait(device)
            dist.barrier()
            began_s = time.perf_counter()
            results[name] = _pass(layer, hidden_TD, ids_TK, weights_TK)
            _wait(device)
            if repetition >= 0:
                taken_s[name].append(time.perf_counter() - began_s)
    slowest = torch.tensor([median(one) for one in taken_s.values()], dtype=torch.float64, device=device)
    difference = torch.tensor(_difference(results), dtype=torch.float64, device=device)
    for tensor in (slowest, difference):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    between = dict(zip(meshes, _bytes_between_hosts(mesh, ids_TK, size), strict=True))
    return Hops(size, dict(zip(meshes, slowest.tolist(), strict=True)), between, float(difference))


def _pass(layer: ExpertParallelLayer, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
    """The output of a forward, and the gradients that its backward gives."""
    leaves = [one.detach().requires_grad_() for one in (hidden_TD, weights_TK)]
    mixed_TD = layer(leaves[0], ids_TK, leaves[1])
    return [mixed_TD.detach(), *torch.autograd.grad(mixed_TD.square().mean(), [*leaves, *layer.parameters()])]


def _difference(results: dict[str, list[Tensor]]) -> float:
    pairs = zip(results[FLAT], results[HIERARCHICAL], strict=True)
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)


def _bytes_between_hosts(mesh: Mesh, ids_TK: Tensor, size: Size) -> list[int]:
    """Of all ranks, flat and hierarchical: rows there, results back, and the gradients of both."""
    assert mesh.nodes is not None
    hosts, mine = mesh.nodes.inter.expert_parallel, mesh.nodes.inter.ep_rank
    host_TK = ids_TK // (EXPERTS_OF_RANK * mesh.expert_parallel // hosts)
    taken_NTK = torch.stack([host_TK == host for host in range(hosts) if host != mine])
    crossing = torch.stack([taken_NTK.sum(), taken_NTK.any(dim=2).sum()])
    dist.all_reduce(crossing)
    return [int(count) * size.width * 4 * torch.float32.itemsize for count in crossing]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


HEADINGS = ("tokens a rank", "width", "top-k", "flat, ms", "hierarchical, ms", "ratio", "flat, MB", "hierarchical, MB")


def rows(found: Sequence[Hops]) -> list[list[str]]:
    """One row for each size, as `HEADINGS` says."""
    return [
        [
            *(f"{number:,}" for number in (one.size.tokens, one.size.width, one.size.top_k)),
            *(f"{one.times_s[name] * 1e3:,.1f}" for name in (FLAT, HIERARCHICAL)),
            f"{one.ratio:.2f}",
            *(f"{one.between_bytes[name] / 1e6:,.2f}" for name in (FLAT, HIERARCHICAL)),
        ]
        for one in found
    ]
