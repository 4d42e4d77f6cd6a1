"""The selection bias that a model has of its own: where it is, and how it is read and written.

It may be a buffer, a frozen parameter, also one that FSDP2 or ZeRO-3 has sharded, or an attribute that is None at first
(the layers of DeepSpeed's AutoEP). It is looked up by name at each access: a cast of the model replaces its buffers.

Shapes: E experts.
"""

import inspect
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_moe.probe.layers import FoundLayer


class OwnBias(NamedTuple):
    """A selection bias of a layer.

    Attributes:
        owner: The module that holds it.
        name: Its name there.
        argument: The argument by which the block hands it to the router; None where the router holds it.
    """

    owner: nn.Module
    name: str
    argument: str | None

    @torch.no_grad()
    def read(self) -> Tensor | None:
        """Return it as [E] fp32 on the CPU; None where it has no value yet. Collective where it is sharded."""
        value: Any = getattr(self.owner, self.name)
        if value is None or value.is_meta:
            return None
        if isinstance(value, DTensor):
            value = value.full_tensor()
        elif hasattr(value, "ds_tensor") and value.numel() != value.ds_numel:
            value = _gather(value.ds_tensor, value.ds_process_group)[: value.ds_numel]
        return value.detach().to("cpu", torch.float32, copy=True).flatten()

    def unsharded(self) -> Tensor | None:
        """Return it as [E] in its own precision; None where it is sharded or has no value yet."""
        value: Any = getattr(self.owner, self.name)
        if value is None or value.is_meta or isinstance(value, DTensor) or hasattr(value, "ds_tensor"):
            return None
        return value.detach().flatten()

    @torch.no_grad()
    def write(self, bias_E: Tensor) -> None:
        """Give it a value, in the precision that the model keeps it in; a shard gets its part.

        Args:
            bias_E: fp32.
        """
        value: Any = getattr(self.owner, self.name)
        if value is None:
            setattr(self.owner, self.name, bias_E.clone())
            return
        whole = bias_E.view(full_shape(value))
        if isinstance(value, DTensor):
            shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            for axis, (size, start) in enumerate(zip(shape, offset, strict=True)):
                whole = whole.narrow(axis, min(start, whole.shape[axis]), size)
            value.to_local().copy_(whole)
            return
        if hasattr(value, "ds_tensor"):
            size = value.ds_tensor.numel()
            part = whole.flatten()[dist.get_rank(value.ds_process_group) * size :][:size]
            value.ds_tensor.flatten()[: part.numel()].copy_(part)
        if value.numel() == whole.numel():  # not so for a partitioned parameter outside of its layer's forward
            value.copy_(whole)


def find_own_bias(layer: FoundLayer) -> OwnBias | None:
    """Find what may be the selection bias of a model: a tensor with such a name that is not trained."""
    for owner in layer.router.modules():
        for name, tensor in _tensors(owner):
            if _is_bias(name, tensor):
                return OwnBias(owner, name, None)
    # Of the class: on the instance, frameworks wrap it, some without its signature.
    parameters = list(inspect.signature(type(layer.router).forward).parameters)[2:]
    argument = next((name for name in parameters if "bias" in name), None)
    if argument is None:
        return None
    for owner in (layer.block, layer.experts):
        for name, tensor in _tensors(owner):
            if _is_bias(name, tensor):
                return OwnBias(owner, name, argument)
    # Of AutoEP: None at first, and what an earlier balancer wrote later.
    is_attribute = isinstance(vars(layer.block).get(argument, ""), Tensor | None)
    return OwnBias(layer.block, argument, argument) if is_attribute else None


def full_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor before it was sharded."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    found = {**module._buffers, **module._parameters}
    return [(name, tensor) for name, tensor in found.items() if tensor is not None]


def _is_bias(name: str, tensor: Tensor) -> bool:
    return "bias" in name and name != "bias" and not tensor.requires_grad and tensor.is_floating_point()


def _gather(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat([part.flatten() for part in parts])
