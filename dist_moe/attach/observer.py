"""Counts the routing of a model, and selects with a bias where its routers have none.

A forward of the model is counted where it trains: once, also where its layers are computed again in the backward pass.

Shapes: B sequences, S positions, T = B * S tokens, E experts, K experts a token takes.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_moe.attach.router_state import RouterState
from dist_moe.attach.state import FrozenState, LayerState, select_again
from dist_moe.balancing.counts import RoutingCounts, add_counts, count_routing
from dist_moe.balancing.margins import count_margins
from dist_moe.errors import UserError
from dist_moe.model.routing import count_record
from dist_moe.moe.select import bias_inputs, gate_scores
from dist_moe.probe.router_probe import read_results

logger = logging.getLogger("dist_moe")


class Selection:
    """The hook of a router: it selects again with a bias, and hands the results to what counts them.

    A copy of it, as in a copy of the model, selects with the bias of the moment when it was copied, and does not count.

    Args:
        state: The layer; of a copy, its bias alone.
        count: Called with the results of a forward; None for nothing.
    """

    def __init__(self, state: LayerState | FrozenState, count: Callable[[Any], None] | None) -> None:
        self.state, self._count = state, count

    def __call__(self, router: nn.Module, args: tuple[Any, ...], returned: Any) -> Any:
        """Return the results that the block gets; None for those of the router."""
        if self.state.selects:
            returned = select_again(self.state, router, returned)
        if self._count is not None:
            self._count(returned)
        return returned if self.state.selects else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Selection":
        return Selection(self.state.frozen(), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Selection, (self.state.frozen(), None)


class Observer:
    """Counts the layers of a model: by hooks on its routers, or by the records of those of this package.

    Args:
        model: Its forward surrounds what is counted; padding is read from its `attention_mask` [B, S].
        layers: Its layers by name.
        needs_margins: Whether the policy reads the margins.

    Attributes:
        window: The counts since the last step by layer.
        forwards: Forwards in the window.

    Raises:
        UserError: A router has the hook of another observer.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LayerState | RouterState], needs_margins: bool) -> None:
        self._layers, self._needs_margins = dict(layers), needs_margins
        hooked = {name: state for name, state in layers.items() if isinstance(state, LayerState)}
        self._routers = {name: state.router for name, state in layers.items() if isinstance(state, RouterState)}
        self._opened = False
        self._open, self._uncounted = False, 0
        self._mask_T: Tensor | None = None
        self._warned = False
        self._counts: dict[str, RoutingCounts] = {}
        self._gate_logits: dict[str, Tensor] = {}
        self.window: dict[str, RoutingCounts] = {}
        self.forwards = 0
        check_free(model)
        # The first hooks: others, such as those of expert parallelism in transformers, change what a router returned.
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end),
        ]
        for name, state in hooked.items():
            router, count = state.layer.router, functools.partial(self._count, name, state)
            self._handles.append(router.register_forward_hook(Selection(state, count), prepend=True))
            if state.probed.places.logits is None and needs_margins:
                gate = router.get_submodule("gate")
                self._handles.append(gate.register_forward_hook(functools.partial(self._keep_logits, name)))

    def remove(self) -> None:
        """Take the hooks off the model, whose routers are then what they were."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Begin a new window."""
        self.window, self.forwards, self._uncounted = {}, 0, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Observer":
        return _inert_observer()

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_observer, ()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trains = model.training and bool(self._layers)
        # Where layers are checkpointed, the backward pass runs them and not this forward. Where the whole model is, it
        # runs this forward again: in the reentrant form, whose first pass has no gradients, that one counts.
        again = torch._C._current_graph_task_id() != -1
        self._open = trains and torch.is_grad_enabled() and (not again or self._uncounted > 0)
        if trains and not torch.is_grad_enabled():
            self._uncounted += 1
        elif again and self._open:
            self._uncounted -= 1
        self._counts = {}
        self._mask_T = self._mask_of(model, args, kwargs) if self._open else None
        self._opened = self._open or not again
        # Padding is routed, as in transformers: to leave it out, a router would need the mask until the backward.
        for router in self._routers.values() if self._opened else ():
            router.open_record(None)

    def _mask_of(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            with contextlib.suppress(TypeError, ValueError):
                mask = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask.bool().flatten()
        if mask is not None:
            self._warn_of_mask()
        return None

    def _fitting_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return the mask of this forward, if it is of so many tokens."""
        if self._mask_T is not None and len(self._mask_T) != tokens:
            self._warn_of_mask()
            return None
        return None if self._mask_T is None else self._mask_T.to(device)

    def _warn_of_mask(self) -> None:
        if not self._warned:
            logger.warning("padding is counted: the attention mask is not [sequences, positions] of these tokens")
        self._warned = True

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name, router in self._routers.items() if self._opened else ():
            if not router.has_record:
                continue
            record = router.close_record()
            if self._open:
                mask_T = self._fitting_mask(len(record.ids_TK), record.ids_TK.device)
                ids_TK = record.ids_TK if mask_T is None else record.ids_TK.masked_fill(~mask_T.unsqueeze(1), -1)
                counted = record._replace(ids_TK=ids_TK, mask_T=mask_T)
                self._counts[name] = count_record(router, counted, self._needs_margins)
        if self._open:
            for name, counts in self._counts.items():
                earlier = self.window.get(name)
                self.window[name] = counts if earlier is None else add_counts([earlier], [counts])[0]
            self.forwards += 1
        self._open, self._opened, self._counts = False, False, {}

    def _keep_logits(self, name: str, gate: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._gate_logits[name] = output.detach()

    @torch.no_grad()
    def _count(self, name: str, state: LayerState, returned: Any) -> None:
        gate_logits = self._gate_logits.pop(name, None)
        if not self._open:
            return
        results = read_results(returned, state.probed.places, gate_logits)
        ids_TK = results.ids_TK.long()
        mask_T = self._fitting_mask(len(ids_TK), ids_TK.device)
        if mask_T is not None:
            ids_TK = ids_TK.masked_fill(~mask_T.unsqueeze(1), -1)
        counts = count_routing(ids_TK, state.probed.num_experts, state.probed.top_k)
        if self._needs_margins and state.probed.rule is not None and results.logits_TE is not None:
            logits_TE, rule = results.logits_TE.float(), state.probed.rule
            bias_E = state.selection_bias.to(logits_TE.device)
            over_logits = bias_inputs(rule, bias_E).logit_bias_E is not None
            scores_TE = logits_TE if over_logits else gate_scores(logits_TE, rule.score)
            counts = counts._replace(margins_EQ=count_margins(scores_TE, bias_E, rule.top_k, mask_T))
        earlier = self._counts.get(name)  # of a model that runs a layer more than once
        self._counts[name] = counts if earlier is None else add_counts([earlier], [counts])[0]


def check_free(model: nn.Module) -> None:
    """Refuse a model that an observer counts.

    Raises:
        UserError: One does.
    """
    for module in model.modules():
        owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
        counted = any(isinstance(owner, Observer) and owner._layers for owner in owners)
        if counted or any(isinstance(hook, Selection) for hook in module._forward_hooks.values()):
            raise UserError(
                "the model has a balancer already; call its remove() before another one is made, and before the model "
                "is routed"
            )


def _inert_observer() -> Observer:
    """Return what a copy of a model has in place of an observer: it counts nothing."""
    return Observer(nn.Identity(), {}, needs_margins=False)
