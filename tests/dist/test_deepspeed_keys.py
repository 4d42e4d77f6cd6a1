"""The table of DeepSpeed's keys: complete against DeepSpeed itself, and what it allows against the fp64 reference."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from dist_moe.config.deepspeed_keys.check import allowed_settings, deepspeed_violations, known_keys
from dist_moe.config.deepspeed_keys.entries import Allowed, Refused, same
from dist_moe.config.deepspeed_keys.table import TABLE
from tests.dist.deepspeed_schema import Key, read_schema
from tests.dist.pool import RankPool
from tests.dist.small import Case, Trace, run_case
from tests.dist.test_engine import assert_gradients, expected, gradients_of
from tests.selection import full

# Allowed key -> values that are not DeepSpeed's defaults. A bucket of 1 element is smaller than any parameter, one of
# 1,500 larger than most.
PROVEN: dict[str, tuple[Any, ...]] = {
    "communication_data_type": ("fp32",),
    "zero_optimization.use_multi_rank_bucket_allreduce": (False,),
    "zero_optimization.reduce_bucket_size": (1, 1500),
    "zero_optimization.allgather_bucket_size": (2, 1000),
    "timers.throughput.enabled": (False,),
    "timers.throughput.synchronized": (False,),
}
ALONE = [{key: value} for key, values in PROVEN.items() for value in values]
PAIRS = [one | other for one, other in itertools.combinations(ALONE, 2) if one.keys() != other.keys()]
TOGETHER = [{key: values[-1] for key, values in PROVEN.items()}]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Settings of DeepSpeed from values by dotted key."""
    settings: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        mapping = settings
        for section in sections:
            mapping = mapping.setdefault(section, {})
        mapping[name] = value
    return settings


def run_cases(rank: int, world_size: int, cases: list[Case]) -> list[Trace]:
    """One engine after the other in the same process."""
    return [run_case(rank, world_size, case) for case in cases]


def prove(ranks: RankPool, workers: int, case: Case, settings: list[dict[str, Any]]) -> None:
    """Each setting gives the gradients of one process, in fp64, or in bf16 for a case in bf16."""
    cases = [dataclasses.replace(case, user_keys=nested(flat)) for flat in settings]
    traces = ranks.run(run_cases, workers, cases, timeout_s=280)
    dtype = torch.bfloat16 if case.bf16 else torch.float64
    _, norm, _ = expected(dtype)
    for index, flat in enumerate(settings):
        found = [one[index] for one in traces]
        assert {one.norms[0] for one in found} == {found[0].norms[0]}, flat
        assert found[0].norms[0] == pytest.approx(norm, rel=0.01 if case.bf16 else 1e-4), flat
        assert_gradients(gradients_of(found, case.learning_rate), 1.0, 0.05 if case.bf16 else 2e-4, dtype)


def test_every_allowed_key_is_proven_with_values_that_pass_the_check() -> None:
    assert PROVEN.keys() == {key for key, entry in TABLE.items() if isinstance(entry, Allowed)}
    for flat in [*ALONE, *PAIRS, *TOGETHER]:
        assert deepspeed_violations(nested(flat)) == []
        assert allowed_settings(nested(flat)) == nested(flat)


@pytest.mark.parametrize(
    ("workers", "expert_parallel", "stage", "settings"),
    [
        pytest.param(2, 2, 0, TOGETHER, id="together-0"),
        pytest.param(2, 2, 1, TOGETHER, id="together-1"),
        pytest.param(2, 2, 2, TOGETHER, id="together-2"),
        *(
            full(workers, expert_parallel, stage, [*ALONE, *PAIRS])
            for workers, expert_parallel in ((2, 1), (2, 2))
            for stage in (0, 1, 2)
        ),
        *(full(4, 2, stage, [*ALONE, *TOGETHER]) for stage in (0, 1, 2)),
    ],
)
def test_gradients_with_allowed_keys_equal_the_reference(
    ranks: RankPool, workers: int, expert_parallel: int, stage: int, settings: list[dict[str, Any]]
) -> None:
    prove(ranks, workers, Case(expert_parallel=expert_parallel, zero_stage=stage, accumulation=2), settings)


@pytest.mark.parametrize(("stage", "settings"), [full(stage, [*ALONE, *TOGETHER]) for stage in (0, 1, 2)])
def test_gradients_with_allowed_keys_in_bf16_equal_the_reference(
    ranks: RankPool, stage: int, settings: list[dict[str, Any]]
) -> None:
    prove(ranks, 2, Case(expert_parallel=2, zero_stage=stage, bf16=True, learning_rate=1e4), settings)


