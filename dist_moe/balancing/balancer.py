"""The balancer: sums the counts of a step over micro-batches and ranks, and updates the routers' state by them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.balancing.counts import RoutingCounts, add_counts, all_reduce_routing_counts
from dist_moe.balancing.margins import BINS
from dist_moe.balancing.threshold_controller import Controller, control, start_controller
from dist_moe.policies.base import Policy, RuleState
from dist_moe.text import listed

MEMORY = "memory."
"""Begins the keys of a rule's memory in the state of a layer."""


class BalancedRouter(Protocol):
    """What the balancer reads and writes of a router.

    Attributes:
        selection_bias: [E] fp32.
        last_load: [E] int64.
        threshold: fp32 scalar; None without threshold routing.
    """

    @property
    def selection_bias(self) -> Tensor: ...

    @property
    def last_load(self) -> Tensor: ...

    @property
    def threshold(self) -> Tensor | None: ...

    @property
    def is_balanced(self) -> bool:
        """Whether the balancer may change the router's state."""
        ...

    @property
    def max_experts_per_token(self) -> int:
        """Maximum number of experts a token takes."""
        ...

    @property
    def top_k(self) -> int | None:
        """Experts a token takes, with expert thresholds on average; None if the rule does not say."""
        ...

    @property
    def may_take_none(self) -> bool:
        """Whether a token that is not padding may take no expert."""
        ...


