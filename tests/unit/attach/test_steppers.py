"""A balancer follows the steps of an optimizer, a GradScaler, an accelerator and a DeepSpeed engine."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

import dist_moe
from dist_moe.attach.steppers import STATE_KEY, attach_to
from dist_moe.errors import UserError
from tests.attached import make_model, tokens


class Recorder:
    """Stands for a balancer: the steps that it was given, and a state."""

    def __init__(self) -> None:
        self.taken: list[bool] = []
        self.loaded: Any = None

    def step(self, taken: bool = True) -> None:
        self.taken.append(taken)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": len(self.taken)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loaded = dict(state)


class Engine:
    """As DeepSpeed's engine: a step is called after each micro-batch, and is one where these are complete."""

    def __init__(self, stage: int = 1, fp16: bool = False, accumulation: int = 1) -> None:
        self.device = torch.device("cpu")
        self.module, self.stage, self.fp16, self.accumulation = nn.Linear(2, 1), stage, fp16, accumulation
        self.global_steps = self.micro_steps = 0
        self.applied = True
        self.saved: dict[str, Any] = {}

    def step(self, lr_kwargs: Any = None) -> str:
        self.global_steps += self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        return "returned"

    def was_step_applied(self) -> bool:
        return self.applied

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.accumulation == 0

    def zero_optimization_stage(self) -> int:
        return self.stage

    def fp16_enabled(self) -> bool:
        return self.fp16

    def save_checkpoint(self, save_dir: str, tag: str | None = None, client_state: Any = None) -> bool:
        self.saved = {"client": client_state, "tag": tag}
        return True

    def load_checkpoint(self, load_dir: str, tag: str | None = None) -> tuple[str | None, Any]:
        return (f"{load_dir}/1", self.saved["client"]) if self.saved else (None, None)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """On the CPU, of two micro-batches; what accelerate keeps for the process is then as before."""
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()


def weights() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def test_a_step_follows_each_step_of_an_optimizer() -> None:
    recorder, layer = Recorder(), weights()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attachment = attach_to(recorder, optimizer)
    for _ in range(3):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert recorder.taken == [True] * 3
    attachment.remove()
    optimizer.step()
    assert len(recorder.taken) == 3


