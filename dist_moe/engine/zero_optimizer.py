"""DeepSpeed's optimizer of ZeRO 1 and 2, without most of its passes over the gradients.

Between backward and the optimizer, DeepSpeed 0.19.8 reads or writes each gradient about ten times: it copies it into a
bucket, divides, flattens, copies back and copies again, also in a process group of one rank; looks for values that are
not finite; copies it to fp64 for the norm; flattens it again, copies it to fp32, and multiplies it by a factor that
mostly is 1. The methods here give the same results to rounding. tests/dist/test_zero_optimizer.py compares the two, and
fails where a method of DeepSpeed that is replaced here, or one that calls it, has changed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, nn

from dist_moe.engine.flat_gradients import FlatGradients, FlatGroup, sum_of_squares

REDUCTION_KEYS = ("reduce_bucket_size", "use_multi_rank_bucket_allreduce")
"""Keys of zero_optimization that say how DeepSpeed reduces gradients; where the user sets one, its methods do so."""


class ZeroOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer with other methods; made by `ZeroOptimizer.replace`, not by a constructor."""

    _gradients: FlatGradients | None

    @classmethod
    def replace(cls, optimizer: DeepSpeedZeroOptimizer, zero_keys: Sequence[str]) -> None:
        """Make an optimizer one of this class.

        Args:
            optimizer: DeepSpeed's optimizer, before the first step.
            zero_keys: The keys of zero_optimization that the user set.
        """
        # DeepSpeed has no parameter for the class. Its hooks call the methods by name, so that they find those below.
        optimizer.__class__ = cls
        optimizer._gradients = None
        if not optimizer.partition_gradients and not set(REDUCTION_KEYS) & set(zero_keys):
            groups = [
                FlatGroup(parameters, flat.numel(), process_group)
                for parameters, flat, process_group in zip(
                    optimizer.round_robin_bit16_groups,
                    optimizer.bit16_groups_flat,
                    optimizer.real_dp_process_group,
                    strict=True,
                )
            ]
            divisor = dist.get_world_size(optimizer.dp_process_group)
            optimizer._gradients = FlatGradients(groups, divisor, optimizer.communication_data_type)

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """Take the gradient of a parameter; called when it is complete."""
        if self._gradients is None:
            super().process_gradients(param, i)
        else:
            self._gradients.add(param)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the gradients over the ranks at ZeRO 1; called after the last backward of a step."""
        if self._gradients is None:
            super().reduce_gradients(pipeline_parallel)
        else:
            for i, partition in enumerate(self._gradients.reduce()):
                self.averaged_gradients[i] = _flat(partition)

    def allreduce_and_scatter(self, *args: Any, process_group: dist.ProcessGroup, **options: Any) -> None:
        """Sum slices of gradients over the ranks of a process group; here, only if these are several."""
        if dist.get_world_size(process_group) > 1:
            super().allreduce_and_scatter(*args, process_group=process_group, **options)

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Do nothing: where a gradient is not finite, the norm is not either, and `step` is skipped for that."""

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Return the 2-norm of the averaged gradients of all ranks, an fp32 scalar, equal on all ranks."""
        for i, pieces in self.averaged_gradients.items():
            if not isinstance(pieces, GradPartitionBufferGroup):
                self.averaged_gradients[i] = _flat(torch.cat([piece.reshape(-1) for piece in pieces]).float())
        squares = sum_of_squares((group.flat_partition for group in self.averaged_gradients.values()), self.device)
        # Each element of a dense parameter is on one of all ranks, and each of an expert, too.
        dist.all_reduce(squares, group=self.dp_process_group)
        return squares.sqrt().float()

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        """Multiply the gradients by the factor that brings their norm to the limit, if it is above."""
        if float(total_norm) + 1e-6 > self.clip_grad:
            super().unscale_and_clip_grads(grad_groups_flat, total_norm)


def _flat(partition: Tensor) -> GradPartitionBufferGroup:
    """Return a partition of gradients in the form that `step` uses without flattening it again."""
    return GradPartitionBufferGroup([partition], partition)
