"""Runs whose steps are all skipped: they end with the layer, the rank and the documents, and what was saved stays."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_moe.checkpoint.format.layout import step_folders
from dist_moe.engine.train_state import TrainState
from dist_moe.health.nonfinite import NonFiniteMonitor, find_origin
from dist_moe.train.loop import micro_batches
from tests.dist.loaded import run_loaded
from tests.dist.pool import RankPool
from tests.dist.resumable import command, overrides_of, started, steps, write_text

Gradients = tuple[Tensor | None, ...]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def spoil_output(training: TrainState) -> None:
    """Rank 1's first MoE layer gives NaN from its second forward on."""
    if training.engine.mesh.rank != 1:
        return
    calls: list[int] = []

    def spoil(_: nn.Module, __: object, output: Tensor) -> Tensor:
        calls.append(1)
        return output * torch.nan if len(calls) > 1 else output

    training.task.get_submodule("model.model.layers.1.mlp").register_forward_hook(spoil)


def spoil_gradient(training: TrainState) -> None:
    """The gradient at the input of rank 0's dense layer is infinite; all values of the forward are finite."""

    def spoil(_: nn.Module, inputs: Gradients, __: Gradients) -> Gradients:
        return (None if inputs[0] is None else inputs[0] * torch.inf, *inputs[1:])

    if training.engine.mesh.rank == 0:
        training.task.get_submodule("model.model.layers.0.mlp").register_full_backward_hook(spoil)


def spoil_weight(training: TrainState) -> None:
    """One weight of one expert on rank 1 is infinite."""
    if training.engine.mesh.rank == 1:
        local = training.task.get_submodule("model.model.layers.2.mlp.experts.local")
        local.get_parameter("down_proj").data[0, 0, 0] = torch.inf


def spoil_nothing(training: TrainState) -> None:
    """Nothing."""


def searched(rank: int, world_size: int, text: Path, folder: Path, spoil: Callable[[TrainState], None]) -> str:
    """Spoil a run and and return the monitor's error for its first step."""
    with started(rank, world_size, overrides_of(text, folder)) as (resolved, training):
        spoil(training)
        parts, scale = micro_batches(resolved, training.engine.mesh, 1), torch.tensor(1 / 64)
        error = NonFiniteMonitor(1).error(training, 1, parts, (scale, scale), None)
        assert all(parameter.grad is None for parameter in training.task.parameters())
        assert training.balancer.steps_taken == 0
        return str(error)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_output, "rank 1: forward, in model.model.layers.1.mlp of micro-batch 2 with text from "),
        (spoil_gradient, "rank 0: backward, at model.model.layers.0."),
        (spoil_weight, "rank 1: the weights model.model.layers.2.mlp.experts.local.down_proj themselves"),
        (spoil_nothing, "every micro-batch was finite on every rank"),
    ],
)
def test_the_layer_the_rank_and_the_documents_are_named(
    ranks: RankPool, text: Path, tmp_path: Path, spoil: Callable[[TrainState], None], told: str
) -> None:
    first, second = ranks.run(searched, 2, text, tmp_path, spoil)
    assert first == second
    assert told in first
    names = re.search(r"with text from ([^;]+)", first)
    if names is not None:
        assert re.fullmatch(r"[0-9a-f]{16}(, [0-9a-f]{16})*", names[1].removesuffix(" (and later on rank 0)"))


@pytest.mark.slow
def test_a_run_that_only_skips_ends_and_leaves_its_checkpoints(text: Path, tmp_path: Path) -> None:
    """A learning rate at which the weights leave what can be squared: three skipped steps, and an error."""
    run = tmp_path / "run"
    argv = command(
        text, run, "train.steps=12", "train.schedule_steps=20", "train.learning_rate=1e25", "train.warmup_steps=0",
        "checkpoint.interval=1", "checkpoint.keep_last=1", "train.skip_limit=3",
    )  # fmt: skip
    done = run_loaded(argv, tmp_path)
    assert done.returncode == 2, done.stderr
    logged = steps(run)
    taken, skipped = [[step for step in logged if logged[step]["skipped"] is flag] for flag in (False, True)]
    assert len(skipped) == 3 and max(taken) == min(skipped) - 1
    assert f"3 consecutive steps were skipped, up to step {skipped[-1]}" in done.stderr
    assert re.search(r"rank 0: (forward, in|backward, at) ", done.stderr) and "Traceback" not in done.stderr
    kept = [step for step, _ in step_folders(run / "checkpoints")]
    assert kept == [max(taken), *skipped[:-1]], "no step that was skipped has deleted the last good one"
    assert f"step-{skipped[-2]:06d}; lower train.learning_rate" in done.stderr


def overflowing(rank: int, world_size: int, text: Path, folder: Path) -> list[str]:
    """The loss of a step times 1e38 is not finite, and its gradient neither: told with this scale, and with 1."""
    with started(rank, world_size, overrides_of(text, folder)) as (resolved, training):
        batches = [
            training.stream.batch(part.first, part.count) for part in micro_batches(resolved, training.engine.mesh, 1)
        ]
        scales = [torch.tensor(value) for value in (1e38, 1.0)]
        found = [find_origin(training.task, batches, (scale, scale), training.engine.device) for scale in scales]
        return ["" if origin is None else origin.what for origin in found]


def test_a_step_is_made_again_with_its_own_scale(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    for own, other in ranks.run(overflowing, 2, text, tmp_path):
        assert own == "forward, in the loss" and other == ""


def test_find_origin_is_silent_about_what_is_finite() -> None:
    scales = (torch.ones(()), torch.ones(()))
    assert find_origin(nn.Linear(2, 2), [], scales, torch.device("cpu")) is None
