"""The auxiliary losses of routing, as an alternative to balancing by bias or together with it.

Each but `orthogonality_loss` is a SUM over this rank's tokens of one micro-batch. The caller multiplies it by the
coefficient and by one over the tokens of the GLOBAL batch, so that its weight does not depend on the layout. Layers are
never joined before the product: opposite imbalances of two layers would cancel.

Shapes: T = B * S tokens, E experts, K experts a token takes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["micro_batch", "sequence", "global_batch"]


@dataclass(frozen=True)
class RoutingLosses:
    """Coefficients of the losses of each MoE layer; 0 turns a loss off.

    Attributes:
        balance: Of `balance_loss` or `sequence_balance_loss`, by `scope`.
        scope: The tokens over which the load fractions are taken.
        z: Of `z_loss`.
        entropy: Of `entropy_loss`.
        orthogonality: Of `orthogonality_loss`, which is of the router's weights and not of tokens.
    """

    balance: float = 0.0
    scope: Scope = "global_batch"
    z: float = 0.0
    entropy: float = 0.0
    orthogonality: float = 0.0

    @property
    def of_tokens(self) -> bool:
        """Whether any loss that is a sum over tokens is on."""
        return bool(self.balance or self.z or self.entropy)

    @property
    def any(self) -> bool:
        """Whether any loss is on."""
        return self.of_tokens or bool(self.orthogonality)


def gate_shares(scores_TE: Tensor) -> Tensor:
    """Divide the scores by their sum over the experts: the probabilities [T, E] in the losses."""
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)


def balance_loss(shares_TE: Tensor, fractions_E: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Sum over tokens of E * sum_i f_i p_i: 1 for each token where load or probability is even.

    Args:
        shares_TE: p, probabilities with the graph.
        fractions_E: f, the share of the assignments that each expert received, without graph: over the micro-batch, or
            over the global batch of the last optimizer step (the paper accumulates the current one's over its
            micro-batches).
        mask_T: bool, the tokens that count; None means all.

    Source: over the micro-batch GShard (Lepikhin et al. 2020, arXiv 2006.16668, section 2.2) and Switch (Fedus et al.
    2021, arXiv 2101.03961, equation 4); over the global batch Qiu et al. 2025, arXiv 2501.11873.
    """
    return shares_TE.shape[-1] * (masked(shares_TE, mask_T) @ fractions_E.to(shares_TE.dtype)).sum()


def sequence_balance_loss(shares_TE: Tensor, ids_TK: Tensor, sequences: int) -> Tensor:
    """`balance_loss` with the load fractions of each sequence.

    Args:
        shares_TE: Probabilities with the graph, sequence after sequence, equally many tokens in each.
        ids_TK: The experts by unbiased scores, as in equation 18; with a bias that balances the load, the loss would
            vanish. -1 is an empty slot, and a token without any expert is padding.
        sequences: B.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.
    """
    experts = shares_TE.shape[-1]
    ids_BK = ids_TK.reshape(sequences, -1)
    load_BE = shares_TE.new_zeros(sequences, experts + 1).scatter_add_(
        1, ids_BK + 1, torch.ones_like(ids_BK, dtype=shares_TE.dtype)
    )[:, 1:]
    fractions_BE = load_BE / load_BE.sum(dim=-1, keepdim=True).clamp(min=1)
    present_T = (ids_TK >= 0).any(dim=1)
    shares_BSE = masked(shares_TE, present_T).view(sequences, -1, experts)
    return experts * torch.einsum("bse,be->", shares_BSE, fractions_BE)


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2, which keeps the logits small.

    Source: ST-MoE, Zoph et al. 2022, arXiv 2202.08906, equation 5.
    """
    return masked(logits_TE.logsumexp(dim=-1).square(), mask_T).sum()


def entropy_loss(shares_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Sum over tokens of the entropy of their probabilities, in nats, which limits the experts of threshold routing.

    Source: Huang et al. 2024, arXiv 2403.07652, section 3.2, with a coefficient of 1e-4.
    """
    # Bounded, because the slope of p ln p is infinite at 0, to which a softmax underflows.
    logarithms_TE = shares_TE.clamp_min(torch.finfo(shares_TE.dtype).tiny).log()
    return masked(-(shares_TE * logarithms_TE).sum(dim=-1), mask_T).sum()


def orthogonality_loss(weight_ED: Tensor) -> Tensor:
    """Sum of the absolute entries of W W^T - 1, which keeps the experts' rows of the router orthonormal.

    A router that keeps angles gives similar tokens similar experts, and dissimilar ones others.

    Args:
        weight_ED: W, the weights of a router; the loss is computed in fp32 or wider.

    Source: SimBal, Omi et al. 2025, arXiv 2506.14038, whose loss is ||R^T R - I||_1 with R = W^T. That the norm is the
    sum over the entries is taken from a public description of it; the coefficient applies to each layer.
    """
    weight_ED = weight_ED.to(torch.promote_types(torch.float32, weight_ED.dtype))
    with torch.autocast(weight_ED.device.type, enabled=False):
        gram_EE = weight_ED @ weight_ED.t()
    return (gram_EE - torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)).abs().sum()


def load_fractions(load_E: Tensor) -> Tensor:
    """Compute c_i / sum(c) in fp32; 0 everywhere if there is no assignment."""
    return (load_E.double() / load_E.sum().clamp(min=1)).to(torch.float32)


def masked(values: Tensor, mask_T: Tensor | None) -> Tensor:
    """Return `values` [T, ...] with 0 in the rows where the mask is false."""
    if mask_T is None:
        return values
    return torch.where(mask_T.view(-1, *[1] * (values.dim() - 1)), values, 0)
