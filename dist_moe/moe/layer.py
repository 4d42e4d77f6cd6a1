"""The module that replaces the experts of a Hugging Face block: dispatch, local experts, combine."""

from collections.abc import Callable

from torch import Tensor, nn

from dist_moe.comm.mesh import Mesh
from dist_moe.config.sections.model import KernelsName
from dist_moe.moe.dispatch import combine, dispatch
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.hierarchical_dispatch import hierarchical_dispatch_combine


class ExpertParallelLayer(nn.Module):
    """Experts distributed over ranks, called as the experts of a Hugging Face block are.

    Args:
        local: The experts of this rank.
        num_experts: Number of experts over all ranks.
        mesh: Which rank holds which experts.
        meanwhile: Called with the tokens while rows are exchanged. The hierarchical exchange does not call it.
        kernels: The implementations on a GPU, as `model.moe_kernels` names them.
    """

    def __init__(
        self,
        local: GroupedExperts,
        num_experts: int,
        mesh: Mesh,
        meanwhile: Callable[[Tensor], object] | None = None,
        kernels: KernelsName = "auto",
    ) -> None:
        super().__init__()
        self.local = local
        self.num_experts = num_experts
        self.mesh = mesh
        self.meanwhile = meanwhile
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
            return self._apply_experts(hidden_TD, ids_TK, weights_TK, self.mesh, self.meanwhile)
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
        meanwhile: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Apply the experts that the ranks of `mesh` hold together."""
        experts = self.num_experts // self.mesh.expert_parallel * mesh.expert_parallel
        dispatched = dispatch(hidden_TD, ids_TK, weights_TK, experts, mesh, meanwhile, self.kernels)
        results_QD = self.local(dispatched.rows_QD, dispatched.weights_Q, dispatched.ends_e)
        return combine(results_QD, dispatched.handle, mesh, self.kernels)
