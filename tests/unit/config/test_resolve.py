"""`resolve`: batches, expert parallelism, schedules, and the fields that it fills in."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.config import Config, ConfigError, dump_config, load_config, resolve
from tests.selection import only_first
from tests.unit.config.files import debug, qwen, violations


def test_resolved_has_what_follows_from_the_configuration() -> None:
    resolved = resolve(debug(), workers=4)
    assert (resolved.workers, resolved.expert_parallel, resolved.accumulation, resolved.experts) == (
        4,
        4,
        3,
        12,
    )
    router = resolved.config.router
    assert (router.top_k, router.score, router.normalize, router.scaling_factor) == (2, "sigmoid", True, 1.0)
    assert (router.groups, router.topk_groups) == (1, 1)
    assert resolved.config.train.schedule_steps == 20
    assert resolved.model_config["num_experts_per_tok"] == 2
    assert "vocab_size" not in resolved.model_config
    assert resolved.model_config["eos_token_id"] is None
    assert debug().router.top_k is None


@pytest.mark.parametrize("make", [debug, qwen])
def test_a_resolved_configuration_resolves_to_itself(make: Callable[..., Config], tmp_path: Path) -> None:
    once = resolve(make(), workers=2)
    assert resolve(once.config, workers=2) == once
    (tmp_path / "config.yaml").write_text(dump_config(once.config))
    assert resolve(load_config(tmp_path / "config.yaml"), workers=2) == once


@pytest.mark.parametrize(("workers", "expected"), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (12, 12)])
def test_automatic_expert_parallelism_is_the_largest_common_divisor(workers: int, expected: int) -> None:
    assert resolve(debug(), workers).expert_parallel == expected
    eight = debug("model.config.n_routed_experts=8")
    assert resolve(eight, workers).expert_parallel == {1: 1, 2: 2, 3: 1, 4: 4, 6: 2, 12: 4}[workers]


@pytest.mark.parametrize(
    ("asked", "workers", "line"),
    [
        (3, 8, "does not divide the 8 workers or the model's 8 experts; use 1, 2, 4 or 8"),
        (3, 6, "does not divide the model's 8 experts; use 1 or 2"),
        (4, 6, "does not divide the 6 workers; use 1 or 2"),
        (8, 4, "does not divide the 4 workers; use 1, 2 or 4"),
    ],
)
def test_trap_T35_expert_parallelism_that_does_not_divide_is_reported_first(
    asked: int, workers: int, line: str
) -> None:
    config = qwen(f"parallel.expert_parallel={asked}", "train.global_batch_size=24")
    found = violations(config, workers)
    assert list(found) == ["parallel.expert_parallel"]
    assert str(found["parallel.expert_parallel"]) == f"parallel.expert_parallel={asked} {line}"


@pytest.mark.parametrize("asked", [1, 2, 4])
def test_expert_parallelism_that_divides_is_kept(asked: int) -> None:
    assert resolve(qwen(f"parallel.expert_parallel={asked}"), workers=4).expert_parallel == asked


def with_batch(batch: int, micro: int) -> Config:
    start = debug()
    train = start.train.model_copy(update={"global_batch_size": batch, "micro_batch_size": micro})
    return start.model_copy(update={"train": train})


@pytest.mark.parametrize("workers", only_first([3, 1, 2, 5]))
def test_batches_divide_or_the_remedy_works(workers: int) -> None:
    refused = 0
    for batch in range(1, 14):
        for micro in range(1, 5):
            found = violations(with_batch(batch, micro), workers)
            assert bool(found) == (batch % (workers * micro) != 0)
            if not found:
                assert resolve(with_batch(batch, micro), workers).accumulation * workers * micro == batch
                continue
            refused += 1
            ((key, violation),) = found.items()
            first, _, other = violation.remedy.partition(", or ")
            for number in map(int, re.findall(r"\d+", violation.remedy if key == "train.micro_batch_size" else first)):
                better = (batch, number) if key == "train.micro_batch_size" else (number, micro)
                assert not violations(with_batch(*better), workers)
            for number in map(int, re.findall(r"\d+", other) if key == "train.global_batch_size" else ()):
                assert not violations(with_batch(batch, micro), number)
    assert refused


def test_the_error_lists_the_micro_batches_that_work() -> None:
    found = violations(debug("train.micro_batch_size=5"), workers=2)
    assert str(found["train.micro_batch_size"]) == (
        "train.micro_batch_size=5 does not divide the 6 sequences of each of 2 workers; use 1, 2, 3, 6 or auto"
    )


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.schedule_steps=19", "train.schedule_steps"),
        ("train.momentum=0.5", "train.momentum"),
        ("data.sequence_length=257", "data.sequence_length"),
        ("router.top_k=3", "router.top_k"),
    ],
)
def test_fields_that_contradict_each_other(override: str, key: str) -> None:
    assert list(violations(debug(override))) == [key]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.schedule_steps=20",),
        ("train.schedule_steps=100", "train.warmup_steps=100"),
        ("train.warmup_steps=20",),
        ("train.warmup_steps=21",),
        ("train.warmup_steps=0.5",),
        ("train.momentum=0.5", "train.optimizer=sgd"),
        ("data.sequence_length=256",),
        ("router.top_k=2",),
    ],
)
def test_fields_that_fit_together(overrides: tuple[str, ...]) -> None:
    assert not violations(debug(*overrides))


@pytest.mark.parametrize("choice", ["model.cross_entropy=liger", "model.moe_kernels=triton"])
@pytest.mark.parametrize("backend", ["gloo", "mpi"])
def test_what_needs_a_gpu_is_refused_with_a_backend_of_the_cpu(choice: str, backend: str) -> None:
    found = violations(debug(choice, f"parallel.backend={backend}"))
    assert list(map(str, found.values())) == [
        f"{choice} needs a GPU, and parallel.backend={backend} computes on the CPU; "
        "use auto, or set parallel.backend=nccl"
    ]


@pytest.mark.parametrize("choice", ["model.cross_entropy=liger", "model.moe_kernels=triton"])
@pytest.mark.parametrize("backend", ["auto", "nccl"])
def test_what_needs_a_gpu_is_left_to_the_workers_with_other_backends(choice: str, backend: str) -> None:
    assert not violations(debug(choice, f"parallel.backend={backend}"))


def test_workers_are_positive() -> None:
    with pytest.raises(ConfigError, match="workers=0 is not positive"):
        resolve(debug(), workers=0)


def test_all_violations_are_reported_at_once() -> None:
    overrides = (
        *("model.config.n_group=5", "router.top_k=3", "parallel.expert_parallel=5", "train.schedule_steps=2"),
        *("model.config.num_hidden_layers=1", "data.sequence_length=500", "model.config.hiden_size=48"),
    )
    assert set(violations(debug(*overrides), workers=5)) == {
        *("model.config.n_group", "router.top_k", "parallel.expert_parallel", "train.schedule_steps"),
        *("model.config.first_k_dense_replace", "data.sequence_length", "model.config.hiden_size"),
        "train.global_batch_size",
    }


def test_a_model_that_its_class_refuses_does_not_hide_the_rest() -> None:
    overrides = ("model.config.hidden_size='48'", "model.config.rms_norm_eps=1", "parallel.expert_parallel=5")
    found = violations(debug(*overrides), workers=10)
    assert set(found) == {
        *("model.config.hidden_size", "model.config.rms_norm_eps", "parallel.expert_parallel"),
        "train.global_batch_size",
    }
    assert found["model.config.hidden_size"].rule == "should be a whole number"
