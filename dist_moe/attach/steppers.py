"""What an optimizer step is in each framework, when the balancer steps with it, and where its state is saved.

PyTorch's optimizers have hooks. DeepSpeed's engines, accelerate's optimizers and GradScalers have none that say whether
a step was skipped, so methods of these instances are wrapped, which nothing else can do; `remove` restores them.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dist_moe.errors import UserError

STATE_KEY = "dist_moe_balancer"
"""Of the client state in a checkpoint of a DeepSpeed engine."""
logger = logging.getLogger("dist_moe")


class Stepped(Protocol):
    """A balancer, as far as it is needed here."""

    def step(self, taken: bool = True) -> Any:
        """End an optimizer step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        ...


class Attachment:
    """The connection of a balancer with an optimizer or engine; `remove` ends it.

    Args:
        undo: Restores what was changed.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Detach the balancer."""
        self._undo()


def attach_to(balancer: Stepped, stepper: Any) -> Attachment:
    """Call the step of a balancer after each optimizer step.

    Args:
        balancer: The balancer.
        stepper: A PyTorch optimizer, a GradScaler, an optimizer of accelerate, an Accelerator, or a DeepSpeed engine.

    Raises:
        UserError: It is none of these, or an Accelerator that has not prepared one optimizer.
    """
    if hasattr(stepper, "train_batch") and hasattr(stepper, "was_step_applied"):
        raise UserError(
            "a PipelineEngine makes its steps within train_batch; call balancer.step(engine.was_step_applied()) after "
            "it, and give dist_moe.balance the ranks of a stage as group"
        )
    if hasattr(stepper, "was_step_applied") and hasattr(stepper, "global_steps"):
        return _follow_engine(balancer, stepper)
    if hasattr(stepper, "register_for_checkpointing") and hasattr(stepper, "prepare"):
        return _follow_accelerator(balancer, stepper)
    if isinstance(stepper, torch.amp.GradScaler):
        return _wrap(
            stepper, "step", lambda optimizer, *_, **__: balancer.step(taken=not _found_inf(stepper, optimizer))
        )
    if hasattr(stepper, "step_was_skipped") and hasattr(stepper, "gradient_state"):
        return _follow_accelerated(balancer, stepper)
    if isinstance(stepper, torch.optim.Optimizer):
        return Attachment(stepper.register_step_post_hook(lambda *_: balancer.step() and None).remove)
    raise UserError(
        f"{type(stepper).__name__} is no optimizer, GradScaler, Accelerator or DeepSpeed engine; attach one of these, "
        "or call balancer.step() once after each optimizer step"
    )


def _follow_accelerator(balancer: Stepped, accelerator: Any) -> Attachment:
    engine = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if engine is not None:
        return _follow_engine(balancer, engine.engine)
    optimizers = accelerator._optimizers
    if len(optimizers) != 1:
        raise UserError(
            f"the accelerator has prepared {len(optimizers)} optimizers; attach after accelerator.prepare(), and with "
            "several, attach the one that trains the model"
        )
    accelerator.register_for_checkpointing(balancer)
    following = _follow_accelerated(balancer, optimizers[0])

    def undo() -> None:
        following.remove()
        accelerator._custom_objects.remove(balancer)

    return Attachment(undo)


def _follow_accelerated(balancer: Stepped, optimizer: Any) -> Attachment:
    """Follow an optimizer of accelerate, whose step does nothing before the last micro-batch."""

    def after(*args: Any, **kwargs: Any) -> None:
        if optimizer.gradient_state.sync_gradients:
            balancer.step(taken=not optimizer.step_was_skipped)

    return _wrap(optimizer, "step", after)


def _follow_engine(balancer: Stepped, engine: Any) -> Attachment:
    """Follow a DeepSpeed engine, whose step is called after each micro-batch, also in its checkpoints."""
    step, save, load = engine.step, engine.save_checkpoint, engine.load_checkpoint

    def step_and_balance(*args: Any, **kwargs: Any) -> Any:
        before, finite = engine.global_steps, _gradients_are_finite(engine)
        returned = step(*args, **kwargs)
        if engine.global_steps > before:
            balancer.step(taken=finite and bool(engine.was_step_applied()))
        return returned

    def save_with_state(save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any) -> Any:
        state = {**(client_state or {}), STATE_KEY: balancer.state_dict()}
        return save(save_dir, tag, state, *args, **kwargs)

    def load_with_state(*args: Any, **kwargs: Any) -> Any:
        path, state = load(*args, **kwargs)
        if path is not None and STATE_KEY in (state or {}):
            balancer.load_state_dict(state[STATE_KEY])
        elif path is not None:
            logger.warning("the checkpoint %s has no state of the balancer, which starts without one", path)
        return path, state

    wrapped = {"step": step_and_balance, "save_checkpoint": save_with_state, "load_checkpoint": load_with_state}
    return _replace_methods(engine, wrapped)


def _gradients_are_finite(engine: Any) -> bool:
    """Whether the gradients of a step are finite where the engine itself does not test it: at ZeRO 0 without fp16.

    It then applies a NaN and reports that the step was applied.
    """
    if engine.zero_optimization_stage() > 0 or engine.fp16_enabled() or not engine.is_gradient_accumulation_boundary():
        return True
    summed = [getattr(each, "_hp_grad", None) for each in engine.module.parameters()]  # of a bf16 model
    own = [each.grad for each in engine.module.parameters()]
    gradients = [each for each in (*summed, *own) if each is not None]
    finite = torch.ones((), dtype=torch.int32, device=engine.device)
    if gradients:
        finite = torch.stack([norm.isfinite() for norm in torch._foreach_norm(gradients)]).all().to(torch.int32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)  # experts of another rank have gradients of their own
    if not finite:
        logger.error(
            "a gradient is not finite, and DeepSpeed applies it at ZeRO stage 0 without fp16; use ZeRO stage 1 or 2, "
            "which skip such a step"
        )
    return bool(finite)


def _found_inf(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    if not scaler.is_enabled():
        return False
    found = scaler._per_optimizer_states[id(optimizer)].get("found_inf_per_device", {})
    return any(float(value) for value in found.values())


def _wrap(owner: Any, name: str, after: Callable[..., Any]) -> Attachment:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        returned = original(*args, **kwargs)
        after(*args, **kwargs)
        return returned

    return _replace_methods(owner, {name: wrapped})


def _replace_methods(owner: Any, methods: Mapping[str, Callable[..., Any]]) -> Attachment:
    earlier = {name: vars(owner)[name] for name in methods if name in vars(owner)}

    def undo() -> None:
        for name in methods:
            delattr(owner, name)
        vars(owner).update(earlier)

    vars(owner).update(methods)
    return Attachment(undo)
