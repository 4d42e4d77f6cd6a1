"""An MoE layer with experts on several hosts: the all-to-all in one hop (flat) compared with two (hierarchical).

Both use the layer of a training run, forward and backward, on the same ranks with the same tokens, experts and weights.
Routing is uniform: every token takes K different random experts.

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
from dist_moe.comm.mesh import Mesh, MeshError, consecutive_ranks_per_host, hosts_of_ranks, make_mesh
from dist_moe.errors import needs_folder
from dist_moe.files import try_file, write_atomically
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.study.tables import terminal_table
from dist_moe.worker.rank_info import rank_info_from_env

TOKENS = (16, 128, 1024)
EXPERTS_PER_RANK = 16
EXPERT_WIDTH = 16
"""Small, so that the exchange dominates the time."""
WARM_UP = 2
TIMEOUT_S = 120.0
FLAT, HIERARCHICAL = "flat", "hierarchical"


@dataclass(frozen=True)
class Size:
    """What every rank routes: `tokens` rows of `width` fp32 values, each to `top_k` experts."""

    tokens: int
    top_k: int
    width: int


@dataclass(frozen=True)
class HopTiming:
    """The measurements of one size. Both dictionaries are by the name of the exchange.

    Attributes:
        size: What every rank routes.
        times_s: Median time of a forward and backward pass on the slowest rank.
        inter_host_bytes: Rows and gradients that all ranks together send to other hosts in one pass; counts, indices
            and gate weights are not included.
        difference: Largest difference between the outputs and gradients of both, relative to the largest value of each
            tensor.
    """

    size: Size
    times_s: dict[str, float]
    inter_host_bytes: dict[str, int]
    difference: float

    @property
    def ratio(self) -> float:
        """How many times longer the flat exchange takes."""
        return self.times_s[FLAT] / self.times_s[HIERARCHICAL]


def run(sizes: Sequence[Size], repetitions: int, out: Path | None) -> list[Table]:
    """Join the job that a launcher started, and measure.

    Args:
        sizes: To measure.
        repetitions: Of each size.
        out: File for the results as JSON; None for none.

    Returns:
        The table on rank 0, nothing on the others.

    Raises:
        RankInfoError: The launcher's environment is incomplete.
        MeshError: The ranks are not on several hosts, with equally many on each.
        RunFolderError: `out` cannot be written.
    """
    rank_info = rank_info_from_env(os.environ)
    if out is not None and rank_info.rank == 0:
        # Before minutes of measurements, and again when it is written.
        with needs_folder(out, "--out", "file"):
            out.parent.mkdir(parents=True, exist_ok=True)
        try_file(out, "--out")
    set_threads(1, rank_info)
    with init_distributed(rank_info, "auto", TIMEOUT_S) as dist_context:
        mesh = make_mesh(rank_info.world_size, _ranks_per_host(rank_info.world_size))
        timings = measure(mesh, sizes, repetitions, dist_context.device)
    if rank_info.rank != 0:
        return []
    if out is not None:
        records = [asdict(timing) | {"ratio": timing.ratio} for timing in timings]
        with needs_folder(out, "--out", "file"):
            write_atomically(out, json.dumps(records, indent=1) + "\n")
    experts = EXPERTS_PER_RANK * rank_info.world_size
    ranks = f"{rank_info.world_size} ranks on several hosts by {dist_context.backend}"
    return [terminal_table(f"{ranks}, {experts} experts, medians of {repetitions}", HEADINGS, rows(timings))]


def _ranks_per_host(world_size: int) -> int:
    """Return the number of ranks on each host; a collective call.

    Raises:
        MeshError: The ranks are not on several hosts, with the same number on each.
    """
    hosts = hosts_of_ranks()
    block = consecutive_ranks_per_host(hosts, world_size)
    if block == 0:
        raise MeshError(
            f"`dist-moe study hops` measures between hosts, and needs several with the same number of ranks on each; "
            f"its {world_size} ranks are on {', '.join(hosts)}: start it on several hosts, for example by `torchrun "
            "--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST0:29500 -m dist_moe study hops` on "
            "each"
        )
    return block


def measure(mesh: Mesh, sizes: Sequence[Size], repetitions: int, device: torch.device) -> list[HopTiming]:
    """Measure every size on one expert-parallel group over several hosts. A collective call with equal results."""
    return [_measure_size(mesh, size, repetitions, device) for size in sizes]


def _measure_size(mesh: Mesh, size: Size, repetitions: int, device: torch.device) -> HopTiming:
    meshes = {FLAT: replace(mesh, node_groups=None), HIERARCHICAL: mesh}
    torch.manual_seed(mesh.rank)
    local = GroupedExperts(EXPERTS_PER_RANK, size.width, EXPERT_WIDTH, F.silu).to(device)
    for parameter in local.parameters():
        torch.nn.init.normal_(parameter, std=size.width**-0.5)
    experts = EXPERTS_PER_RANK * mesh.expert_parallel
    ids_TK = torch.rand(size.tokens, experts).topk(size.top_k).indices.to(device)
    hidden_TD = torch.randn(size.tokens, size.width, device=device)
    weights_TK = torch.rand(size.tokens, size.top_k, device=device)
    times_s: dict[str, list[float]] = {name: [] for name in meshes}
    results: dict[str, list[Tensor]] = {}
    order = list(meshes)
    for repetition in range(-WARM_UP, repetitions):
        order.reverse()
        for name in order:
            layer = ExpertParallelLayer(local, experts, meshes[name])
            _synchronize(device)
            dist.barrier()
            began_s = time.perf_counter()
            results[name] = _forward_backward(layer, hidden_TD, ids_TK, weights_TK)
            _synchronize(device)
            if repetition >= 0:
                times_s[name].append(time.perf_counter() - began_s)
    slowest = torch.tensor(
        [median(of_exchange) for of_exchange in times_s.values()], dtype=torch.float64, device=device
    )
    difference = torch.tensor(_difference(results), dtype=torch.float64, device=device)
    for tensor in (slowest, difference):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    inter_host = dict(zip(meshes, _inter_host_bytes(mesh, ids_TK, size), strict=True))
    return HopTiming(size, dict(zip(meshes, slowest.tolist(), strict=True)), inter_host, float(difference))


def _forward_backward(
    layer: ExpertParallelLayer, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> list[Tensor]:
    """Return the output of the forward pass and the gradients of the backward pass."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden_TD, weights_TK)]
    mixed_TD = layer(leaves[0], ids_TK, leaves[1])
    return [mixed_TD.detach(), *torch.autograd.grad(mixed_TD.square().mean(), [*leaves, *layer.parameters()])]


