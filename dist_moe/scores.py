"""The names of the gate functions, which turn a router's logits into scores."""

from typing import Literal

Score = Literal["sigmoid", "softmax", "softmax_selected", "sqrt_softplus"]
# Gate functions of all logits of a token together. A selection bias is added to their logits: that multiplies the
# probabilities by exp(bias) and keeps their sum at 1. For every other gate function it is applied to the scores.
OVER_LOGITS: tuple[Score, ...] = ("softmax", "softmax_selected")
