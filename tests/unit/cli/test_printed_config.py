"""`dist-moe config` prints what auto and null mean, and the result loads back."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_moe.cli import main as cli
from dist_moe.cli.printed_config import annotate
from dist_moe.config import load_config

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "configs/quickstart.yaml"


def printed(*arguments: str) -> dict[str, str]:
    """The lines of the printed configuration by dotted key, without the key."""
    done = CliRunner().invoke(cli.app, ["config", str(QUICKSTART), *arguments])
    assert done.exit_code == 0, done.output
    found, section = {}, ""
    for line in done.stdout.splitlines():
        name, _, value = line.partition(":")
        section = name if not line.startswith(" ") else section
        found[f"{section}.{name.strip()}"] = value.strip()
    return found


def test_the_values_for_a_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    lines = printed("--workers", "4", "train.precision=fp32", "train.steps=20")
    assert lines["parallel.expert_parallel"] == "4  # auto: the largest divisor of the workers and the 8 experts"
    assert lines["parallel.all_to_all"].startswith("flat  # auto: hierarchical where experts span several hosts")
    assert lines["parallel.backend"].startswith(("gloo  # auto: nccl where each", "nccl  # auto: nccl where each"))
    assert lines["run.threads"] == "2  # auto: the cores of a host divided by its workers"
    assert lines["balance.rule"] == "sign  # null: the default of the policy"
    assert lines["balance.center"] == "false  # null: the default of the policy"
    assert lines["train.micro_batch_size"].startswith("8  # auto: the largest divisor of global_batch_size / workers")
    assert lines["train.warmup_steps"] == "2  # 0.1 of a schedule of 20 steps"
    assert lines["train.schedule_steps"] == "20  # null: train.steps"
    assert lines["train.precision"] == "fp32"


def test_auto_precision_is_that_of_this_host() -> None:
    value, _, comment = printed("--workers", "2")["train.precision"].partition("  # ")
    assert value in ("fp32", "bf16") and comment == "auto: bf16 where the device supports it natively, else fp32"


def test_without_workers_it_says_what_auto_would_be() -> None:
    lines = printed()
    for key in ("parallel.expert_parallel", "parallel.backend", "parallel.all_to_all", "run.threads"):
        assert lines[key].startswith("auto  # auto: "), key
    assert lines["train.micro_batch_size"].startswith("auto  # auto: the largest divisor")


def test_other_hosts_keep_what_depends_on_them() -> None:
    lines = printed("--workers", "2", "cluster.hosts=[{name: a}, {name: b}]", "balance.policy=quantile")
    assert lines["parallel.expert_parallel"].startswith("2  # ")
    for key in ("train.precision", "parallel.backend", "parallel.all_to_all", "run.threads"):
        assert lines[key].startswith("auto  # auto: "), key
    assert lines["balance.center"] == "true  # null: the default of the policy" and "balance.rule" not in lines


def test_the_result_loads_back(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["config", str(QUICKSTART), "--workers", "2"])
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)
    config = load_config(path)
    assert (config.parallel.expert_parallel, config.train.micro_batch_size, config.train.warmup_steps) == (2, 16, 30)
    again = CliRunner().invoke(cli.app, ["config", str(path), "--workers", "2"])
    assert again.exit_code == 0 and load_config(path) == config


def test_comments_are_added_to_the_lines_of_their_keys() -> None:
    text = "a:\n  x: 1\n  m:\n    x: 2\nb:\n  x: 3\n"
    assert annotate(text, {"b.x": "why", "a.y": "never"}) == "a:\n  x: 1\n  m:\n    x: 2\nb:\n  x: 3  # why\n"
