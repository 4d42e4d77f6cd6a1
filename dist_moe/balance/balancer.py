"""The balancer: the window of load counts, the one collective per step, and the update of every layer's bias."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_moe.balance.loss_free import loss_free_update
from dist_moe.comm.reduce import sum_counts

# (bias_E fp32, load_E int64 over all ranks, rate) -> the next bias_E
UpdateRule = Callable[[Tensor, Tensor, float], Tensor]


class Biased(Protocol):
    """A router, as the balancer sees it: it owns an fp32 [E] buffer, and a weight that is trained or frozen."""

    selection_bias: Tensor

    @property
    def weight(self) -> Tensor: ...


@dataclass(frozen=True)
class BalanceSettings:
    """What the balancer needs to know of the config.

    policy: "none" or "loss_free". rate: u at the first step. schedule: "constant", or "linear", which falls to 0 at
    `schedule_steps` taken steps. centre: whether the mean of the bias is held at 0.
    """

    policy: str
    rate: float
    schedule: str
    schedule_steps: int
    centre: bool = False

    def rate_at(self, taken: int) -> float:
        """The rate u for the update after `taken` steps were taken before."""
        if self.policy == "none":
            return 0.0
        if self.schedule == "constant":
            return self.rate
        return self.rate * max(0.0, 1.0 - taken / self.schedule_steps)


class Balancer:
    """Counts the load of one optimizer step over all ranks and moves each layer's selection bias by it.

    routers: layer name -> router (layers may differ in E). Their buffers are written in place and looked up anew each
    time, so that the buffer which the model uses and saves is the one that is updated. The counts of a window are
    summed over its micro-batches, and over the ranks in ONE all-reduce of int64 for all layers. A window is begun anew
    by `step` and by `discard`, so that a skipped step leaves no trace. Every rank computes the same update from the
    same integers.
    """

    def __init__(self, routers: Mapping[str, Biased], settings: BalanceSettings, device: torch.device) -> None:
        for name, router in routers.items():
            if router.selection_bias.dtype != torch.float32:
                raise TypeError(
                    f"the selection bias of {name} is {router.selection_bias.dtype}; it is fp32 whatever the model is"
                )
        self.routers = dict(routers)
        self.settings = settings
        self.device = device
        self.taken = 0
        self._rule = _rule_of(settings)
        self._window = self._empty_window()

    @property
    def biases(self) -> list[Tensor]:
        """selection_bias [E] of each layer, fp32: the routers' own buffers."""
        return [router.selection_bias for router in self.routers.values()]

    def observe(self, loads: Sequence[Tensor]) -> None:
        """Add one micro-batch: loads[l] is the int64 load_E of layer l on this rank, in the order of `routers`."""
        self._window = [seen + load for seen, load in zip(self._window, loads, strict=True)]

    @torch.no_grad()
    def step(self) -> list[Tensor]:
        """After a step that was taken: reduce the window, update every bias, begin a new window.

        -> load_E of each layer over all ranks (int64). The one collective is made under policy "none" too, since
        the load is shown under every policy. All ranks call it alike.
        """
        loads = self._reduce_window()
        rate = self.settings.rate_at(self.taken)
        if self._rule is not None:
            for router, load_E in zip(self.routers.values(), loads, strict=True):
                bias_E = router.selection_bias
                if router.weight.requires_grad:  # a frozen router must not drift by its bias either
                    bias_E.copy_(self._rule(bias_E, load_E, rate))
        self.taken += 1
        return loads

    def discard(self) -> list[Tensor]:
        """After a step that was skipped: the counts are reduced for the record, and move nothing."""
        return self._reduce_window()

    def _reduce_window(self) -> list[Tensor]:
        loads = sum_counts(self._window, self.device)
        self._window = self._empty_window()
        return loads

    def _empty_window(self) -> list[Tensor]:
        return [torch.zeros(bias.numel(), dtype=torch.int64, device=self.device) for bias in self.biases]


def _rule_of(settings: BalanceSettings) -> UpdateRule | None:
    if settings.policy == "none":
        return None
    if settings.policy == "loss_free":
        return lambda bias_E, load_E, rate: loss_free_update(bias_E, load_E, rate, settings.centre)
    raise ValueError(f"balance.policy={settings.policy!r} is unknown; use none or loss_free")
