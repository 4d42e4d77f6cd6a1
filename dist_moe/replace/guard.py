"""Checks of a model with distributed experts, since other code may take each rank's experts for copies of one.

Shapes: R ranks.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dist_moe.comm.mesh import Mesh
from dist_moe.errors import UserError
from dist_moe.health.replica_check import combine, digest
from dist_moe.replace.experts import local_parameters

EVERY = 64
"""Forwards between two comparisons of replicas, after those of the powers of 2."""
COMPARED = 32
"""Dense parameters that are compared, the smallest ones that are trained, such as those of norms and routers."""


class Guard:
    """A hook before the forward of a model, which compares what must differ and what must be equal on the ranks.

    Args:
        model: With the experts of this rank.
        mesh: Which rank holds which experts.
    """

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self._model, self._mesh = weakref.ref(model), mesh
        self._experts = [weakref.ref(parameter) for _, parameter in local_parameters(model)]
        self._were_equal = self._experts_are_equal(model)
        self._forwards = 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Check the first forward in training mode, and later ones ever more rarely. Collective.

        Raises:
            UserError: Ranks have the same experts, or different dense weights, or the experts were sharded again.
        """
        model = self._model()
        # The forward of a copy of the model, or one that is computed again, is of no interest.
        if module is not model or not module.training or torch._C._current_graph_task_id() != -1:
            return
        self._forwards += 1
        if self._forwards == 1:
            self._check_experts(model)
        if self._forwards & (self._forwards - 1) == 0 or self._forwards % EVERY == 0:
            self._check_replicas(model)

    def _check_experts(self, model: nn.Module) -> None:
        for (name, parameter), placed in zip(local_parameters(model), self._experts, strict=True):
            # FSDP2 has others in their place, which it gathers for the forward.
            by_fsdp = _is_sharded(model) and placed() is not parameter
            if by_fsdp or hasattr(parameter, "ds_id"):
                raise UserError(
                    f"{name} was sharded over ranks that hold different experts; give "
                    "ignored_params=set(dist_moe.expert_parameters(model)) to fully_shard"
                )
        if not self._were_equal and self._experts_are_equal(model):
            raise UserError(
                "the ranks have the same experts since the model was put into a wrapper, which has sent those of rank "
                "0 to the others; give DistributedDataParallel the model that dist_moe.parallelize returned, without "
                "another module around it"
            )

    def _experts_are_equal(self, model: nn.Module) -> bool:
        """Whether two ranks of the row hold experts with the same weights. Collective."""
        found_R = torch.zeros(self._mesh.expert_parallel, dtype=torch.int64)
        found_R[self._mesh.ep_rank] = _digest(local_parameters(model))
        summed_R = _all_reduce(found_R, dist.ReduceOp.SUM, self._mesh.ep_group, model)
        return len(set(summed_R.tolist())) < self._mesh.expert_parallel

    def _check_replicas(self, model: nn.Module) -> None:
        if _is_sharded(model):
            return  # no rank has a replica; and clip_grad_norm_ of PyTorch raises an error for such a mixture
        ours = {id(parameter) for _, parameter in local_parameters(model)}
        dense = [(name, each) for name, each in model.named_parameters() if id(each) not in ours and each.requires_grad]
        smallest = sorted(dense, key=lambda pair: pair[1].numel())[:COMPARED]
        value = _digest(smallest) >> 1  # its negative is an int64, too
        largest, least = _all_reduce(torch.tensor([value, -value]), dist.ReduceOp.MAX, None, model).tolist()
        if largest != -least:
            raise UserError(
                f"the dense weights of the ranks differ, as {smallest[0][0]} may: the gradients were clipped by the "
                "norm of each rank's own experts (use dist_moe.clip_grad_norm_, and max_grad_norm=0 in a Trainer), "
                "a GradScaler skipped a step on some ranks, or they were not averaged (use DistributedDataParallel)"
            )


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> int:
    # NumPy makes the storage of a tensor one that FSDP2 cannot free.
    return combine({name: digest(tensor.detach().clone()) for name, tensor in tensors})


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _all_reduce(values: Tensor, operation: Any, group: dist.ProcessGroup | None, model: nn.Module) -> Tensor:
    moved = values
    if dist.get_backend(group) == "nccl":
        own = next(model.parameters()).device
        moved = values.to(own if own.type == "cuda" else "cuda")
    dist.all_reduce(moved, operation, group=group)
    return moved
