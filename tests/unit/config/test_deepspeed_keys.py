"""train.deepspeed: keys that pass, keys that are refused and why, and files of DeepSpeed."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config import ConfigError, load_config
from dist_moe.config.deepspeed_keys.check import allowed_settings, deepspeed_violations, find_keys, known_keys
from dist_moe.config.deepspeed_keys.entries import Allowed, Refused
from dist_moe.config.deepspeed_keys.page import markdown
from dist_moe.config.deepspeed_keys.table import ENTRIES, TABLE
from dist_moe.config.messages import field_paths
from tests.unit.config.files import CONFIGS

ROOT = Path(__file__).resolve().parents[3]
DEBUG = CONFIGS / "debug.yaml"
# A file as it comes with Hugging Face's trainer, for debug.yaml.
USUAL: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "steps_per_print": 5,
    "wall_clock_breakdown": False,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "wandb": {"enabled": False, "project": "x"},
    "zero_optimization": {
        "stage": 1,
        "allgather_bucket_size": 2e8,
        "reduce_bucket_size": "auto",
        "overlap_comm": False,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "none", "pin_memory": True},
    },
}


def refused(settings: dict[str, Any]) -> list[str]:
    return [str(violation) for violation in deepspeed_violations(settings)]


def of_file(tmp_path: Path, settings: Any, *overrides: str, workers: int | None = None) -> list[str]:
    """What is wrong with a run of debug.yaml that names a file with these settings."""
    path = tmp_path / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    try:
        load_config(DEBUG, [f"train.deepspeed={path}", *overrides], workers)
    except ConfigError as error:
        return [str(violation).removeprefix(f"{path}: ") for violation in error.violations]
    return []


def test_each_key_has_one_entry_and_words() -> None:
    assert len(ENTRIES) == len(TABLE)
    fields = set(field_paths())
    for entry in ENTRIES:
        if isinstance(entry, Refused):
            assert entry.reason.split()[0].endswith("s") and entry.remedy[0].islower(), entry.key
        elif isinstance(entry, Allowed):
            assert entry.effect.startswith(("the ", "whether ")), entry.key
        elif entry.convert is not None:
            assert entry.field in fields, entry.key


def test_the_page_of_the_documentation_is_the_table() -> None:
    page = (ROOT / "docs" / "deepspeed.md").read_text()
    assert page == markdown(), "run `python -m dist_moe.config.deepspeed_keys.page > docs/deepspeed.md`"
    keys = list(known_keys())
    ends = [key.rpartition(".")[2] for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    assert [end for end in ends if f"`{end}`" not in page and f".{end}`" not in page] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zero_optimization": {"contiguous_gradients": False}},
            "train.deepspeed.zero_optimization.contiguous_gradients=false gives wrong gradients at ZeRO 1",
        ),
        (
            {"nonsense_key": 3},
            "train.deepspeed.nonsense_key=3 is not a key of DeepSpeed; the keys that may be set are ",
        ),
        (
            {"gradient_cliping": 0.5},
            "did you mean gradient_clipping, which train.gradient_clipping sets?",
        ),
        (
            {"zero_optimization": {"overlap_com": True}},
            "did you mean zero_optimization.overlap_comm, which is refused?",
        ),
        (
            {"zero_optimization": {"reduce_buket_size": 3}},
            "did you mean train.deepspeed.zero_optimization.reduce_bucket_size?",
        ),
        ({"reduce_bucket_size": 3}, "did you mean train.deepspeed.zero_optimization.reduce_bucket_size?"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "moves the optimizer to the CPU or to a disk",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "none", "pin": 1}}}, "pin=1 is not a key of DeepSpeed"),
        ({"zero_optimization": True}, "train.deepspeed.zero_optimization=true should be a mapping"),
        ({"zero_optimization": None}, "train.deepspeed.zero_optimization=null should be a mapping"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "rounds gradients to few bits"),
        ({"zero_optimization": {"stage3_max_live_parameters": 5}}, "is read at ZeRO 3 alone"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "is a key of MiCS, which DeepSpeed has removed"),
        ({"zero_optimization": {"reduce_scatter": False}}, "ends in an assertion of DeepSpeed at ZeRO 1 and 2"),
        ({"wandb": {"enabled": True}}, "is a monitor of DeepSpeed"),
        ({"elasticity": {"enabled": False}}, "is of a feature that DeepSpeed has removed"),
        ({"fp16": {"enabled": True}}, "is of fp16, which is not supported"),
        ({"communication_data_type": "bf16"}, "communication_data_type=bf16 is not fp32 or null; give the data type"),
        ({"gradient_allreduce_op": "sum"}, "set it to mean"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type=Adam is not set here; remove it; train.optimizer sets it"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "is not a whole number from 1 to 1,000,000,000"),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "is not a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": True}}, "is not a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "is not a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": 1e30}}, "is not a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": float("nan")}}, "is not a whole number"),
        ({"zero_optimization": {"allgather_bucket_size": 3}}, "is not a multiple of 2 from 2"),
        ({"zero_optimization": {"use_multi_rank_bucket_allreduce": 1}}, "is not true or false"),
        ({"timers": {"throughput": True}}, "train.deepspeed.timers.throughput=true should be a mapping"),
        (
            {"wandb": {"nope": 1}},
            "train.deepspeed.wandb.nope=1 is not a key of DeepSpeed; the keys of wandb are enabled, group, team and "
            "project",
        ),
        ({"wandb": {"enable": True}}, "did you mean train.deepspeed.wandb.enabled?"),
        ({"seed": 1}, "train.deepspeed.seed=1 is not a key of DeepSpeed; the keys that may be set are "),
        (
            {"zero_optimization.reduce_bucket_size": 100},
            "train.deepspeed.zero_optimization.reduce_bucket_size=100 is not a key of DeepSpeed, whose names have no "
            "dots; write reduce_bucket_size in the mapping zero_optimization",
        ),
        (
            {"timers": {"throughput.enabled": True}},
            "timers.throughput.enabled=true is not a key of DeepSpeed, whose names have no dots; write enabled in the "
            "mapping throughput in the mapping timers",
        ),
        ({"optimizer.type": "Adam"}, "write type in the mapping optimizer"),
        ({"a.b": 1}, "train.deepspeed.a.b=1 is not a key of DeepSpeed; the keys that may be set are "),
        ({"scheduler": None}, "train.schedule_steps and train.final_learning_rate_ratio set it in DeepSpeed"),
        ({"\x1b[2Jx": 3}, "train.deepspeed.\\x1b[2Jx=3 is not a key of DeepSpeed"),
        ({7: 3}, "train.deepspeed.7=3 is not a key of DeepSpeed"),
    ],
    ids=str,
)
def test_each_refusal_says_why_and_what_to_do(settings: dict[str, Any], message: str) -> None:
    lines = refused(settings)
    assert len(lines) == 1 and message in lines[0], lines


def test_all_violations_come_at_once_and_nothing_else_is_passed_on() -> None:
    settings = {
        "nonsense_key": 3,
        "wandb": {"enabled": True, "entity": "me"},
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5e7, "stage": 2},
    }
    assert [line.split("=")[0].removeprefix("train.deepspeed.") for line in refused(settings)] == [
        *("nonsense_key", "wandb", "wandb.entity", "zero_optimization.overlap_comm", "zero_optimization.stage")
    ]
    assert allowed_settings(settings) == {"zero_optimization": {"reduce_bucket_size": 50_000_000}}


def test_every_key_of_the_table_is_decided_on() -> None:
    """A value that no key has: refused, or named as a field's, or out of range."""
    for key, entry in TABLE.items():
        value: Any = "no such value"
        for part in reversed(key.split(".")):
            value = {part: value}
        assert [one.entry for one in find_keys(value)] == [entry]
        assert len(refused(value)) == 1, key
        assert allowed_settings(value) == {}