@pytest.mark.parametrize("stage", [full(stage) for stage in (0, 1, 2)])
def test_steps_with_allowed_keys_equal_those_without(ranks: RankPool, stage: int) -> None:
    case = Case(expert_parallel=2, zero_stage=stage, accumulation=2, steps=3, learning_rate=0.1, clipping=1.0)
    cases = [case, *(dataclasses.replace(case, user_keys=nested(flat)) for flat in TOGETHER)]
    for one in ranks.run(run_cases, 2, cases):
        assert one[1].losses == pytest.approx(one[0].losses, rel=1e-5)
        assert one[1].norms == pytest.approx(one[0].norms, rel=1e-4)
        assert all(torch.allclose(one[1].weights[name], one[0].weights[name], atol=1e-5) for name in one[0].weights)


def test_scattered_gradients_are_wrong_as_the_refusal_says(ranks: RankPool) -> None:
    """Where this fails, DeepSpeed may have corrected it: prove the key, and allow it."""
    settings = {"zero_optimization": {"contiguous_gradients": False}}
    assert "gives wrong gradients at ZeRO 1" in str(deepspeed_violations(settings)[0])
    traces = ranks.run(run_case, 2, Case(expert_parallel=2, zero_stage=1, user_keys=settings))
    _, norm, _ = expected()
    assert not math.isclose(traces[0].norms[0], norm, rel_tol=1e-3)


@pytest.fixture(scope="module")
def schema(ranks: RankPool) -> dict[str, Key]:
    """Every key that the installed DeepSpeed reads, by dotted name."""
    read: dict[str, Key] = ranks.run(read_schema, 1)[0]
    return read


def test_the_table_has_every_key_of_the_installed_deepspeed(schema: dict[str, Key]) -> None:
    known = set(known_keys())
    missing = [name for name in schema if not any(covers(one, name, known) for one in prefixes(name))]
    assert missing == [], "give each of them an entry in dist_moe/config/deepspeed_keys"
    assert len(schema) > 200
    assert {"zero_optimization.stage3_prefetch_bucket_size", "checkpoint.writer", "sequence_parallel_size"} <= set(
        schema
    )


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def covers(one: str, name: str, known: set[str]) -> bool:
    """Whether the key is known, or lies below a known key of a mapping that is refused as a whole."""
    return one in known and (one == name or isinstance(TABLE.get(one.rpartition(".")[0]), Refused))


def test_the_table_has_no_key_that_deepspeed_lacks(schema: dict[str, Key]) -> None:
    # Of classes that are named by a value, and of old forms.
    ours = ("optimizer.params.", "scheduler.params.", "scheduler.params", "allgather_size", "aio.thread_count")
    extra = [name for name in known_keys() if name not in schema and not name.startswith(ours)]
    assert [name for name in extra if not any(key.startswith(f"{name}.") for key in schema)] == []


# Key -> the values without effect, where they are not the default of DeepSpeed alone.
OTHER_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "zero_allow_untested_optimizer": (True,),  # always true here
    # Read only with an optimizer on the CPU, or with sequence parallelism.
    "zero_force_ds_cpu_optimizer": (True, False),
    "zero_optimization.cpu_offload_use_pin_memory": (False, True, None),
    "seq_parallel_communication_data_type": ("fp32", None),
    # Null is the default, and off at ZeRO 0, 1 and 2.
    "zero_optimization.overlap_comm": (False, None),
    "zero_optimization.cpu_offload": (False, None),
    "zero_optimization.cpu_offload_param": (False, None),
    "datastates_ckpt": (False, None),
}


def test_a_value_without_effect_is_the_default_of_deepspeed(schema: dict[str, Key]) -> None:
    checked = 0
    for name, entry in TABLE.items():
        if isinstance(entry, Refused) and entry.unless and name in schema and schema[name].has_default:
            expected = OTHER_WITHOUT_EFFECT.get(name, (schema[name].default,))
            assert same(entry.unless, expected), f"{name}: {entry.unless} != {expected}"
            checked += 1
        if isinstance(entry, Refused) and entry.switch is not None:
            switch, off = entry.switch
            assert same(schema[f"{name}.{switch}"].default, off), name
            checked += 1
    assert checked > 60
