"""Loss-Free Balancing: the sign rule of Wang et al. 2024 (arXiv 2408.15664, Algorithm 1), as a pure function."""

import torch
from torch import Tensor


def loss_free_update(bias_E: Tensor, load_E: Tensor, rate: float, centre: bool = False) -> Tensor:
    """The next selection bias: b_i + rate * sign(mean(c) - c_i) -> fp32 [E], a new tensor.

    bias_E: fp32 [E]. load_E: int64 [E], assignments of one optimizer step over ALL ranks. rate: u, in units of
    the score (or logit) that the bias is added to. centre: subtract the mean of the result; the paper's rule does not,
    and its mean drifts when the load is skewed (one hot expert of 8: up by 0.75 u each step).

    The comparison is made in integers (E * c_i against the sum), so that no rounding of the mean can flip a sign.
    Errors: TypeError for a load that is not int64 or a bias that is not fp32.
    """
    if load_E.dtype != torch.int64 or bias_E.dtype != torch.float32:
        raise TypeError(f"load is {load_E.dtype} and bias {bias_E.dtype}; the rule takes int64 counts and an fp32 bias")
    error_E = load_E.sum() - load_E * load_E.numel()
    updated_E = bias_E + rate * torch.sign(error_E).to(torch.float32)
    return updated_E - updated_E.mean() if centre else updated_E