def test_a_file_is_read_and_its_allowed_keys_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "usual.json").write_text(json.dumps(USUAL))
    config = load_config(DEBUG, ["train.deepspeed=~/usual.json"], workers=1)
    assert config.train.deepspeed == {"zero_optimization": {"allgather_bucket_size": 200_000_000}}


def test_a_file_that_says_other_than_the_run_names_the_field_and_its_value(tmp_path: Path) -> None:
    other = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-6}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "steps_per_print": "often",
    }
    lines = of_file(tmp_path, other, workers=2)
    assert lines[:2] == [
        "train_batch_size=64 is not what train.global_batch_size=12 sets; set train.global_batch_size=64, "
        "or remove it from the file",
        "train_micro_batch_size_per_gpu=4 is not what train.micro_batch_size=1 sets; set train.micro_batch_size=4, "
        "or remove it from the file",
    ]
    assert lines[2].endswith(" for 2 workers; set train.global_batch_size=16, or remove it from the file")
    assert "optimizer.type=Lamb has no counterpart here (only adamw, adam or sgd has one)" in lines[3]
    assert "set train.learning_rate=0.001," in lines[4]
    assert "set train.betas=[0.9, 0.99]," in lines[5]
    assert "optimizer.params.eps=1e-06 has no other value" in lines[6]
    assert lines[7].startswith("scheduler.type=WarmupLR chooses a schedule of DeepSpeed")
    assert "set train.warmup_steps=100," in lines[8]
    assert "set train.precision=bf16," in lines[9]
    assert lines[10].startswith("zero_optimization.stage=3 has no counterpart here (only 0, 1 or 2 has one)")
    assert lines[11].startswith("steps_per_print=often is not a number; remove it; observe.interval sets it")
    assert len(lines) == 12


