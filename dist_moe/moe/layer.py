"""The layer that stands where a Hugging Face block keeps its experts: dispatch, local experts, combine."""

from torch import Tensor, nn

from dist_moe.comm.mesh import Mesh
from dist_moe.moe.dispatch import combine, dispatch
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.hierarchical_dispatch import hierarchical_dispatch_combine


class ExpertParallelLayer(nn.Module):
    """Takes the call of a Hugging Face block's experts and answers it with experts spread over ranks.

    local: the experts of this rank, which know nothing of the others. experts: their number over all ranks.
    """

    def __init__(self, local: GroupedExperts, experts: int, mesh: Mesh) -> None:
        super().__init__()
        self.local = local
        self.experts = experts
        self.mesh = mesh

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """hidden_TD, ids_TK (int64, -1: not routed), weights_TK -> mixed_TD in the dtype of hidden_TD."""
        nodes = self.mesh.nodes
        if nodes is None:
            return self._mix(hidden_TD, ids_TK, weights_TK, self.mesh)
        mixed_TD = hierarchical_dispatch_combine(hidden_TD, ids_TK, weights_TK, self.experts, nodes, self._mix)
        return mixed_TD.to(hidden_TD.dtype)

    def _mix(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, mesh: Mesh) -> Tensor:
        """Over the ranks of `mesh`, and the experts that they hold together."""
        experts = self.experts // self.mesh.expert_parallel * mesh.expert_parallel
        dispatched = dispatch(hidden_TD, ids_TK, experts, mesh)
        results_QD = self.local(dispatched.rows_QD, dispatched.counts_e)
        return combine(results_QD, weights_TK, dispatched.handle, mesh).to(hidden_TD.dtype)
