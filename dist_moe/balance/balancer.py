"""The balancer: the window of counts, the one collective per step, and the update of what routers keep."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_moe.balance.counts import RoutingCounts, add_counts, all_reduce_routing_counts
from dist_moe.balance.rules.quantile import BINS
from dist_moe.balance.spec import BalanceSettings, update_rule
from dist_moe.balance.threshold_controller import Controller, control, start_controller


class Balanced(Protocol):
    """A router, as the balancer sees it: what it writes there, and whether it may.

    selection_bias: fp32 [E]. last_load: int64 [E]. threshold: fp32 scalar, None without threshold routing.
    """

    selection_bias: Tensor
    last_load: Tensor
    threshold: Tensor | None

    @property
    def balanced(self) -> bool: ...

    @property
    def max_experts_per_token(self) -> int:
        """Experts a token takes at most."""
        ...


class Balancer:
    """Counts the routing of one optimizer step over all ranks, and by it moves each layer's bias and the threshold.

    routers: layer name -> router (layers may differ in E). Their buffers are written in place and looked up anew each
    time, so that the buffer which the model uses and saves is the one that is updated. The counts of a window are
    summed over its micro-batches, and over the ranks in ONE all-reduce of int64 for all layers. A window is begun anew
    by `step` and by `discard`, so that a skipped step leaves no trace. Every rank computes the same update from the
    same integers.
    """

    def __init__(self, routers: Mapping[str, Balanced], settings: BalanceSettings, device: torch.device) -> None:
        for name, router in routers.items():
            if router.selection_bias.dtype != torch.float32:
                raise TypeError(
                    f"the selection bias of {name} is {router.selection_bias.dtype}; it is fp32 whatever the model is"
                )
        self.routers = dict(routers)
        self.settings = settings
        self.device = device
        self.taken = 0
        self.controller = self._start_controller()
        self._rule = update_rule(settings)
        self._window = self._empty_window()

    @property
    def biases(self) -> list[Tensor]:
        """selection_bias [E] of each layer, fp32: the routers' own buffers."""
        return [router.selection_bias for router in self.routers.values()]

    @property
    def threshold(self) -> float | None:
        """The threshold in use; None without threshold routing."""
        if self.controller is not None:
            return self.controller.threshold
        held = [router.threshold for router in self.routers.values() if router.threshold is not None]
        return float(held[0]) if held else None

    def observe(self, routing_counts: Sequence[RoutingCounts]) -> None:
        """Add one micro-batch: the counts of each layer on this rank, in the order of `routers`."""
        self._window = add_counts(self._window, routing_counts)

    @torch.no_grad()
    def step(self) -> list[RoutingCounts]:
        """After a step that was taken: reduce the window, update every layer, begin a new window.

        -> the counts of each layer over all ranks. The one collective is made under policy "none" too, since the load
        is shown under every policy. All ranks call it alike.
        """
        routing_counts = self._reduce_window()
        rate = self.settings.rate_at(self.taken)
        for router, layer_counts in zip(self.routers.values(), routing_counts, strict=True):
            if not router.balanced:
                continue
            router.last_load.copy_(layer_counts.load_E)
            if self._rule is not None and not self.settings.frozen_at(self.taken):
                router.selection_bias.copy_(self._rule(router.selection_bias, layer_counts, rate))
        self._control_threshold(routing_counts)
        self.taken += 1
        return routing_counts

    def discard(self) -> list[RoutingCounts]:
        """After a step that was skipped: the counts are reduced for the record, and move nothing."""
        return self._reduce_window()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on: int, fp32 and int64, equal on all ranks."""
        layers = {
            name: {"selection_bias": router.selection_bias.clone(), "last_load": router.last_load.clone()}
            for name, router in self.routers.items()
        }
        controller = None if self.controller is None else tuple(self.controller)
        return {"taken": self.taken, "controller": controller, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Errors: ValueError where it is of other layers, or of another kind of routing."""
        if set(state["layers"]) != set(self.routers) or (state["controller"] is None) != (self.controller is None):
            raise ValueError(
                f"the state is of the layers {sorted(state['layers'])} and controller {state['controller']}; this "
                f"balancer has {sorted(self.routers)} and {self.controller}; use the config of the run that wrote it"
            )
        for name, router in self.routers.items():
            router.selection_bias.copy_(state["layers"][name]["selection_bias"])
            router.last_load.copy_(state["layers"][name]["last_load"])
        self.taken = state["taken"]
        self._window = self._empty_window()
        if state["controller"] is not None:
            self._set_controller(Controller(*state["controller"]))

    def _start_controller(self) -> Controller | None:
        held = [float(router.threshold) for router in self._controlled() if router.threshold is not None]
        return start_controller(held[0]) if self.settings.budget is not None and held else None

    def _controlled(self) -> list[Balanced]:
        """The routers whose threshold the budget's controller moves."""
        return [router for router in self.routers.values() if router.balanced and router.threshold is not None]

    def _control_threshold(self, routing_counts: Sequence[RoutingCounts]) -> None:
        budget = self.settings.budget
        pairs = zip(self.routers.values(), routing_counts, strict=True)
        counted = [layer_counts for router, layer_counts in pairs if router.balanced and router.threshold is not None]
        if self.controller is None or budget is None or not counted:
            return
        sums = torch.stack(
            [count.sum() for layer_counts in counted for count in (layer_counts.load_E, layer_counts.k_histogram_K)]
        ).tolist()
        assignments, tokens = sum(sums[::2]), sum(sums[1::2])
        if tokens:
            self._set_controller(control(self.controller, assignments / tokens, budget))

    def _set_controller(self, controller: Controller) -> None:
        self.controller = controller
        for router in self._controlled():
            assert router.threshold is not None
            router.threshold.fill_(controller.threshold)

    def _reduce_window(self) -> list[RoutingCounts]:
        routing_counts = all_reduce_routing_counts(self._window, self.device)
        self._window = self._empty_window()
        return routing_counts

    def _empty_window(self) -> list[RoutingCounts]:
        return [self._empty_counts(router) for router in self.routers.values()]

    def _empty_counts(self, router: Balanced) -> RoutingCounts:
        experts = router.selection_bias.numel()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        margins_EQ = zeros(experts, BINS) if self.settings.counts_margins else None
        return RoutingCounts(zeros(experts), zeros(router.max_experts_per_token), margins_EQ)