def test_the_schedule_of_a_file_is_that_of_the_run(tmp_path: Path) -> None:
    settings = {"scheduler": {"params": {"total_num_steps": 20, "warmup_num_steps": 3}}}
    assert of_file(tmp_path, settings, "train.steps=20", "train.warmup_steps=3") == []
    assert len(of_file(tmp_path, settings, "train.steps=21", "train.warmup_steps=3")) == 1


@pytest.mark.parametrize(
    ("accumulation", "workers", "fits"), [(12, 1, True), (6, 2, True), (6, 1, False), (5, None, False)]
)
def test_the_accumulation_of_a_file_is_that_of_the_run(
    tmp_path: Path, accumulation: int, workers: int | None, fits: bool
) -> None:
    assert (of_file(tmp_path, {"gradient_accumulation_steps": accumulation}, workers=workers) == []) == fits


AUTO = "train.micro_batch_size=auto"


@pytest.mark.parametrize(
    ("accumulation", "workers", "line"),
    [
        (1, 1, None),
        (1, 2, None),
        (2, None, None),
        (
            2,
            2,
            "gradient_accumulation_steps=2 is not what train.global_batch_size=12 and train.micro_batch_size=auto (6) "
            "set for 2 workers; set train.micro_batch_size=3, or remove it from the file",
        ),
        (
            5,
            2,
            "gradient_accumulation_steps=5 is not what train.global_batch_size=12 and train.micro_batch_size=auto (6) "
            "set for 2 workers; remove it from the file",
        ),
        (
            1_000_000_000_000,
            None,
            "gradient_accumulation_steps=1000000000000 does not fit train.global_batch_size=12 and "
            "train.micro_batch_size=auto; remove it from the file",
        ),
        (
            1_000_000_000_000,
            2,
            "gradient_accumulation_steps=1000000000000 is not what train.global_batch_size=12 and "
            "train.micro_batch_size=auto (6) set for 2 workers; remove it from the file",
        ),
    ],
)
def test_the_accumulation_of_a_file_is_that_of_an_automatic_micro_batch(
    tmp_path: Path, accumulation: int, workers: int | None, line: str | None
) -> None:
    lines = of_file(tmp_path, {"gradient_accumulation_steps": accumulation}, AUTO, workers=workers)
    assert lines == ([] if line is None else [line])


