"""The module that replaces the experts of a Hugging Face block: dispatch, local experts, combine."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from dist_moe.comm.mesh import Mesh
from dist_moe.config.sections.model import KernelsName
from dist_moe.moe.dispatch import combine, dispatch
from dist_moe.moe.experts import Experts
from dist_moe.moe.hierarchical_dispatch import hierarchical_dispatch_combine


class SharedExpert(Protocol):
    """A shared expert whose result can be computed ahead of its call."""

    def start(self, hidden_TD: Tensor) -> None:
        """Compute the result for these tokens, for the next call."""
        ...

    def cancel(self) -> None:
        """Drop the result: there will be no call."""
        ...


class ExpertParallelLayer(nn.Module):
    """Experts distributed over ranks, called as the experts of a Hugging Face block are.

    Args:
        local: The experts of this rank.
        num_experts: Number of experts over all ranks.
        mesh: Which rank holds which experts.
        shared: Started with the tokens while rows are exchanged; its block calls it after this layer. The hierarchical
            exchange does not start it.
        kernels: The implementations on a GPU, as `model.moe_kernels` names them.
    """

    def __init__(
        self,
        local: Experts,
        num_experts: int,
        mesh: Mesh,
        shared: SharedExpert | None = None,
        kernels: KernelsName = "auto",
    ) -> None:
        super().__init__()
        self.local = local
        self.num_experts = num_experts
        self.mesh = mesh
        self.shared = shared
        self.kernels = kernels

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Apply each token's experts and sum their results by gate weight. Collective.

        Args:
            hidden_TD: The tokens of this rank.
            ids_TK: int64, experts of each token; -1 is an empty slot.
            weights_TK: Gate weights.

        Returns:
            [T, D] in the dtype of hidden_TD.
        """
        nodes = self.mesh.node_groups
        if nodes is None:
            overlapped = None if self.shared is None else self.shared.start
            try:
                return self._apply_experts(hidden_TD, ids_TK, weights_TK, self.mesh, overlapped)
            except BaseException:
                # Activation checkpointing ends a recomputation by an exception, once it has all tensors that the
                # backward needs: in `combine`, before the block calls the shared expert.
                if self.shared is not None:
                    self.shared.cancel()
                raise
        mixed_TD = hierarchical_dispatch_combine(
            hidden_TD, ids_TK, weights_TK, self.num_experts, nodes, self._apply_experts, self.kernels
        )
        return mixed_TD.to(hidden_TD.dtype)

    def _apply_experts(
        self,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        mesh: Mesh,
        overlapped: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Apply the experts that the ranks of `mesh` hold together."""
        experts = self.num_experts // self.mesh.expert_parallel * mesh.expert_parallel
        dispatched = dispatch(hidden_TD, ids_TK, weights_TK, experts, mesh, overlapped, self.kernels)
        results_QD = self.local(dispatched.rows_QD, dispatched.weights_Q, dispatched.ends_e)
        return combine(results_QD, dispatched.handle, mesh, self.kernels)
