"""A copy of a router with random weights: a model's own router is never called, and nothing of it is changed.

What a router computes of its logits does not depend on its weights, so the copy has the same rule. It is on the CPU and
in fp32, also of a model that is on the meta device, in bf16, or sharded by FSDP2 or ZeRO-3.

Shapes: T tokens, D model width, E experts.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.probe.own_bias import OwnBias, full_shape

TOKENS = 256
TOKEN_IDS = "input_ids"
"""The argument of a router that selects by the ids of the tokens."""
NOT_COPIED = ("_parameters", "_buffers", "_modules", "forward")
"""Attributes of a module; `forward` is one where a framework has wrapped it on the instance."""


class Call(NamedTuple):
    """A call of a router.

    Attributes:
        hidden_TD: The random tokens, which require gradients.
        returned: What the router returned, as a sequence.
        gate_logits: What its child `gate` returned; None without one.
    """

    hidden_TD: Tensor
    returned: Sequence[Any]
    gate_logits: Tensor | None


class RouterCopy:
    """A router of the same structure with random weights, without hooks.

    Args:
        router: The router.
        own: The selection bias of the model.

    Attributes:
        hidden_TD: The random tokens.
        table: Name of the buffer with the experts of each token id [V, K], of a router that is called with the ids of
            the tokens; None for none.

    Raises:
        UserError: The router has no matrix.
    """

    def __init__(self, router: nn.Module, own: OwnBias | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self._own = own
        self._copies: dict[nn.Module, nn.Module] = {}
        self._router = self._copy(router, generator)
        self.table = find_table(router)
        matrix = next((each for each in self._router.parameters() if each.ndim == 2), None)
        if matrix is None:
            raise UserError("the router has no matrix")
        self.hidden_TD = torch.randn(TOKENS, matrix.shape[1], generator=generator)

    @property
    def router(self) -> nn.Module:
        """The copy."""
        return self._router

    def parameters(self) -> list[tuple[str, Tensor]]:
        """Return its parameters by name."""
        return list(self._router.named_parameters())

    def call(self, bias_E: Tensor | None) -> Call:
        """Call the router as its block does: with the hidden states, and with the block's bias where it takes one.

        Args:
            bias_E: The model's own bias, or one value for all experts [1]; None where it has none.

        Raises:
            UserError: It takes something else.
        """
        named = {}
        if bias_E is not None and self._own is not None:
            if self._own.argument is not None:
                named[self._own.argument] = bias_E
            else:
                holder = getattr(self._copies[self._own.owner], self._own.name)
                holder.data = bias_E.expand(holder.numel()).reshape(holder.shape)
        parameters = list(inspect.signature(self._router.forward).parameters.values())[1:]
        if self.table is not None:
            named[TOKEN_IDS] = self._token_ids(self.table)
        required = [each.name for each in parameters if each.default is each.empty and each.kind not in _ANY_NUMBER]
        if missing := [name for name in required if name not in named]:
            raise UserError(f"the router is called with {', '.join(missing)} besides the hidden states")
        hidden_TD = self.hidden_TD.clone().requires_grad_()
        gate_logits: list[Tensor] = []
        gate = getattr(self._router, "gate", None)
        if isinstance(gate, nn.Module):
            handle = gate.register_forward_hook(lambda module, args, output: gate_logits.append(output))
        try:
            returned = self._run(hidden_TD, named)
        finally:
            if isinstance(gate, nn.Module):
                handle.remove()
        values = returned if isinstance(returned, tuple | list) else [returned]
        return Call(hidden_TD, values, gate_logits[-1] if gate_logits else None)

    def _token_ids(self, table: str) -> Tensor:
        return torch.arange(TOKENS) % len(self._router.get_buffer(table))

    def draw_table(self, experts: int) -> Tensor:
        """Fill the table of the copy with random ids of experts -> those of the tokens of a call [T, K]."""
        assert self.table is not None
        table_VK = self._router.get_buffer(self.table)
        table_VK.copy_(torch.randint(experts, table_VK.shape, generator=torch.Generator().manual_seed(3)))
        return table_VK[self._token_ids(self.table)].long()

    def _run(self, hidden_TD: Tensor, named: dict[str, Tensor]) -> Any:
        errors: list[Exception] = []
        for hidden in (hidden_TD, hidden_TD.unsqueeze(0)):  # [T, D], or [B, S, D] where it needs that
            try:
                return self._router(hidden, **named)
            except Exception as error:  # routers of another library raise errors of any type
                errors.append(error)
        raise UserError(f"the router fails on random tokens ({type(errors[-1]).__name__}: {errors[-1]})")

    def _copy(self, module: nn.Module, generator: torch.Generator) -> nn.Module:
        copied: nn.Module = object.__new__(type(module))  # the classes of FSDP2 have a `__new__` that needs arguments
        attributes = {key: value for key, value in vars(module).items() if key not in NOT_COPIED}
        vars(copied).update({key: type(value)() if _is_hooks(key) else value for key, value in attributes.items()})
        vars(copied).update(
            _parameters={key: _random(value, generator) for key, value in module._parameters.items()},
            _buffers={key: _on_cpu(value) for key, value in module._buffers.items()},
            _modules={key: value and self._copy(value, generator) for key, value in module._modules.items()},
        )
        self._copies[module] = copied
        return copied


def find_table(router: nn.Module) -> str | None:
    """Return the name of a router's table of the experts of each token id; None where it has none."""
    if TOKEN_IDS not in inspect.signature(type(router).forward).parameters:
        return None
    buffers = router.named_buffers(recurse=False)
    return next((name for name, each in buffers if each.ndim == 2 and not each.is_floating_point()), None)


_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _is_hooks(key: str) -> bool:
    return key.startswith("_") and key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


def _random(value: nn.Parameter | None, generator: torch.Generator) -> nn.Parameter | None:
    """Draw a parameter of the same shape: logits then have a deviation of about 2, which tells gate functions apart."""
    if value is None:
        return None
    shape = full_shape(value)
    if not value.is_floating_point():
        return nn.Parameter(torch.zeros(shape, dtype=value.dtype), requires_grad=False)
    drawn = torch.randn(shape, generator=generator)
    drawn = drawn * 2 / shape[-1] ** 0.5 if len(shape) > 1 else 1 + drawn / 8
    return nn.Parameter(drawn, requires_grad=False)


def _on_cpu(value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    if value.is_meta:
        return torch.zeros(value.shape, dtype=dtype)
    return value.detach().to("cpu", dtype, copy=True)
