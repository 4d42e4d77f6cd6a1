"""DeepSpeed's engine: sharding, reduction, clipping and skipping, with DeepSpeed's defects corrected.

Corrections to DeepSpeed 0.19.8, each covered by a test in tests/dist/test_engine.py:
- It recognizes only experts of its own class. A child module of that class without parameters (`ExpertMarker`) makes
  it use expert groups, and the expert parameters are tagged, so that the experts stay plain modules.
- At ZeRO 0 it clips by the mean of per-rank norms (fp32) or leaves the experts out of the norm (bf16), and in fp32 it
  applies a non-finite gradient. There its clipping is off, and norm, clipping and skipping are done here.
- Its bf16 optimizer at ZeRO 0 runs one step when it starts, which AdamW counts. The count is reset to 0.
- Its first collective compiles an operator for CPUs (up to a minute), after it has started a compiler four times to see
  which operators could be compiled (0.3 s). It is told that none can.
- Its ZeRO and bf16 optimizers import its Muon optimizer, which loads torch's compiler (2 s). That is deferred to the
  first use of Muon.
"""

import contextlib
import functools
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.comm.mesh import Mesh
from dist_moe.engine.flat_gradients import sum_of_squares
from dist_moe.engine.optimizer_shards import (
    STEPS,
    OptimizerFragment,
    inner_optimizer,
    moment_names,
    optimizer_fragments,
)
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router

if not torch.cuda.is_available():
    # DeepSpeed detects its device on import, and warns when it falls back to the CPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups as deepspeed_groups

from dist_moe.engine.zero_optimizer import ZeroOptimizer


@dataclass(frozen=True)
class EngineSettings:
    """The engine's part of the configuration.

    Attributes:
        zero_stage: ZeRO stage, 0 to 2.
        micro_batch_size: Sequences of one micro-batch on one rank.
        accumulation: Micro-batches per optimizer step.
        optimizer: "adamw" or "sgd".
        gradient_clipping: Largest global 2-norm of the gradient; 0 for no clipping.
        bf16: Whether parameters and gradients are bf16, with fp32 master weights.
        betas: AdamW's betas.
        momentum: SGD's momentum.
        user_keys: Keys of DeepSpeed's JSON that the user set, below those of this class.
    """

    zero_stage: int
    micro_batch_size: int
    accumulation: int
    optimizer: str
    gradient_clipping: float
    bf16: bool
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.0
    user_keys: dict[str, Any] = field(default_factory=dict)

    @property
    def moments(self) -> tuple[str, ...]:
        """Names, as in PyTorch, of the optimizer state that exists for every element."""
        return moment_names(self.optimizer, self.momentum)


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step.

    Attributes:
        taken: Whether the step was taken.
        grad_norm: Global 2-norm of the gradient before clipping, over every dense parameter once and every expert of
            every rank once; not finite if the step was skipped.
    """

    taken: bool
    grad_norm: float


class Engine:
    """One DeepSpeed engine. Call `forward`, `backward` and `step` once per micro-batch, in this order."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, settings: EngineSettings, mesh: Mesh) -> None:
        self._engine = engine
        self.settings = settings
        self.mesh = mesh
        self.module: nn.Module = engine.module
        self.device = torch.device(engine.device)

    def forward(self, *inputs: Any) -> Any:
        """Run the module on inputs on the engine's device."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, divided by the number of micro-batches and averaged over the ranks."""
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> StepResult | None:
        """End a micro-batch; after the last one of a step, clip and apply the gradient.

        A step whose gradient is not finite on any rank is skipped on all ranks: weights and moments do not change.

        Returns:
            The result of the optimizer step; None before the last micro-batch.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if not boundary:
            self._engine.step()
            return None
        return self._step_whole() if self.settings.zero_stage == 0 else self._step_sharded()

    @property
    def optimizer_state(self) -> MutableMapping[Tensor, dict[str, Any]]:
        """The optimizer's state, keyed by the `optimizer_tensor`s of `optimizer_fragments`."""
        state: MutableMapping[Tensor, dict[str, Any]] = inner_optimizer(self._engine.optimizer).state
        return state

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer's weights are fp32 and the model's are not."""
        return self.settings.bf16

    def optimizer_fragments(self) -> list[OptimizerFragment]:
        """Return this rank's share of the parameters in the optimizer: a slice at ZeRO 1 and 2, all at ZeRO 0."""
        return optimizer_fragments(self.module, self._engine.optimizer, sharded=self.settings.zero_stage > 0)

    def set_step_counters(self, steps: int, taken: int) -> None:
        """Set DeepSpeed's counters to their values after `steps` steps, of which `taken` were not skipped."""
        self._engine.global_steps = steps
        self._engine.skipped_steps = steps - taken
        self._engine.micro_steps = steps * self.settings.accumulation
        self._engine.global_samples = steps * self._engine.train_batch_size()

    def reset_optimizer_steps(self) -> None:
        """Set the optimizer's own step counts to zero."""
        for state in self.optimizer_state.values():
            if STEPS in state:
                state[STEPS].zero_()

    def _step_sharded(self) -> StepResult:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        taken = not self._engine.optimizer.overflow
        return StepResult(taken, float(norm) if taken else math.nan)

    def _step_whole(self) -> StepResult:
        """Step at ZeRO 0, where gradients are reduced and whole on every rank; norm, clipping and skipping are ours."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = self._global_norm(parameters)
        if not math.isfinite(norm):
            self._skip()
            return StepResult(False, math.nan)
        limit = self.settings.gradient_clipping
        coefficient = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        if coefficient < 1.0:
            for parameter in parameters:
                parameter.grad.mul_(coefficient)  # type: ignore[union-attr]
        self._engine.step()
        return StepResult(True, norm)

    def _global_norm(self, parameters: list[nn.Parameter]) -> float:
        """Return sqrt(dense^2 + sum over the expert-parallel group of expert^2), equal on all ranks."""
        dense, experts = (
            sum_of_squares(
                [p.grad for p in parameters if p.grad is not None and is_moe_param(p) is of_experts], self.device
            )
            for of_experts in (False, True)
        )
        if self.mesh.ep_group is not None:
            dist.all_reduce(experts, group=self.mesh.ep_group)
        return float((dense + experts).sqrt())

    def _skip(self) -> None:
        """End the accumulation window without a step, with DeepSpeed's counters as after a skip of its own."""
        self._engine.zero_grad()
        self._engine.optimizer.zero_grad()
        self._engine.micro_steps += 1
        self._engine.global_steps += 1
        self._engine.skipped_steps += 1