def test_the_micro_batch_of_a_file_is_that_of_auto(tmp_path: Path) -> None:
    file = {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 1}
    assert of_file(tmp_path, file, AUTO, workers=2) == []
    assert of_file(tmp_path, file, AUTO) == [], "without a number of workers auto is not known"
    (line,) = of_file(tmp_path, {"train_micro_batch_size_per_gpu": 4}, AUTO, workers=2)
    assert line == (
        "train_micro_batch_size_per_gpu=4 is not what train.micro_batch_size=auto (6) sets; set "
        "train.micro_batch_size=4, or remove it from the file"
    )
    broken = of_file(tmp_path, file, AUTO, "train.global_batch_size=x", workers=2)
    assert len(broken) == 1 and broken[0].startswith("train.global_batch_size=x should be")


def test_a_file_without_mappings_is_refused(tmp_path: Path) -> None:
    lines = of_file(tmp_path, {"zero_optimization.reduce_bucket_size": 100, "scheduler": None})
    assert lines[0].endswith("whose names have no dots; write reduce_bucket_size in the mapping zero_optimization")
    assert lines[1].endswith("train.schedule_steps and train.final_learning_rate_ratio set it")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "cannot be read as JSON (it holds a list, not an object)"),
        ('{"fp16": {}, "fp16": {}}', "gives the key 'fp16' twice"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "it nests too deeply"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_along_with_the_rest(tmp_path: Path, content: str, rule: str) -> None:
    lines = of_file(tmp_path, content, "train.stepz=3")
    assert len(lines) == 2 and any(rule in line for line in lines), lines


def test_a_missing_file_and_one_that_is_none_are_refused(tmp_path: Path) -> None:
    for name in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="give the path of a JSON file of DeepSpeed"):
            load_config(DEBUG, [f"train.deepspeed={name}"])


def test_other_violations_of_a_run_come_along_with_those_of_the_file(tmp_path: Path) -> None:
    lines = of_file(tmp_path, {"train_batch_size": 7, "steps_per_print": 9}, "train.global_batch_size=x")
    assert [line.split("=")[0] for line in lines] == ["train.global_batch_size", "steps_per_print"]


@pytest.mark.parametrize("indent", ["  ", "\t"])
def test_a_deepspeed_file_in_place_of_a_run_is_explained_key_by_key(tmp_path: Path, indent: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**USUAL, "gradient_accumulation_steps": 2, "amp": {}}, indent=indent))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    first, *lines = map(str, caught.value.violations)
    assert first.startswith(f"{path} is a configuration of DeepSpeed, not the YAML file of a run; ")
    assert f"train.deepspeed={path}" in first
    told = {line.split("=")[0]: line for line in lines}
    assert told["train_micro_batch_size_per_gpu"].endswith(
        "set by train.micro_batch_size here; write train.micro_batch_size=1"
    )
    assert told["optimizer.type"].endswith("write train.optimizer=adamw")
    assert told["train_batch_size"].endswith("leaves the value open; leave it out; train.global_batch_size sets it")
    assert "workers * train.micro_batch_size" in told["gradient_accumulation_steps"]
    assert told["zero_optimization.allgather_bucket_size"].endswith(
        "is allowed; write train.deepspeed.zero_optimization.allgather_bucket_size=200000000"
    )
    assert told["wall_clock_breakdown"].endswith("has no effect; leave it out")
    assert "is of a feature that DeepSpeed has removed" in told["amp"]
    keys = [one.key for one in find_keys({**USUAL, "amp": {}})]
    assert sorted(told) == sorted(keys)


def test_a_run_with_the_section_that_deepspeed_has_too_is_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("checkpoint: {interval: 5}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "is a configuration of DeepSpeed" not in str(caught.value)
