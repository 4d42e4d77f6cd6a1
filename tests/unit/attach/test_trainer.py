"""The callback in transformers' Trainer: steps, logs, checkpoints, and a resumed run that equals a whole one."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerControl, TrainerState, TrainingArguments

import dist_moe
from dist_moe.attach.balancer import Balancer
from dist_moe.attach.load import Load
from dist_moe.attach.trainer import BalancerCallback, _tensors, warn_of_auxiliary_loss
from dist_moe.errors import UserError
from tests.attached import EXPERTS, make_model, tokens, train_on

LENGTH, SEQUENCES, MICRO_BATCHES = 12, 2, 2


@pytest.fixture(autouse=True)
def restored_state() -> Iterator[None]:
    """What accelerate keeps for the process is as before."""
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()


def rows(seed: int, count: int = 64) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(seed, count, LENGTH)]


class Run:
    """A training run with the Trainer, and the load of each of its steps."""

    def __init__(
        self,
        folder: Path,
        family: str = "qwen3_moe",
        policy: str = "momentum",
        model: nn.Module | None = None,
        **arguments: Any,
    ) -> None:
        self.model = make_model(family) if model is None else model
        self.balancer = dist_moe.balance(self.model, policy, rate=0.05)
        self.loads: list[Load] = []
        self.balancer.listen(self.loads.append)
        given = TrainingArguments(
            **{
                "output_dir": str(folder),
                "max_steps": 4,
                "per_device_train_batch_size": SEQUENCES,
                "per_device_eval_batch_size": SEQUENCES,
                "gradient_accumulation_steps": MICRO_BATCHES,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_steps": 2,
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
                **arguments,
            }
        )
        self.callback = self.balancer.callback()
        self.trainer = Trainer(self.model, given, train_dataset=rows(0), eval_dataset=rows(1, 4))
        self.trainer.add_callback(self.callback)

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Of each layer."""
        layers: dict[str, dict[str, Tensor]] = self.balancer.state_dict()["layers"]
        return layers


def same_states(one: Balancer, other: Balancer) -> bool:
    """Bit for bit, with the memory of the rule."""
    first, second = one.state_dict(), other.state_dict()
    pairs = zip(first.pop("layers").values(), second.pop("layers").values(), strict=True)
    return first == second and all(
        layer.keys() == theirs.keys() and all(torch.equal(layer[key], theirs[key]) for key in layer)
        for layer, theirs in pairs
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_optimizer_step_is_one_step_of_the_balancer(tmp_path: Path, checkpointing: bool) -> None:
    run = Run(tmp_path, gradient_checkpointing=checkpointing)
    run.trainer.train()
    assert [load.step for load in run.loads] == [1, 2, 3, 4]
    assert [load.tokens for load in run.loads] == [MICRO_BATCHES * SEQUENCES * LENGTH] * 4
    assert all(sum(counts) == 2 * load.tokens for load in run.loads for counts in load.counts_LE)
    assert all(bool(layer["selection_bias"].any()) for layer in run.state.values())


def test_trap_T94_evaluation_during_training_is_not_counted(tmp_path: Path) -> None:
    plain, evaluated = Run(tmp_path / "a"), Run(tmp_path / "b", eval_strategy="steps", eval_steps=1)
    for run in (plain, evaluated):
        run.trainer.train()
    assert [load.counts_LE for load in evaluated.loads] == [load.counts_LE for load in plain.loads]
    assert len([entry for entry in evaluated.trainer.state.log_history if "eval_loss" in entry]) == 4
    assert same_states(plain.balancer, evaluated.balancer)


def test_the_history_has_the_balance_of_each_step_with_its_floor(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.train()
    *steps, last = run.trainer.state.log_history
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4] and "max_vio" not in last
    for entry, load in zip(steps, run.loads, strict=True):
        assert (entry["max_vio"], entry["max_vio_floor"]) == (load.max_vio, load.max_vio_floor)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_trap_T96_a_resumed_run_continues_as_the_whole_one(tmp_path: Path, family: str) -> None:
    whole = Run(tmp_path, family)
    whole.trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    # The Trainer of transformers 5.17 does not load the experts: checkpoints have a tensor for each of them.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    resumed = Run(tmp_path, family, model=model)
    resumed.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [load.step for load in resumed.loads] == [3, 4]
    assert [load.counts_LE for load in resumed.loads] == [load.counts_LE for load in whole.loads[2:]]
    assert same_states(resumed.balancer, whole.balancer)
    weights = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_run_that_is_resumed_twice(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", max_steps=6)
    whole.trainer.train()
    for steps in (2, 4, 6):
        part = Run(tmp_path / "parts", max_steps=steps, lr_scheduler_type="constant")
        part.trainer.train(resume_from_checkpoint=steps > 2)
    assert part.balancer.steps == 6 and [load.step for load in part.loads] == [5, 6]


def test_a_checkpoint_without_a_balancer_is_resumed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.trainer.remove_callback(run.callback)
    run.trainer.train()
    run = Run(tmp_path)
    with caplog.at_level(logging.WARNING, "dist_moe"):
        run.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (
        "training resumes at step 2 from a checkpoint without a balancer, which starts without a state" in caplog.text
    )
    assert [load.step for load in run.loads] == [1, 2]
    run = Run(tmp_path, max_steps=5)
    run.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [load.step for load in run.loads] == [3], "the checkpoint of the resumed run has its state"


def test_callbacks_that_the_trainer_makes_again_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.train()
    again = Run(tmp_path, restore_callback_states_from_checkpoint=True)
    with pytest.raises(
        UserError, match=r"restore_callback_states_from_checkpoint=True makes callbacks again .*; leave it"
    ):
        again.trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("policy", ["loss_free", "momentum", "ema_quantile"])
def test_trap_T96_the_state_survives_json_bit_for_bit(policy: str) -> None:
    model, other = make_model(), make_model()
    balancer, restored = dist_moe.balance(model, policy), dist_moe.balance(other, policy)
    for seed in range(3):
        train_on(model, tokens(seed))
        balancer.step()
    for layer in balancer._states.values():
        layer.selection_bias.add_(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(0)) / 7)
    stored = json.loads(json.dumps(BalancerCallback(balancer).state()))
    restored.load_state_dict(_tensors(stored["attributes"]["balancer"]))
    assert same_states(restored, balancer) and restored.steps == 3


def test_the_saved_model_without_the_bias_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dist_moe"):
        Run(tmp_path / "ours").trainer.train()
    warning = (
        "the selection bias of 2 MoE layers is in trainer_state.json alone: Qwen3MoeForCausalLM has no place for it, "
        "so the saved model routes without it"
    )
    assert caplog.messages == [warning]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dist_moe"):
        run = Run(tmp_path / "own", "deepseek_v3")
        run.trainer.train()
    assert not caplog.messages
    saved = torch.nn.ModuleDict({"model": make_model("deepseek_v3")})["model"]
    loaded = type(saved).from_pretrained(tmp_path / "own" / "checkpoint-4")  # type: ignore[attr-defined]
    for name, layer in run.state.items():
        found = loaded.get_submodule(name).gate.e_score_correction_bias
        assert torch.equal(found, layer["selection_bias"]) and bool(found.any())


def start(callback: Any, model: nn.Module | None = None, gpus: int = 0) -> None:
    arguments: Any = SimpleNamespace(n_gpu=gpus)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)