class Balancer:
    """Counts the routing of one optimizer step over all ranks, and updates each layer's bias and the threshold by it.

    A window is the micro-batches of one optimizer step. The counts of a window are summed over them, and
    over the ranks in ONE all-reduce of int64 for all
    layers. `step` and `discard` begin a new window, so that a skipped step leaves no trace. Every rank computes the
    same update from the same integers. The memory of a rule is kept here: tensors [E] of each layer, fp32.

    Args:
        routers: Layer name -> router; layers may differ in E. Their buffers are written in place and looked up for
            each update, so that the buffer which the model uses and saves is the one that is updated.
        policy: The balancing policy.
        device: Of the counts.
        schedule_steps: Optimizer steps over which the schedule of the policy's rate falls to 0.
        target_experts_per_token: Average that the threshold is controlled to, with threshold routing; None leaves
            the threshold unchanged.
        group: The ranks whose counts are summed; None for all.

    Raises:
        TypeError: The selection bias of a router is not fp32.
    """

    def __init__(
        self,
        routers: Mapping[str, BalancedRouter],
        policy: Policy,
        device: torch.device,
        schedule_steps: int,
        target_experts_per_token: float | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, router in routers.items():
            if router.selection_bias.dtype != torch.float32:
                raise TypeError(
                    f"the selection bias of {name} is {router.selection_bias.dtype}; it is fp32 in a model of any dtype"
                )
        self.routers = dict(routers)
        self.policy = policy
        self.device = device
        self.schedule_steps = schedule_steps
        self.target_experts_per_token = target_experts_per_token
        self.group = group
        self.steps_taken = 0
        self.memory = {name: self._empty_memory(router) for name, router in self.routers.items()}
        self.controller = self._start_controller()
        self._window = self._empty_window()

    @property
    def biases(self) -> list[Tensor]:
        """selection_bias [E] of each layer, fp32: the routers' own buffers."""
        return [router.selection_bias for router in self.routers.values()]

    @property
    def threshold(self) -> float | None:
        """The current threshold; None without threshold routing."""
        if self.controller is not None:
            return self.controller.threshold
        thresholds = [router.threshold for router in self.routers.values() if router.threshold is not None]
        return float(thresholds[0]) if thresholds else None

    @property
    def rate(self) -> float:
        """The rate of the next update; 0 under a policy without a rate, and once it is frozen."""
        return self.policy.rate_at(self.steps_taken, self.schedule_steps)

    def to(self, device: torch.device) -> None:
        """Move the memory, and begin a new window there; the routers' tensors are moved by their owner."""
        self.device = device
        self.memory = {
            name: {kind: value.to(device) for kind, value in memory.items()} for name, memory in self.memory.items()
        }
        self._window = self._empty_window()

    def empty_counts(self, name: str) -> RoutingCounts:
        """Return the counts of a layer without a token."""
        return self._empty_counts(self.routers[name])

    def observe(self, routing_counts: Sequence[RoutingCounts]) -> None:
        """Add one micro-batch: the counts of each layer on this rank, in the order of `routers`."""
        self._window = add_counts(self._window, routing_counts)

    @torch.no_grad()
    def step(self) -> list[RoutingCounts]:
        """Reduce the window after an optimizer step, update every layer, and begin a new window.

        Collective: all ranks call it. The all-reduce is made under every policy, also under one that moves no bias,
        since the load is always reported.

        Returns:
            The counts of each layer over all ranks.
        """
        routing_counts = self._reduce_window()
        rate = self.rate
        frozen = self.policy.frozen_at(self.steps_taken)
        for (name, router), layer_counts in zip(self.routers.items(), routing_counts, strict=True):
            if not router.is_balanced:
                continue
            router.last_load.copy_(layer_counts.load_E)
            if self.policy.moves_bias and not frozen:
                state = RuleState(router.selection_bias, self.memory[name])
                bias_E, memory = self.policy.next_state(state, layer_counts._replace(top_k=router.top_k), rate)
                router.selection_bias.copy_(bias_E)
                self.memory[name] = {kind: memory[kind] for kind in self.policy.memory}
        self._control_threshold(routing_counts)
        self.steps_taken += 1
        return routing_counts

    def discard(self) -> list[RoutingCounts]:
        """Reduce the window after a skipped step, for the report alone. Collective, as `step`."""
        return self._reduce_window()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on: int, fp32 and int64, equal on all ranks."""
        layers = {
            name: {
                "selection_bias": router.selection_bias.clone(),
                "last_load": router.last_load.clone(),
                **{MEMORY + kind: value.clone() for kind, value in self.memory[name].items()},
            }
            for name, router in self.routers.items()
        }
        controller = None if self.controller is None else tuple(self.controller)
        return {"taken": self.steps_taken, "controller": controller, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Restore `state_dict`, and begin a new window.

        The memory of the rule starts empty, in every layer, where the state is of a policy with another one.

        Returns:
            A line if the memory starts empty, or if memory of the state is not used.

        Raises:
            ValueError: The state has other layers, or a controller where this balancer has none (or the reverse).
        """
        if set(state["layers"]) != set(self.routers) or (state["controller"] is None) != (self.controller is None):
            raise ValueError(
                f"the state has the layers {sorted(state['layers'])} and the controller {state['controller']}; this "
                f"balancer has {sorted(self.routers)} and {self.controller}; use the config of the run that wrote it"
            )
        for name, router in self.routers.items():
            router.selection_bias.copy_(state["layers"][name]["selection_bias"])
            router.last_load.copy_(state["layers"][name]["last_load"])
        notes = self._load_memory(state["layers"])
        self.steps_taken = state["taken"]
        self._window = self._empty_window()
        if state["controller"] is not None:
            self._set_controller(Controller(*state["controller"]))
        return notes

    def _load_memory(self, layers: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        wanted = {MEMORY + kind for kind in self.policy.memory}
        stored = {key for layer in layers.values() for key in layer if key.startswith(MEMORY)}
        complete = all(wanted <= layer.keys() for layer in layers.values())
        for name, router in self.routers.items():
            self.memory[name] = self._empty_memory(router)
            if complete:
                for kind, value in self.memory[name].items():
                    value.copy_(layers[name][MEMORY + kind])
        notes = []
        if not complete:
            names = listed(self.policy.memory, last="and")
            notes.append(
                f"the checkpoint lacks the memory of balance.policy={self.policy.policy} ({names}): it is empty"
            )
        if unused := sorted(key.removeprefix(MEMORY) for key in stored - wanted):
            notes.append(
                f"the checkpoint has the memory {listed(unused, last='and')}, which "
                f"balance.policy={self.policy.policy} does not use"
            )
        return notes

    def _start_controller(self) -> Controller | None:
        thresholds = [float(router.threshold) for router in self._controlled() if router.threshold is not None]
        if self.target_experts_per_token is None or not thresholds:
            return None
        return start_controller(thresholds[0])

    def _controlled(self) -> list[BalancedRouter]:
        """The routers whose threshold the controller moves."""
        return [router for router in self.routers.values() if router.is_balanced and router.threshold is not None]

    def _control_threshold(self, routing_counts: Sequence[RoutingCounts]) -> None:
        target = self.target_experts_per_token
        pairs = zip(self.routers.values(), routing_counts, strict=True)
        counted = [
            layer_counts for router, layer_counts in pairs if router.is_balanced and router.threshold is not None
        ]
        if self.controller is None or target is None or not counted:
            return
        # One stack for all layers, so that a GPU is read once.
        sums = torch.stack(
            [count.sum() for layer_counts in counted for count in (layer_counts.load_E, layer_counts.k_histogram_K)]
        ).tolist()
        assignments, tokens = sum(sums[::2]), sum(sums[1::2])
        if tokens:
            self._set_controller(control(self.controller, assignments / tokens, target))

    def _set_controller(self, controller: Controller) -> None:
        self.controller = controller
        for router in self._controlled():
            assert router.threshold is not None
            router.threshold.fill_(controller.threshold)

    def _reduce_window(self) -> list[RoutingCounts]:
        routing_counts = all_reduce_routing_counts(self._window, self.device, self.group)
        self._window = self._empty_window()
        return routing_counts

    def _empty_memory(self, router: BalancedRouter) -> dict[str, Tensor]:
        return {kind: torch.zeros_like(router.selection_bias) for kind in self.policy.memory}

    def _empty_window(self) -> list[RoutingCounts]:
        return [self._empty_counts(router) for router in self.routers.values()]

    def _empty_counts(self, router: BalancedRouter) -> RoutingCounts:
        experts = router.selection_bias.numel()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        margins_EQ = zeros(experts, BINS) if self.policy.needs_margins else None
        unrouted = zeros() if router.may_take_none else None
        return RoutingCounts(zeros(experts), zeros(router.max_experts_per_token), margins_EQ, unrouted)
