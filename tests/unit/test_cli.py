"""The command line: what each command prints, and how it refuses what it cannot run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dist_moe.cli import main as cli
from dist_moe.config import load_config

DEBUG = Path(__file__).resolve().parents[2] / "configs" / "debug.yaml"
LIMIT_S = 120.0


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_help_names_every_command() -> None:
    told = invoke("--help").output
    for command in ("launch", "train", "evaluate", "generate", "config", "data"):
        assert command in told


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_dry_run_checks_prints_the_command_and_starts_nothing(launcher: str, tmp_path: Path) -> None:
    asked = f"run.dir={tmp_path / 'run'}"
    result = invoke("launch", DEBUG, "--launcher", launcher, "--workers", "3", "--dry-run", asked)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"--module dist_moe train {DEBUG} {asked}\n")
    assert ("bin/deepspeed" if launcher == "deepspeed" else "torch.distributed.run") in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_what_depends_on_the_workers() -> None:
    result = invoke("launch", DEBUG, "--workers", "5", "--dry-run", "parallel.expert_parallel=5")
    assert result.exit_code == 2
    assert result.stdout == ""
    told = one_line(result.stderr)
    assert "train.global_batch_size=12 does not divide among 5 workers" in told
    assert "parallel.expert_parallel=5 does not divide the model's 12 experts" in told


@pytest.mark.parametrize("command", ["launch", "train", "config"])
def test_a_wrong_config_is_told_without_a_traceback(command: str, tmp_path: Path) -> None:
    result = invoke(command, DEBUG, "train.stepz=3", "train.micro_batch_size=0", f"run.dir={tmp_path / 'run'}")
    assert result.exit_code == 2
    assert "train.stepz" in result.stderr and "train.steps" in result.stderr
    assert "train.micro_batch_size=0" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_wrong_in_several_ways_is_reported_whole() -> None:
    wrong = ("train.stepz=3", "train.optimizer=adam", "train.micro_batch=1", "parallel.expert_parallel=5")
    result = invoke("config", DEBUG, "--workers", "5", *wrong, "train.warmup_steps=30")
    assert result.exit_code == 2 and result.stdout == ""
    told = one_line(result.stderr)
    for part in (
        "train.stepz=3 is not a key of train; did you mean train.steps?",
        "train.optimizer=adam should be 'adamw' or 'sgd'",
        "train.micro_batch=1 was renamed; use train.micro_batch_size=1",
        "parallel.expert_parallel=5 does not divide the model's 12 experts",
    ):
        assert part in told
    assert "warmup" not in told, "it is compared with train.steps, whose value is in doubt"


def test_the_printed_config_is_complete_and_loads_back(tmp_path: Path) -> None:
    result = invoke("config", DEBUG, "--workers", "2", "train.steps=5", "run.dir=somewhere")
    assert result.exit_code == 0, result.output
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    config = load_config(printed)
    assert (config.train.steps, config.train.schedule_steps, config.run.dir) == (5, 5, "somewhere")
    assert (config.router.top_k, config.router.score) == (2, "sigmoid")


def test_fetching_shows_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("data", "fetch", "stdlib-code")
    assert result.exit_code == 0, result.output
    assert re.search(r"stdlib-code.*[0-9,]{7,}.*[0-9a-f]{64}", result.stdout)


def test_an_unknown_source_is_told_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path))
    result = invoke("data", "fetch", "stdlib-cod")
    assert result.exit_code == 2
    assert "did you mean 'stdlib-code'?" in one_line(result.stderr)


def worker(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `train` as a launcher would."""
    return subprocess.run(
        [sys.executable, "-m", "dist_moe", "train", *arguments, f"run.dir={tmp_path / 'run'}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_a_worker_reports_a_config_that_does_not_fit_the_workers(tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "5", "LOCAL_RANK": "0"}
    done = worker(tmp_path, str(DEBUG), "--local_rank=0", **place)
    assert done.returncode == 2
    assert done.stderr.startswith("train.global_batch_size=12 does not divide among 5 workers")
    assert "Traceback" not in done.stderr
    assert "ConfigError" in (tmp_path / "run" / "errors" / "rank-0.txt").read_text()


def test_a_worker_refuses_a_place_that_cannot_be(tmp_path: Path) -> None:
    done = worker(tmp_path, str(DEBUG), RANK="7", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "RANK=7 must be below WORLD_SIZE=2" in one_line(done.stderr)
    assert "Traceback" not in done.stderr


def test_the_users_devices_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    cli.restore_visible_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("DIST_MOE_VISIBLE_DEVICES", "2,3")
    cli.restore_visible_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