def test_trap_T97_a_step_that_the_optimizer_skipped_is_not_taken() -> None:
    model = make_model()
    balancer = dist_moe.balance(model)
    callback: Any = balancer.callback()
    taken = []
    for optimizer in (SimpleNamespace(step_was_skipped=True), SimpleNamespace(step_was_skipped=False), object()):
        train_on(model, tokens(0))
        callback.on_optimizer_step(None, TrainerState(), TrainerControl(), optimizer=optimizer)
        assert balancer.load is not None
        taken.append(balancer.load.taken)
    assert taken == [False, True, True]


def test_several_devices_in_one_process_are_refused() -> None:
    callback = dist_moe.balance(make_model()).callback()
    with pytest.raises(UserError, match=r"runs 2 GPUs in one process .*; start one process for each GPU: torchrun"):
        start(callback, gpus=2)
    start(callback, gpus=1)


@pytest.mark.parametrize(
    ("family", "changes", "warning"),
    [
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.01}, "router_aux_loss_coef=0.01"),
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.0}, ""),
        ("qwen3_moe", {"output_router_logits": False, "router_aux_loss_coef": 0.01}, ""),
        ("deepseek_v3", {}, ""),
    ],
)
def test_an_auxiliary_loss_of_the_model_is_warned_of(
    family: str, changes: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family, **changes)
    with caplog.at_level(logging.WARNING, "dist_moe"):
        start(dist_moe.balance(model).callback(), model)
        warn_of_auxiliary_loss(None)
        warn_of_auxiliary_loss(nn.Linear(2, 2))
    expected = f"the model adds its own auxiliary loss ({warning}), which the balancer makes unnecessary; set it to 0"
    assert caplog.messages == ([expected] if warning else [])


def test_the_load_is_written_for_tensorboard(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.remove_callback(run.callback)
    run.trainer.add_callback(run.balancer.callback(tmp_path / "load"))
    run.trainer.train()
    events = EventAccumulator(str(tmp_path / "load"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("1_overview/max_vio")]
    assert found == [(load.step, pytest.approx(load.max_vio)) for load in run.loads]
