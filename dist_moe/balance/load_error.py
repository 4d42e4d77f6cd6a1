"""The load error, in which every rule that knows only the loads is written."""

import torch
from torch import Tensor


def load_error(load_E: Tensor) -> Tensor:
    """(mean(c) - c_i) / mean(c) -> fp32 [E]: 1 for an expert that received nothing; 0 everywhere without any load.

    load_E: int64 [E], assignments of one optimizer step over ALL ranks. The difference is made in integers, so that
    no rounding of the mean can flip its sign. Errors: TypeError for a load that is not int64.
    """
    if load_E.dtype != torch.int64:
        raise TypeError(f"load is {load_E.dtype}; a rule takes int64 counts, since floats lose single assignments")
    total = load_E.sum()
    error_E = (total - load_E * load_E.numel()).to(torch.float64)
    return (error_E / total.clamp(min=1)).to(torch.float32)


def centered(bias_E: Tensor, center: bool) -> Tensor:
    """The bias less its mean where `center` says so."""
    return bias_E - bias_E.mean() if center else bias_E


def check_bias(bias_E: Tensor) -> None:
    """Errors: TypeError for a bias that is not fp32, in which steps of 0.001 would be lost."""
    if bias_E.dtype != torch.float32:
        raise TypeError(f"bias is {bias_E.dtype}; a rule takes and gives fp32, since steps of 0.001 are lost in less")
