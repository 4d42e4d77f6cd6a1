"""One MoE layer on real ranks against its slow twin: the work of a rank, and the comparison."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dist_moe.comm.mesh import make_mesh
from dist_moe.moe import dispatch, experts, select
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.kernels import ANY_DEVICE, CPU, TILE_ROWS, Kernels
from dist_moe.moe.layer import ExpertParallelLayer
from tests.dist.pool import RankPool
from tests.host_reads import HostReads
from tests.twin import LayerCase, Pass, slow_pass

PADDED = dataclasses.replace(CPU, tile_rows=TILE_ROWS)
"""On any CPU what is used where it multiplies bf16."""
BF16_TOLERANCE = 0.03
"""Of the norm of a row; without cancellation (`LayerCase`) the largest error of 4,000 tokens is half of it."""


def fast_passes(rank: int, world_size: int, cases: Sequence[LayerCase], fill_with_nan: bool = False) -> list[Pass]:
    """A forward and backward for each case. fill_with_nan: uninitialized memory holds NaN."""
    torch.use_deterministic_algorithms(fill_with_nan)
    return [fast_pass(rank, case) for case in cases]


def fast_pass(rank: int, case: LayerCase, reads: HostReads | None = None) -> Pass:
    """One forward and backward of the layer as one rank of the joined world, which `reads` watches."""
    mesh = make_mesh(case.expert_parallel, case.ranks_per_node, shared_memory=case.shared_memory)
    held = mesh.local_experts(case.experts)
    local = GroupedExperts(len(held), case.width, case.expert_width, F.silu).to(case.dtype)
    with torch.no_grad():
        for parameter, values_E in zip(local.parameters(), case.draw_experts(), strict=True):
            parameter.copy_(values_E[held.start : held.stop])
    hidden_TD, ids_TK, weights_TK, probe_TD = case.draw(rank)
    hidden_TD.requires_grad_()
    weights_TK.requires_grad_()
    with on(ANY_DEVICE if case.on_device else PADDED), reads or contextlib.nullcontext():
        mixed_TD = ExpertParallelLayer(local, case.experts, mesh)(hidden_TD, ids_TK, weights_TK)
        (mixed_TD * probe_TD).sum().backward()
    gradients = [leaf.grad for leaf in (hidden_TD, weights_TK, local.gate_up_proj, local.down_proj)]
    assert all(gradient is not None for gradient in gradients), "each leaf gets a gradient, if only of zeros"
    return Pass(mixed_TD.detach(), gradients[0], gradients[1], held, gradients[2], gradients[3])  # type: ignore


@contextlib.contextmanager
def on(kernels: Kernels) -> Iterator[None]:
    """Compute with the implementations of another device in the block."""
    with contextlib.ExitStack() as stack:
        for module in (dispatch, experts, select):
            stack.enter_context(mock.patch.object(module, "kernels_for", lambda *_: kernels))
        yield


def host_reads(rank: int, world_size: int, case: LayerCase) -> list[str]:
    """What the host asks a device for in one forward and backward."""
    reads = HostReads()
    fast_pass(rank, case, reads)
    return reads.names


def bytes_between_hosts(rank: int, world_size: int, case: LayerCase) -> int:
    """What this rank sends to ranks of the other host, of two hosts of two ranks, in a forward and backward."""
    sent = 0
    whole = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, receive: Any = None, send: Any = None, **options: Any) -> Any:
        nonlocal sent
        members = dist.get_process_group_ranks(options["group"])
        rows = send or [len(given) // len(members)] * len(members)
        row_bytes = given.element_size() * math.prod(given.shape[1:])
        sent += sum(count * row_bytes for count, one in zip(rows, members, strict=True) if one // 2 != rank // 2)
        return whole(output, given, receive, send, **options)

    with mock.patch.object(dist, "all_to_all_single", counting):
        fast_pass(rank, case)
    return sent


def check_against_twin(ranks: RankPool, cases: Sequence[LayerCase], fill_with_nan: bool = False) -> None:
    """Run `cases`, all for as many ranks, and hold the results and every gradient against the twin's."""
    workers = len(cases[0].tokens)
    passes_of_rank = ranks.run(fast_passes, workers, cases, fill_with_nan, timeout_s=60)
    for case, passes in zip(cases, zip(*passes_of_rank, strict=True), strict=True):
        for first in range(0, workers, case.expert_parallel):
            members = range(first, first + case.expert_parallel)
            _check_row(case, members, [passes[rank] for rank in members])


def _check_row(case: LayerCase, members: Sequence[int], passes: Sequence[Pass]) -> None:
    """The ranks of one row of the mesh: they see each other's tokens and hold each expert once."""
    twin = slow_pass(case, members)
    first = 0
    for rank, found in zip(members, passes, strict=True):
        mine = slice(first, first + case.tokens[rank])
        held = slice(found.held.start, found.held.stop)
        wanted = dataclasses.replace(
            twin,
            mixed_TD=twin.mixed_TD[mine],
            hidden_gradient_TD=twin.hidden_gradient_TD[mine],
            weights_gradient_TK=twin.weights_gradient_TK[mine],
            gate_up_gradient=twin.gate_up_gradient[held],
            down_gradient=twin.down_gradient[held],
        )
        assert_close(found, wanted, case.dtype)
        first = mine.stop


def assert_close(found: Pass, wanted: Pass, dtype: torch.dtype) -> None:
    """Every tensor of a pass, to the rounding of the dtype; in bf16 each row by its norm."""
    for field in dataclasses.fields(Pass):
        ours, twins = getattr(found, field.name), getattr(wanted, field.name)
        if not isinstance(ours, torch.Tensor):
            continue
        if dtype == torch.bfloat16:
            assert ours.shape == twins.shape and ours.dtype == dtype, field.name
            norm = twins.norm(dim=-1)
            mean = norm.sum() / norm.count_nonzero().clamp_min(1)
            difference = (ours.to(twins.dtype) - twins).norm(dim=-1)
            assert (difference <= BF16_TOLERANCE * (norm + 0.01 * mean)).all(), field.name
        else:
            tolerance = 1e-12 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(
                ours, twins, rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, field.name)
            )
