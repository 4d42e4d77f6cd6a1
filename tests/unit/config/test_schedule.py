"""The batch and the schedule: what auto and a fraction are, and what a number of workers needs."""

import time

import pytest

from dist_moe.config import ConfigError, load_config, resolve
from dist_moe.config.sections.train import AUTO_SEQUENCES, AUTO_TOKENS
from dist_moe.train.loop import micro_batches
from dist_moe.train.schedule import learning_rate_schedule
from tests.unit.config.files import CONFIGS, debug, violations

QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize(
    ("workers", "micro_batch_size", "accumulation"),
    [(1, 16, 2), (2, 16, 1), (4, 8, 1), (8, 4, 1), (16, 2, 1), (32, 1, 1)],
)
def test_the_quick_start_fits_its_workers(workers: int, micro_batch_size: int, accumulation: int) -> None:
    resolved = resolve(load_config(QUICKSTART), workers)
    assert (resolved.config.train.micro_batch_size, resolved.accumulation) == (micro_batch_size, accumulation)


def test_the_quick_start_with_3_workers_names_those_that_fit() -> None:
    (found,) = violations(load_config(QUICKSTART), 3).values()
    assert str(found) == (
        "train.global_batch_size=32 does not divide among 3 workers; set train.global_batch_size to 30 or 33, or "
        "use 1, 2, 4, 8, 16 or 32 workers"
    )
    (found,) = violations(load_config(QUICKSTART), 999_999_999).values()
    assert "does not divide among 999,999,999 workers; set train.global_batch_size to 999999999, or use 1, " in str(
        found
    )


@pytest.mark.parametrize(
    ("share", "length", "expected"),
    [
        (32, 128, AUTO_SEQUENCES),
        (17, 128, 1),
        (34, 128, 2),
        (24, 128, 12),
        (32, 4096, AUTO_TOKENS // 4096),
        (32, AUTO_TOKENS, 1),
        (32, 10 * AUTO_TOKENS, 1),
    ],
)
def test_auto_is_the_largest_divisor_within_its_bounds(share: int, length: int, expected: int) -> None:
    train = debug(f"train.global_batch_size={2 * share}", "train.micro_batch_size=auto").train
    assert train.micro_batch_for(2, length) == expected


def test_a_number_is_taken_as_it_is() -> None:
    assert debug("train.micro_batch_size=3").train.micro_batch_for(2, 10**6) == 3


def test_auto_has_no_number_without_workers() -> None:
    with pytest.raises(ConfigError, match="depends on the number of workers, which is not known here"):
        _ = debug("train.micro_batch_size=auto").train.sequences_per_forward
    assert debug("train.micro_batch_size=3").train.sequences_per_forward == 3


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ((), 30),
        (("train.steps=20",), 2),
        (("train.steps=20", "train.schedule_steps=300"), 30),
        (("train.warmup_steps=0",), 0),
        (("train.warmup_steps=0.0",), 0),
        (("train.warmup_steps=0.5", "train.steps=1"), 0),
        (("train.warmup_steps=12",), 12),
        (("train.warmup_steps=30", "train.steps=20"), 20),
    ],
)
def test_warmup_is_steps_or_a_fraction_and_ends_with_the_schedule(overrides: tuple[str, ...], length: int) -> None:
    resolved = resolve(load_config(QUICKSTART, overrides), 2)
    assert resolved.config.train.warmup_steps == length
    schedule = learning_rate_schedule(resolved.config)
    assert schedule.warmup_steps == length
    if length:
        assert schedule.learning_rate(length - 1) == 2e-3 and schedule.learning_rate(0) == 2e-3 / length


def test_a_warmup_that_is_cut_says_so() -> None:
    assert resolve(load_config(QUICKSTART, ["train.steps=20"]), 2).notices == ()
    (notice,) = resolve(load_config(QUICKSTART, ["train.steps=20", "train.warmup_steps=30"]), 2).notices
    assert notice == (
        "train.warmup_steps=30 is longer than the schedule of 20 steps, so it is cut to it: the learning rate rises "
        "until the last step"
    )


def test_a_schedule_of_one_step_is_one_step() -> None:
    (notice,) = resolve(load_config(QUICKSTART, ["train.steps=1", "train.warmup_steps=3"]), 2).notices
    assert "longer than the schedule of 1 step, so" in notice


