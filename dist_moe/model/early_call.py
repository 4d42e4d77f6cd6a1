"""Computes a shared expert ahead of its call: while the rows of the other experts are exchanged."""

from torch import Tensor, nn


class EarlyCall:
    """Replaces a module's forward, so that a call returns what `start` has computed for the same tensor.

    Without `start`, it computes as before. The names of parameters and modules stay as they are.

    Args:
        module: Called with [..., D], each of whose rows gives a row of the result.
    """

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward
        self._started: tuple[Tensor, Tensor] | None = None
        module.forward = self

    def start(self, hidden_TD: Tensor) -> None:
        """Compute the result for a tensor, or for another view of it."""
        self._started = hidden_TD, self._forward(hidden_TD)

    def cancel(self) -> None:
        """Drop the result, and with it its graph: no call will follow."""
        self._started = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the result for `hidden`."""
        started, self._started = self._started, None
        if started is None or started[0].data_ptr() != hidden.data_ptr() or started[0].numel() != hidden.numel():
            result: Tensor = self._forward(hidden)
            return result
        return started[1].view(*hidden.shape[:-1], started[1].shape[-1])