def test_a_closure_counts_once() -> None:
    recorder, layer = Recorder(), weights()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=4)
    attach_to(recorder, optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert recorder.taken == [True]


def test_a_scheduler_may_wrap_the_optimizer_before_or_after() -> None:
    recorder, layer = Recorder(), weights()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    attach_to(recorder, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    assert recorder.taken == [True]


def test_trap_T97_a_step_that_a_scaler_skips_is_not_taken() -> None:
    recorder, layer = Recorder(), weights()
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    attachment = attach_to(recorder, scaler)
    for factor in (1.0, float("inf"), float("nan"), 1.0):
        scaler.scale(layer(torch.ones(1, 2)).sum() * factor).backward()
        before = layer.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(layer.weight, before) == (factor != 1.0)
    assert recorder.taken == [True, False, False, True]
    attachment.remove()
    assert scaler.step.__func__ is torch.amp.GradScaler.step  # type: ignore[attr-defined]


def test_trap_T97_the_balancer_of_a_scaled_run_keeps_its_bias_in_a_skipped_step() -> None:
    model = make_model("deepseek_v3")
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler("cpu")
    balancer = dist_moe.balance(model, rate=0.25)
    balancer.attach(scaler)
    moved = []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(model(input_ids=tokens(0), labels=tokens(0)).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert balancer.load is not None and balancer.load.tokens == 24
        moved.append([float(bias.abs().max()) for bias in balancer.load.biases if bias is not None])
    assert moved[0] == moved[1] == [0.25, 0.25] and balancer.steps == 3
    assert balancer.state_dict()["taken"] == 2


def test_an_accelerator_steps_once_for_its_micro_batches(accelerator: Accelerator) -> None:
    recorder = Recorder()
    model, optimizer = accelerator.prepare(weights(), torch.optim.SGD(weights().parameters(), lr=0.1))
    attachment = attach_to(recorder, accelerator)
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert recorder.taken == [True, True]
    attachment.remove()
    with accelerator.accumulate(model), accelerator.accumulate(model):
        optimizer.step()
    assert len(recorder.taken) == 2


def test_trap_T97_a_skipped_step_of_an_accelerator_is_not_taken(accelerator: Accelerator) -> None:
    recorder = Recorder()
    optimizer = accelerator.prepare(torch.optim.SGD(weights().parameters(), lr=0.1))
    attach_to(recorder, optimizer)
    for skipped in (False, True):
        optimizer._is_overflow = skipped
        optimizer.step()
    assert recorder.taken == [True, False]


def test_trap_T96_the_state_is_in_the_checkpoint_of_an_accelerator(accelerator: Accelerator, tmp_path: Path) -> None:
    recorder = Recorder()
    accelerator.prepare(weights(), torch.optim.SGD(weights().parameters(), lr=0.1))
    attach_to(recorder, accelerator)
    recorder.step()
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    assert recorder.loaded == {"steps": 1}


def test_an_accelerator_with_none_or_several_optimizers_is_refused(accelerator: Accelerator) -> None:
    with pytest.raises(UserError, match=r"has prepared 0 optimizers; attach after accelerator\.prepare\(\), and with"):
        attach_to(Recorder(), accelerator)
    for _ in range(2):
        accelerator.prepare(torch.optim.SGD(weights().parameters(), lr=0.1))
    with pytest.raises(UserError, match="has prepared 2 optimizers"):
        attach_to(Recorder(), accelerator)


def test_an_accelerator_with_deepspeed_gives_its_engine() -> None:
    class Wrapped:
        engine = Engine()

    class OfDeepSpeed:
        deepspeed_engine_wrapped = Wrapped()

        def register_for_checkpointing(self) -> None: ...
        def prepare(self) -> None: ...

    recorder = Recorder()
    attach_to(recorder, OfDeepSpeed())
    Wrapped.engine.step()
    assert recorder.taken == [True]


def test_an_engine_steps_once_for_its_micro_batches() -> None:
    recorder, engine = Recorder(), Engine(accumulation=3)
    attachment = attach_to(recorder, engine)
    assert [engine.step() for _ in range(7)] == ["returned"] * 7
    assert recorder.taken == [True, True]
    attachment.remove()
    assert engine.step.__func__ is Engine.step  # type: ignore[attr-defined]
    assert engine.save_checkpoint.__func__ is Engine.save_checkpoint  # type: ignore[attr-defined]


def test_trap_T97_a_step_that_an_engine_did_not_apply_is_not_taken() -> None:
    recorder, engine = Recorder(), Engine()
    attach_to(recorder, engine)
    engine.applied = False
    engine.step()
    assert recorder.taken == [False]


@pytest.mark.parametrize(("stage", "fp16", "is_tested"), [(0, False, True), (0, True, False), (1, False, False)])
@pytest.mark.parametrize("holder", ["grad", "_hp_grad"])
def test_trap_T97_at_zero_0_gradients_are_tested_here(
    stage: int, fp16: bool, is_tested: bool, holder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """DeepSpeed applies a NaN there, and says that the step was applied."""
    recorder, engine = Recorder(), Engine(stage, fp16)
    attach_to(recorder, engine)
    for value in (1.0, float("nan"), float("inf"), 2.0):
        setattr(engine.module.weight, holder, torch.full((1, 2), value))
        with caplog.at_level(logging.ERROR, "dist_moe"):
            engine.step()
    assert recorder.taken == ([True, False, False, True] if is_tested else [True] * 4)
    assert len(caplog.messages) == (2 if is_tested else 0)
    assert all("use ZeRO stage 1 or 2, which skip such a step" in message for message in caplog.messages)


def test_trap_T96_the_state_is_in_the_checkpoint_of_an_engine() -> None:
    recorder, engine = Recorder(), Engine()
    attach_to(recorder, engine)
    engine.step()
    given = {"epoch": 3}
    assert engine.save_checkpoint("folder", "tag", given) is True
    assert engine.saved == {"client": {"epoch": 3, STATE_KEY: {"steps": 1}}, "tag": "tag"}
    assert given == {"epoch": 3}, "of the caller"
    assert engine.load_checkpoint("folder")[0] == "folder/1" and recorder.loaded == {"steps": 1}
    engine.save_checkpoint("folder", client_state={"a": 1})
    assert engine.saved["client"] == {"a": 1, STATE_KEY: {"steps": 1}}


def test_a_checkpoint_of_an_engine_without_a_balancer_is_loaded_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, engine = Recorder(), Engine()
    engine.save_checkpoint("folder")
    attach_to(recorder, engine)
    with caplog.at_level(logging.WARNING, "dist_moe"):
        engine.load_checkpoint("folder")
        engine.saved = {}
        assert engine.load_checkpoint("folder") == (None, None)
    assert recorder.loaded is None
    assert caplog.messages == ["the checkpoint folder/1 has no state of the balancer, which starts without one"]


def test_what_makes_no_steps_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"^Linear is no optimizer, GradScaler, Accelerator or DeepSpeed engine; attach one of these, or call "
        r"balancer\.step\(\) once after each optimizer step$",
    ):
        attach_to(Recorder(), weights())
