"""The experts of a rank, of the type that a test expects."""

from dist_moe.model.convert import MoeLayer
from dist_moe.moe.experts import GroupedExperts


def gated_experts(layer: MoeLayer) -> GroupedExperts:
    """Return the local experts of a layer, which are gated networks without bias."""
    local = layer.experts.local
    assert isinstance(local, GroupedExperts)
    return local
