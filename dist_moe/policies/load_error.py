"""The load error, and the fields of the policies that move a bias by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dist_moe.policies.base import SharesPolicy

if TYPE_CHECKING:
    from torch import Tensor


class LoadErrorPolicy(SharesPolicy):
    """A policy that changes each bias by its load error or by the sign of it.

    Attributes:
        proportional_by_default: What `rule=None` means.
    """

    rule: Literal["sign", "proportional"] | None = Field(
        default=None,
        description="the change of a bias: sign (by the rate), proportional (by the rate times the load error as a "
        "fraction of the target, the mean load), or null (the policy's own default)",
    )

    has_rate: ClassVar[bool] = True
    proportional_by_default: ClassVar[bool] = False

    @property
    def proportional(self) -> bool:
        """Whether the change is proportional to the load error."""
        return self.proportional_by_default if self.rule is None else self.rule == "proportional"


def load_error(load_E: Tensor, shares: Sequence[float] | None = None) -> Tensor:
    """The relative load error (t_i - c_i) / t_i of each expert, with the target t_i = s_i * sum(c).

    Args:
        load_E: [E] int64, assignments of one optimizer step over ALL ranks.
        shares: s, E numbers above 0 with the sum 1; None for equal shares, with which the target is the mean load.

    Returns:
        [E] fp32: 1 for an expert that received nothing, 0 everywhere if there is no assignment at all.

    Raises:
        TypeError: The load is not int64.
    """
    import torch

    if load_E.dtype != torch.int64:
        raise TypeError(f"load is {load_E.dtype}; a rule takes int64 counts, since floats lose single assignments")
    total = load_E.sum()
    if shares is not None:
        target_E = torch.tensor(shares, dtype=torch.float64, device=load_E.device) * total.clamp(min=1)
        return torch.where(total > 0, (target_E - load_E) / target_E, 0.0).to(torch.float32)
    # The difference is computed in integers, so that no rounding of the mean can flip its sign.
    error_E = (total - load_E * load_E.numel()).to(torch.float64)
    return (error_E / total.clamp(min=1)).to(torch.float32)


def centered(bias_E: Tensor, center: bool) -> Tensor:
    """Subtract the mean of the bias if `center`."""
    return bias_E - bias_E.mean() if center else bias_E


def check_bias(bias_E: Tensor) -> None:
    """Refuse a bias in another dtype than fp32.

    Raises:
        TypeError: The bias is not fp32; in bf16 steps of 0.001 are lost.
    """
    import torch

    if bias_E.dtype != torch.float32:
        raise TypeError(f"bias is {bias_E.dtype}; a rule takes and gives fp32, since steps of 0.001 are lost in less")