class ExpertMarker(MoE):
    """A child module without parameters, whose class makes DeepSpeed reduce experts over their own groups."""

    def __init__(self, experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: the groups exist already."""


@contextlib.contextmanager
def start_engine(
    module: nn.Module, parameter_groups: list[dict[str, Any]], settings: EngineSettings, mesh: Mesh
) -> Iterator[Engine]:
    """Wrap `module` in an engine for the length of the context. A collective call.

    torch.distributed must be initialized. On exit DeepSpeed's process-wide state is cleared, so that another engine can
    be started in the same process.

    Args:
        module: The model and its loss.
        parameter_groups: Each a dict with "name", "params" and "weight_decay".
        settings: The engine's part of the configuration.
        mesh: The layout of the ranks.
    """
    _quieten()
    _forbid_compilation()
    _import_muon()
    deepspeed.init_distributed(verbose=False)
    group_name = f"ep_size_{mesh.expert_parallel}"
    _make_expert_groups(mesh)
    experts = _tag_experts(module, group_name)
    module.add_module("expert_marker", ExpertMarker(experts))
    if settings.bf16:
        cast_buffers(module)
    optimizer = _make_optimizer(parameter_groups, settings)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_json(settings, mesh.world_size),
        dist_init_required=False,
    )
    if settings.zero_stage > 0:
        ZeroOptimizer.replace(engine.optimizer, settings.user_keys.get("zero_optimization", {}))
    started = Engine(engine, settings, mesh)
    started.reset_optimizer_steps()
    try:
        yield started
    finally:
        engine.destroy()
        _clear_deepspeed()


def deepspeed_json(settings: EngineSettings, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the user's keys, overridden by ours."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "train_batch_size": settings.micro_batch_size * settings.accumulation * world_size,
        # At stage 0 the clipping is done in Engine._step_whole.
        "gradient_clipping": settings.gradient_clipping if settings.zero_stage > 0 else 0.0,
        "bf16": {"enabled": settings.bf16},
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    return _merge(settings.user_keys, ours)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _make_optimizer(parameter_groups: list[dict[str, Any]], settings: EngineSettings) -> torch.optim.Optimizer:
    # The learning rate is 0 here; `Engine.step` sets it before each step, and it scales the weight decay too.
    split = split_params_into_different_moe_groups_for_optimizer(parameter_groups)
    split = [group for group in split if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(split, lr=0.0, betas=settings.betas, fused=True)
    return torch.optim.SGD(split, lr=0.0, momentum=settings.momentum)


def cast_buffers(module: nn.Module) -> None:
    """Cast the buffers that a model saves to bf16, which DeepSpeed leaves in fp32; its layers multiply weights by them.

    Not those of routers, whose state is fp32 in any precision, nor tables that are not saved, as of rotary positions.
    """
    for child in module.modules():
        saved = child._buffers.keys() - child._non_persistent_buffers_set
        for name in () if isinstance(child, Router) else saved:
            buffer = child._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                buffer.data = buffer.data.bfloat16()


def _tag_experts(module: nn.Module, group_name: str) -> int:
    """Tag the expert parameters as DeepSpeed expects; return the experts of a layer over all ranks."""
    experts = 0
    for layer in module.modules():
        if isinstance(layer, ExpertParallelLayer):
            experts = layer.num_experts
            for parameter in layer.local.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = group_name  # type: ignore[attr-defined]
    return experts


def _make_expert_groups(mesh: Mesh) -> None:
    _clear_groups()
    deepspeed_groups._create_expert_and_data_parallel(mesh.expert_parallel)


def _quieten() -> None:
    """Suppress DeepSpeed's start-up messages, and PyTorch's warning to DeepSpeed about a renamed collective."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)


def _forbid_compilation() -> None:
    # Otherwise DeepSpeed makes this table when it first reads it.
    deepspeed.ops.__compatible_ops__ = {}


def _import_muon() -> None:
    """Import the Muon optimizer, which DeepSpeed's optimizers import, with functions that are compiled when called."""
    from deepspeed.runtime import compiler

    # Replaced for this one import: its decorators compile, and nothing else of DeepSpeed is imported with it.
    original = compiler.compile
    compiler.compile = lambda: _compile_on_first_call
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = original


def _compile_on_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)  # called by a function that is compiled: a part of that
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call


def _clear_groups() -> None:
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(deepspeed_groups, name).clear()
        getattr(deepspeed_groups, f"{name}_RANKS").clear()


def _clear_deepspeed() -> None:
    _clear_groups()
    deepspeed_groups._WORLD_GROUP = None
    deepspeed.comm.comm.cdb = None
