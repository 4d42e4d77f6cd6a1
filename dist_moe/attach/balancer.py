"""Balances the experts of a model in any training loop, without replacing anything of the model."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from dist_moe.attach.load import Load
from dist_moe.attach.observer import Observer
from dist_moe.attach.router_state import RouterState
from dist_moe.attach.state import LayerState, check_policy
from dist_moe.attach.steppers import Attachment, attach_to
from dist_moe.balancing.balancer import Balancer as Core
from dist_moe.balancing.counts import RoutingCounts
from dist_moe.comm.objects import all_gather_objects
from dist_moe.errors import UserError
from dist_moe.moe.router import Router
from dist_moe.policies.base import Policy
from dist_moe.policies.registry import make_policy
from dist_moe.probe.layers import (
    FoundLayer,
    counted_in,
    expert_groups,
    has_distributed_experts,
    inner_model,
    repeats_tokens,
)
from dist_moe.probe.routed_layers import unify_layers
from dist_moe.probe.router_probe import BiasPlace
from dist_moe.section import broken_fields
from dist_moe.text import counted, listed

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger("dist_moe")


class Layer(NamedTuple):
    """An MoE layer as the balancer found it.

    Attributes:
        name: Module name of its block.
        num_experts: Routed experts; 0 for a layer that is not counted.
        top_k: Experts a token takes; 0 for a layer that is not counted.
        bias: `own`: the model has a selection bias, which is updated; `ours`: the results of the router are selected
            again with a bias that the balancer keeps; None: the load is counted, and not balanced.
        reason: Why it is not balanced; empty where it is.
    """

    name: str
    num_experts: int
    top_k: int
    bias: BiasPlace | None
    reason: str


def balance(
    model: nn.Module,
    policy: str = "loss_free",
    *,
    steps: int | None = None,
    group: dist.ProcessGroup | None = None,
    **fields: Any,
) -> "Balancer":
    """Balance the experts of a Hugging Face MoE model in a training loop of any framework.

    The routers stay in the model. Where the family has a selection bias of its own, it is updated; where it has none,
    the results of the routers are selected again with one. Afterwards `attach` the balancer to what makes the steps, or
    give its `callback` to a Trainer.

    Args:
        model: The model, also in the wrappers of DDP, accelerate, DeepSpeed or `torch.compile`, or sharded by FSDP2.
        policy: As `balance.policy` of a configuration.
        steps: Optimizer steps of the run, over which a schedule of the rate falls to 0.
        group: The ranks that train on different tokens; None for all, of which those that share their tokens by tensor
            parallelism count once.
        fields: Further fields of the section `balance` of a configuration, such as `rate`.

    Raises:
        UserError: The model has no MoE layer, or none that can be balanced, or the policy does not work here.
    """
    try:
        made = make_policy(policy, **fields)
    except ValidationError as error:
        raise UserError(f"policy={policy}: {broken_fields(error)}") from None
    except ValueError as error:
        raise UserError(str(error).replace("balance.policy", "policy")) from None
    if made.has_rate and made.schedule != "constant" and steps is None:
        raise UserError(f"schedule={made.schedule} needs the length of the run; give steps")
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps} is not the number of steps of a run; use 1 or more")
    return Balancer(model, made, steps or 1, group)


class Balancer:
    """Counts the load of every MoE layer, and updates their selection biases once an optimizer step.

    Args:
        model: The model.
        policy: The policy.
        steps: Of the schedule.
        group: The ranks that train on different tokens; None for all.

    Attributes:
        layers: The MoE layers of the model.
        load: The load of the last step; None before the first one.
        steps: Steps so far, with skipped ones.
    """

    def __init__(self, model: nn.Module, policy: Policy, steps: int, group: dist.ProcessGroup | None = None) -> None:
        if group is not None and dist.get_rank(group) < 0:
            raise UserError("this rank is not in the group; give each rank the group of its own layers and tokens")
        inner = inner_model(model)
        self._states: dict[str, LayerState | RouterState] = {}
        self.layers: list[Layer] = []
        for layer in unify_layers(inner):
            try:
                state = _make_state(layer, expert_groups(inner))
            except UserError as error:
                self.layers.append(Layer(layer.name, 0, 0, None, str(error)))
                continue
            self._states[layer.name] = state
            probed = state.probed
            self.layers.append(Layer(layer.name, probed.num_experts, probed.top_k, probed.bias, probed.reason))
        if not self._states:
            raise UserError(self.layers[0].reason)
        self._policy = policy
        check_policy(policy, list(self._states.values()))
        target = None
        for state in self._states.values():
            state.selects = policy.moves_bias and state.probed.bias == "ours"
            if isinstance(state, RouterState):
                state.follow(policy)
                target = state.router.target_experts_per_token
        self._core = Core(self._states, policy, torch.device("cpu"), steps, target, group)
        self._has_distributed_experts = has_distributed_experts(inner)
        self._counts_here = group is not None or not repeats_tokens(model)
        surrounding = inner.get_submodule(counted_in(inner, [layer.name for layer in self.layers]))
        self._observer = Observer(surrounding, self._states, policy.needs_margins)
        self._listeners: list[Callable[[Load], None]] = []
        self._attachment: Attachment | None = None
        self._has_callback = self._removed = self._ranks_agree = False
        self.load: Load | None = None
        self.steps = 0
        _report(self.layers, policy, type(inner).__name__)

    def step(self, taken: bool = True) -> Load:
        """End an optimizer step: sum the load over the ranks, and update the biases. Collective.

        Args:
            taken: Whether the weights were updated; the load of a skipped step changes no bias.

        Raises:
            UserError: In the first step, no forward of the model was counted on any rank, or a layer received no token,
                or ranks have different layers; or the balancer was removed.
        """
        if self._removed:
            raise UserError("the balancer was removed from the model; call dist_moe.balance again")
        self._place()
        self._check_ranks()
        for state in self._states.values():
            state.adopt()
        if not self._observer.forwards:
            logger.warning("step %d: no forward in training mode since the last step", self.steps + 1)
        if self._counts_here:
            self._core.observe([self._counts_of(name) for name in self._states])
        self._observer.forget()
        rate = self._core.rate if taken else 0.0
        counts = self._core.step() if taken else self._core.discard()
        for state in self._states.values():
            state.write()
        self.steps += 1
        biases = tuple(state.selection_bias.clone() if state.is_balanced else None for state in self._states.values())
        load = Load(self.steps, taken, tuple(self._states), biases, rate, tuple(counts))
        if not self._ranks_agree:
            _refuse_empty(load)
            self._ranks_agree = True
        self.load = load
        for listener in self._listeners:
            listener(load)
        return load

    def attach(self, stepper: Any) -> Attachment:
        """Step by itself, after each step of an optimizer, a GradScaler, an accelerator or a DeepSpeed engine.

        The checkpoints of an accelerator and of an engine then have the state of the balancer.

        Args:
            stepper: What the steps are made with.

        Returns:
            An object whose `remove` detaches the balancer.

        Raises:
            UserError: It is none of these, or the balancer steps already after another one.
        """
        if isinstance(stepper, torch.amp.GradScaler) and self._has_distributed_experts:
            raise UserError(
                "a GradScaler decides on each rank whether a step is skipped, by the gradients of that rank's experts; "
                "train models with distributed experts in bf16 or fp32"
            )
        if self._attachment is not None or self._has_callback:
            raise UserError("the balancer is attached already, and a second one would step twice; detach the first one")
        self._attachment = attach_to(self, stepper)
        return Attachment(self._detach)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = None

    def listen(self, listener: Callable[[Load], None]) -> None:
        """Call a function with the load of each step."""
        self._listeners.append(listener)

    def callback(self, log_dir: str | Path | None = None) -> "TrainerCallback":
        """Return a callback for transformers' Trainer and TRL's trainers.

        It steps after each optimizer step, logs MaxVio with its floor, and keeps the state of the balancer in the
        Trainer's checkpoints.

        Args:
            log_dir: A folder for TensorBoard, with the pictures of the load; None for none.
        """
        from dist_moe.attach.trainer import BalancerCallback  # imports the Trainer

        if self._attachment is not None:
            raise UserError("the balancer is attached already, and would step twice; detach it, or use no callback")
        self._has_callback = True
        return BalancerCallback(self, log_dir)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on; equal on all ranks."""
        return {**self._core.state_dict(), "policy": self._policy.name(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, and give the biases to the model.

        Raises:
            UserError: The state is of other layers, or incomplete.
        """
        self._check_state(state)
        if state["policy"] != self._policy.name():
            logger.warning("the state is of policy=%s, and this balancer has %s", state["policy"], self._policy.name())
        for note in self._core.load_state_dict(state):
            logger.warning("%s", note)
        self.steps = int(state["steps"])
        self._observer.forget()
        for layer in self._states.values():
            layer.write()
            layer.selects = layer.probed.bias == "ours" and (
                self._policy.moves_bias or bool(layer.selection_bias.any())
            )

    def remove(self) -> None:
        """Detach the balancer and take its hooks off the model; a bias of the model keeps its last value."""
        self._detach()
        self._observer.remove()
        self._removed = True

    def _check_state(self, state: Mapping[str, Any]) -> None:
        mine = self.state_dict()
        if missing := [key for key in mine if key not in state]:
            raise UserError(f"the state of the balancer lacks {', '.join(missing)}; give what state_dict() returned")
        if set(state["layers"]) != set(self._states):
            raise UserError(
                f"the state is of the layers {listed(sorted(state['layers']), last='and')}, and the model has "
                f"{listed(sorted(self._states), last='and')}; give the state of a balancer of this model"
            )
        for name, layer in state["layers"].items():
            for key in ("selection_bias", "last_load"):
                experts = len(layer[key]) if key in layer else 0
                if experts != self._states[name].probed.num_experts:
                    raise UserError(
                        f"the state of {name} has a {key} of {counted(experts, 'expert')}, and the layer has "
                        f"{self._states[name].probed.num_experts}; give the state of a balancer of this model"
                    )

    def _counts_of(self, name: str) -> RoutingCounts:
        found = self._observer.window.get(name)
        return self._core.empty_counts(name) if found is None else found

    def _place(self) -> None:
        """Follow the model to its device."""
        router = next(iter(self._states.values())).layer.router
        device = next((each.device for each in router.parameters() if not each.is_meta), torch.device("cpu"))
        if self._core.device != device:
            for state in self._states.values():
                state.to(device)
            self._core.to(device)

    def _check_ranks(self) -> None:
        """Before the first step, refuse ranks with different layers, and give all ranks the biases of the first one."""
        if self._ranks_agree:
            return
        mine = [(layer.name, layer.num_experts, layer.top_k) for layer in self.layers]
        group, device = self._core.group, self._core.device
        everyone = all_gather_objects(_OfRank(mine, self._observer.forwards), _OfRank, group, device)
        for rank, (theirs, _) in enumerate(everyone):
            if theirs != everyone[0].layers:
                raise UserError(
                    f"rank {rank} of the group has {counted(len(theirs), 'MoE layer')} ({_first(theirs)}), and rank 0 "
                    f"{len(everyone[0].layers)} ({_first(everyone[0].layers)}); give as group the ranks with the same "
                    "layers, such as those of one pipeline stage"
                )
        if not any(forwards for _, forwards in everyone):
            raise UserError(
                "no forward of the model in training mode was counted before this step; call model.train(), give "
                "balance() the model that is trained, and step after its forward"
            )
        if self.steps:
            return  # the state was restored
        for state in self._states.values():
            state.read_sharded()
            if len(everyone) > 1:
                dist.broadcast(state.selection_bias, dist.get_global_rank(group, 0) if group else 0, group)


def _make_state(layer: FoundLayer, groups: tuple[int, int]) -> LayerState | RouterState:
    return RouterState(layer, layer.router) if isinstance(layer.router, Router) else LayerState(layer, groups)


class _OfRank(NamedTuple):
    """What ranks compare: name, experts and experts per token of each layer, and the forwards since the last step."""

    layers: list[tuple[str, int, int]]
    forwards: int


def _first(layers: list[tuple[str, int, int]]) -> str:
    return f"{layers[0][0]} with {layers[0][1]} experts" if layers else "none"


def _refuse_empty(load: Load) -> None:
    """Refuse a model whose hooks do not run, and warn of layers that received no token in the first step.

    Raises:
        UserError: No layer received a token.
    """
    empty = [name for name, counts in zip(load.layers, load.counts_LE, strict=True) if not sum(counts)]
    if len(empty) == len(load.layers):
        raise UserError(
            "no layer received a token in the first step: no router was called as a module; call dist_moe.balance "
            "before torch.compile, and without kernels that replace the block"
        )
    if empty:  # such as those of images
        logger.warning("%s received no token in the first step: %s", counted(len(empty), "layer"), empty[0])


def _report(layers: list[Layer], policy: Policy, model: str) -> None:
    """Warn of layers that are not balanced, and say where the biases of the others are."""
    unbalanced = [layer for layer in layers if layer.bias is None]
    if unbalanced and policy.moves_bias:
        logger.warning("%s of %s not balanced: %s", counted(len(unbalanced), "MoE layer"), model, unbalanced[0].reason)
    if count := sum(layer.bias == "ours" for layer in layers):
        logger.info(
            "%s of %s: no selection bias of the model's own; the state of the balancer has it, and checkpoints of the "
            "model lack it",
            counted(count, "MoE layer"),
            model,
        )