@pytest.mark.parametrize(
    ("overrides", "notices"),
    [
        (
            ("data.vocabulary=300",),
            ["data.vocabulary=300 has no effect with data.tokenizer=bytes; it is the size of a bpe vocabulary"],
        ),
        (
            ("balance.policy=none", "balance.rate=0.1", "balance.schedule=constant"),
            ["balance.rate=0.1 has no effect with balance.policy=none, which has no rate"],
        ),
        (("balance.policy=none", "balance.rate=0.001", "balance.schedule=constant"), []),
        (
            ("balance.auxiliary_scope=sequence",),
            ["balance.auxiliary_scope=sequence has no effect with balance.auxiliary_loss=0, which turns that loss off"],
        ),
        (("balance.auxiliary_scope=sequence", "balance.auxiliary_loss=0.1"), []),
        (
            ("train.optimizer=sgd", "train.betas=[0.9, 0.99]"),
            ["train.betas=[0.9, 0.99] has no effect with train.optimizer=sgd; they are those of adamw"],
        ),
        (
            ("checkpoint.keep_every=3",),
            ["checkpoint.keep_every=3 has no effect with checkpoint.keep_last=0, which keeps every checkpoint"],
        ),
        (("checkpoint.keep_every=3", "checkpoint.keep_last=2"), []),
    ],
)
def test_a_field_without_effect_says_so(overrides: tuple[str, ...], notices: list[str]) -> None:
    assert list(resolve(debug(*overrides), 2).notices) == notices


@pytest.mark.parametrize("value", ["-1", "1.5", "1.0", "true", "x"])
def test_a_warmup_that_is_neither_is_refused(value: str) -> None:
    with pytest.raises(
        ConfigError, match=f"train.warmup_steps={value} should be .*; give the optimizer steps of linear"
    ):
        debug(f"train.warmup_steps={value}")


def test_the_rows_of_the_quick_start_are_those_of_micro_batches_of_16() -> None:
    from dist_moe.comm.mesh import Mesh

    implicit, explicit = (resolve(load_config(QUICKSTART, words), 2) for words in ([], ["train.micro_batch_size=16"]))
    for rank in (0, 1):
        assert micro_batches(implicit, Mesh(2, rank, 2), 3) == micro_batches(explicit, Mesh(2, rank, 2), 3)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("balance.rate=1e39", "balance.rate=1e+39 does not fit in fp32; give a number of at most 3.4e+38"),
        ("model.config.initializer_range=1e300", "model.config.initializer_range=1e+300 does not fit in fp32; give a "),
        (
            "train.steps=10000000000000000000",
            "train.steps=10000000000000000000 does not fit in 64 bits; give an ",
        ),
    ],
)
def test_numbers_that_the_machine_cannot_hold(override: str, line: str) -> None:
    assert any(str(found).startswith(line) for found in violations(debug(override)).values())


def test_a_number_that_reaches_no_tensor_may_be_large() -> None:
    assert not violations(debug("checkpoint.interval_minutes=1e300"))


@pytest.mark.parametrize("workers", [1, 7])
@pytest.mark.parametrize("micro", ["auto", "1", "37"])
def test_a_large_batch_is_checked_in_a_moment(micro: str, workers: int) -> None:
    """963,761,198,400 has more divisors than any smaller number."""
    config = debug("train.global_batch_size=963761198400", f"train.micro_batch_size={micro}")
    begun = time.monotonic()
    lines = [str(found) for found in violations(config, workers).values()]
    assert time.monotonic() - begun < 20
    assert all(len(line) < 1000 for line in lines)


@pytest.mark.parametrize(
    ("override", "bound"),
    [
        ("train.learning_rate=1e31", "1" + "0" * 30),
        ("train.weight_decay=1e7", "1000000"),
        ("train.gradient_clipping=1e31", "1" + "0" * 30),
        ("train.global_batch_size=1000000000001", "1000000000000"),
        ("parallel.timeout_s=1e12", "2000000"),
        ("run.threads=100000", "4096"),
        ("data.vocabulary=1000000000000", "4000000"),
    ],
)
def test_numbers_that_end_in_an_overflow_later(override: str, bound: str) -> None:
    with pytest.raises(ConfigError) as caught:
        debug(override)
    assert f"should be less than or equal to {bound}" in str(caught.value)
