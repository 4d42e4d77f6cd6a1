"""Adaptive expert weights: a factor on each expert's routing probability, moved by its load.

After Wen et al. 2025, Frontiers in Neurorobotics 19:1590994, whose abstract says that after each routing step a
weight per expert is adjusted from the load and shapes the next routing, without an auxiliary loss and without a
change of gradients. Its equations were not at hand: the rule below is a reconstruction, and each choice in it is a
field of the config (balance.rule, rate, clip, cadence, shapes).
"""

import math

import torch
from torch import Tensor

from dist_moe.balance.load_error import centered, check_bias, load_error


def adaptive_weight_update(
    log_weight_E: Tensor,
    load_E: Tensor,
    rate: float,
    clip: float | None = None,
    proportional: bool = True,
    center: bool = True,
) -> Tensor:
    """The next weights w_i * exp(rate * e_i), as logarithms -> fp32 [E], a new tensor.

    log_weight_E: fp32 [E], log w; 0 is neutral. load_E: int64 [E], assignments of one optimizer step over ALL ranks.
    e_i = (mean(c) - c_i) / mean(c), or its sign where not proportional. centre: divide by the geometric mean, which
    leaves the selection as it is and keeps the weights from drifting. clip: then keep w within 1/clip .. clip.

    Selection is by w_i P_i / sum_j w_j P_j with P the softmax of the logits, which is the softmax of the logits plus
    log w: so log w is the router's bias on its logits. Errors: TypeError for a load that is not int64 or weights that
    are not fp32; ValueError for a clip that is not above 1.
    """
    check_bias(log_weight_E)
    if clip is not None and clip <= 1:
        raise ValueError(f"clip={clip}; it bounds a weight from above, and 1 / clip from below; give more than 1")
    error_E = load_error(load_E)
    updated_E = centered(log_weight_E + rate * (error_E if proportional else torch.sign(error_E)), center)
    return updated_E if clip is None else updated_E.clamp(-math.log(clip), math.log(clip))
