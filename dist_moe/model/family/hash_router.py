"""A router whose experts are those that a table names for the id of each token, as in the first layers of DeepSeek-V4.

Shapes: V token ids, E experts, K experts a token takes.
"""

import torch
from torch import Tensor, nn

from dist_moe.model.family.router import FamilyRouter
from dist_moe.moe.records import Routing
from dist_moe.moe.select import Rule
from dist_moe.probe.own_bias import OwnBias
from dist_moe.probe.router_probe import Probed, Results


class HashRouter(FamilyRouter):
    """Takes the experts of the family's own router, which reads them from its table, and counts them.

    The gate weights are those of the family's router, too: they depend on the logits, which are trained. No bias and
    no loss moves the selection.

    Args:
        original: The family's router, which becomes a child.
        probed: What it computes, with the name of its table.
        rule: Of the other layers; it is not applied here.
    """

    def __init__(self, original: nn.Module, probed: Probed, rule: Rule) -> None:
        super().__init__(original, probed, rule, None)

    def set_rule(self, rule: Rule) -> None:
        """Note the rule of the other layers; this one has no threshold."""
        super().set_rule(rule)
        self.threshold = None

    @property
    def is_fixed(self) -> bool:
        """True."""
        return True

    @property
    def max_experts_per_token(self) -> int:
        """K."""
        return self._probed.top_k

    @property
    def top_k(self) -> int:
        """K."""
        return self._probed.top_k

    @property
    def may_take_none(self) -> bool:
        """False: each token id has K experts."""
        return False

    @property
    def table_VK(self) -> Tensor:
        """The experts of each token id, an integer buffer of the family's router."""
        assert self._probed.table is not None
        return self.original.get_buffer(self._probed.table)

    @torch.no_grad()
    def draw_table(self, seed: int) -> None:
        """Draw K different experts for each token id."""
        generator = torch.Generator().manual_seed(seed)
        for row_K in self.table_VK:
            row_K.copy_(torch.randperm(self.num_experts, generator=generator)[: self.top_k])

    def problem_of_table(self) -> str:
        """Return why the table cannot be used; "" if it can."""
        table_VK = self.table_VK
        lowest, highest = int(table_VK.min()), int(table_VK.max())
        if lowest >= 0 and highest < self.num_experts:
            return ""
        wrong = lowest if lowest < 0 else highest
        return f"{self._probed.table} names expert {wrong}, which is none of 0 to {self.num_experts - 1}"

    def _route_results(self, results: Results) -> Routing:
        assert results.logits_TE is not None
        return self._record_routing(results.logits_TE, Routing(results.ids_TK.long(), results.weights_TK))


def make_router(original: nn.Module, probed: Probed, rule: Rule, own: OwnBias | None) -> FamilyRouter:
    """Make the router that takes the place of a family's own one; as of `FamilyRouter`."""
    if probed.table is not None:
        return HashRouter(original, probed, rule)
    return FamilyRouter(original, probed, rule, own)