def _difference(results: dict[str, list[Tensor]]) -> float:
    pairs = zip(results[FLAT], results[HIERARCHICAL], strict=True)
    return max(float((flat - hierarchical).abs().max() / flat.abs().max()) for flat, hierarchical in pairs)


def _inter_host_bytes(mesh: Mesh, ids_TK: Tensor, size: Size) -> list[int]:
    """Sum over all ranks, flat and hierarchical: dispatched rows, combined rows, and the gradients of both."""
    assert mesh.node_groups is not None
    hosts, own_host = mesh.node_groups.inter.expert_parallel, mesh.node_groups.inter.ep_rank
    host_TK = ids_TK // (EXPERTS_PER_RANK * mesh.expert_parallel // hosts)
    chosen_NTK = torch.stack([host_TK == host for host in range(hosts) if host != own_host])
    crossing = torch.stack([chosen_NTK.sum(), chosen_NTK.any(dim=2).sum()])
    dist.all_reduce(crossing)
    return [int(count) * size.width * 4 * torch.float32.itemsize for count in crossing]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


HEADINGS = (
    "tokens per rank",
    "width",
    "top-k",
    "flat, ms",
    "hierarchical, ms",
    "ratio",
    "flat, MB",
    "hierarchical, MB",
)


def rows(timings: Sequence[HopTiming]) -> list[list[str]]:
    """Build one row per size, with the columns of `HEADINGS`."""
    return [
        [
            *(f"{number:,}" for number in (timing.size.tokens, timing.size.width, timing.size.top_k)),
            *(f"{timing.times_s[name] * 1e3:,.1f}" for name in (FLAT, HIERARCHICAL)),
            f"{timing.ratio:.2f}",
            *(f"{timing.inter_host_bytes[name] / 1e6:,.2f}" for name in (FLAT, HIERARCHICAL)),
        ]
        for timing in timings
    ]
