"""Loss-Free Balancing (Wang et al. 2024, arXiv 2408.15664): a bias of each expert, moved by its load error."""

import torch
from torch import Tensor

from dist_moe.balance.load_error import centered, check_bias, load_error


def loss_free_update(
    bias_E: Tensor, load_E: Tensor, rate: float, center: bool = False, proportional: bool = False
) -> Tensor:
    """The next selection bias -> fp32 [E], a new tensor.

    bias_E: fp32 [E]. load_E: int64 [E], assignments of one optimizer step over ALL ranks. rate: u, in units of
    what the bias is added to (score or logit; a logarithm where it multiplies). The sign rule is the paper's
    Algorithm 1, b_i + u * sign(mean(c) - c_i); the proportional one its variant b_i + u * e_i with
    e_i = (mean(c) - c_i) / mean(c). centre: subtract the mean of the result; the paper's sign rule does not, and its
    mean drifts when the load is skewed (one hot expert of 8: up by 0.75 u each step).

    Errors: TypeError for a load that is not int64 or a bias that is not fp32.
    """
    check_bias(bias_E)
    error_E = load_error(load_E)
    return centered(bias_E + rate * (error_E if proportional else torch.sign(error_E)), center)
