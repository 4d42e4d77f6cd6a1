"""The command line: what each command prints, and how it refuses what it cannot run."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import dist_moe
from dist_moe.cli import main as cli
from dist_moe.cli.messages import set_up_logging
from dist_moe.cli.run import restore_visible_devices
from dist_moe.config import load_config

DEBUG = Path(__file__).resolve().parents[2] / "configs" / "debug.yaml"
QUICKSTART = DEBUG.with_name("quickstart.yaml")
LIMIT_S = 120.0


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def quiet_loggers() -> Iterator[logging.Logger]:
    """The package's logger, restored after the test."""
    logger = logging.getLogger("dist_moe")
    level, handlers = logger.level, list(logger.handlers)
    yield logger
    logger.setLevel(level)
    logger.handlers[:] = handlers


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_help_names_every_command() -> None:
    output = invoke("--help").output
    for command in ("launch", "train", "doctor", "evaluate", "generate", "config", "data", "study", "checkpoint"):
        assert command in output


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"dist-moe {dist_moe.__version__}\n")


def test_completion_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in invoke("--help").output
    argv = [sys.executable, "-m", "dist_moe"]
    asked = {"_DIST_MOE_COMPLETE": "complete_bash", "COMP_WORDS": "dist-moe stu", "COMP_CWORD": "1"}
    done = subprocess.run(argv, env={**os.environ, **asked}, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout.split() == ["study"], done.stderr


@pytest.mark.parametrize("arguments", [("-v", "launch"), ("launch", "--verbose")])
def test_verbose_reports_what_is_decided(
    arguments: tuple[str, ...], tmp_path: Path, quiet_loggers: logging.Logger
) -> None:
    result = invoke(*arguments, DEBUG, "--launcher", "torchrun", "--dry-run", f"run.dir={tmp_path}")
    assert "dist_moe.launch.job: launcher torchrun: 2 workers on this host\n" in result.stderr
    assert f"train {DEBUG} \\\n    --verbose run.dir={tmp_path}\n" in result.stdout, "the workers report too"
    assert quiet_loggers.level == logging.INFO


def test_without_verbose_nothing_is_reported(tmp_path: Path, quiet_loggers: logging.Logger) -> None:
    result = invoke("launch", DEBUG, "--launcher", "torchrun", "--dry-run", f"run.dir={tmp_path}")
    assert result.stderr == "" and "--verbose" not in result.stdout


def test_verbose_reports_on_rank_0_alone(monkeypatch: pytest.MonkeyPatch, quiet_loggers: logging.Logger) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    set_up_logging()
    assert not quiet_loggers.isEnabledFor(logging.INFO) and quiet_loggers.isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_dry_run_prints_the_command_and_starts_nothing(launcher: str, tmp_path: Path) -> None:
    asked = f"run.dir={tmp_path / 'run'}"
    result = invoke("launch", DEBUG, "--launcher", launcher, "--workers", "3", "--dry-run", asked)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"--module dist_moe train {DEBUG} {asked}\n")
    assert ("dist_moe.launch.deepspeed_host" if launcher == "deepspeed" else "torch.distributed.run") in result.stdout
    assert not (tmp_path / "run").exists()
    assert os.environ["PATH"] not in result.stdout, "only what differs"
    assert max(map(len, result.stdout.splitlines())) < 200


def test_dry_run_checks_the_number_of_workers() -> None:
    result = invoke("launch", DEBUG, "--workers", "5", "--dry-run", "parallel.expert_parallel=5")
    assert result.exit_code == 2
    assert result.stdout == ""
    message = one_line(result.stderr)
    assert "train.global_batch_size=12 does not divide among 5 workers" in message
    assert "parallel.expert_parallel=5 does not divide the model's 12 experts" in message


@pytest.mark.parametrize("command", ["launch", "train", "config"])
def test_invalid_config_is_reported_without_a_traceback(command: str, tmp_path: Path) -> None:
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
    message = one_line(result.stderr)
    for part in (
        "train.stepz=3 is not a key of train; did you mean train.steps?",
        "train.optimizer=adam should be 'adamw' or 'sgd'",
        "train.micro_batch=1 was renamed; use train.micro_batch_size=1",
        "parallel.expert_parallel=5 does not divide the model's 12 experts",
    ):
        assert part in message
    assert "warmup" not in message, "it is compared with train.steps, whose value is in doubt"


@pytest.mark.parametrize("command", ["launch", "config", "doctor"])
def test_the_model_and_the_text_are_tried_before_a_process_starts(command: str, tmp_path: Path) -> None:
    wrong = ("model.config.rope_parameters={rope_type: yarnn, factor: 4.0}", f"data.sources={tmp_path}/none.txt")
    result = invoke(command, DEBUG, *wrong, "train.schedule_steps=1", f"run.dir={tmp_path / 'run'}")
    assert result.exit_code == 2 and result.stdout == (f"checking {DEBUG}\n" if command == "launch" else "")
    message = one_line(result.stderr)
    for part in (
        "has the rope_type yarnn, which transformers does not know; did you mean yarn?",
        f"data.sources={tmp_path}/none.txt is not stdlib-code, shakespeare or brown and matches no .txt or .jsonl file",
        "train.schedule_steps=1 is shorter than train.steps=20",
    ):
        assert part in message
    assert "Traceback" not in result.output


def test_a_broken_field_does_not_hide_the_model_and_the_text(tmp_path: Path) -> None:
    wrong = ("train.stepz=3", "model.config.rope_parameters={factor: 4.0}", f"data.sources={tmp_path}/none.txt")
    message = one_line(invoke("config", DEBUG, *wrong, "data.sequence_length=1").stderr)
    for part in ("train.stepz=3 is not a key", "Unrecognized keys in `rope_parameters`", "none.txt is not stdlib-code"):
        assert part in message


def test_text_is_not_looked_at_where_no_worker_runs(tmp_path: Path) -> None:
    text = f"data.sources={tmp_path}/none.txt"
    assert invoke("launch", DEBUG, "--launcher", "slurm", "--dry-run", text).exit_code == 0
    remote = "cluster.hosts=[{name: far, address: 192.0.2.7, slots: 2}]"
    result = invoke("launch", DEBUG, "--launcher", "torchrun", "--dry-run", text, remote)
    assert "none.txt is not" not in result.stderr


@pytest.mark.parametrize(("workers", "code"), [(1, 0), (2, 0), (3, 2), (4, 0), (8, 0)])
def test_the_quick_start_is_checked_for_any_number_of_workers(workers: int, code: int) -> None:
    result = invoke("config", QUICKSTART, "--workers", str(workers))
    assert result.exit_code == code
    assert ("set train.global_batch_size to 30 or 33, or use 1, 2, 4, 8, 16 or 32 workers" in result.stderr) == (
        code == 2
    )


def test_a_notice_is_printed_beside_the_configuration() -> None:
    result = invoke("config", DEBUG, "train.warmup_steps=30")
    assert result.exit_code == 0 and result.stdout.startswith("run:")
    assert result.stderr.startswith(
        "notice: train.warmup_steps=30 is longer than the schedule of 20 steps, so it is cut"
    )
    assert result.stderr.endswith("rises until the last step\n")


def test_printed_config_is_complete_and_loads_back(tmp_path: Path) -> None:
    result = invoke("config", DEBUG, "--workers", "2", "train.steps=5", "run.dir=somewhere")
    assert result.exit_code == 0, result.output
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    config = load_config(printed)
    assert (config.train.steps, config.train.schedule_steps, config.run.dir) == (5, 5, "somewhere")
    assert (config.router.top_k, config.router.score) == (2, "sigmoid")


def test_fetch_lists_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("data", "fetch", "stdlib-code")
    assert result.exit_code == 0, result.output
    assert re.search(r"stdlib-code.*[0-9,]{7,}.*[0-9a-f]{64}", result.stdout)


def test_fetch_reports_an_unknown_source_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path))
    result = invoke("data", "fetch", "stdlib-cod")
    assert result.exit_code == 2
    assert "did you mean 'stdlib-code'?" in one_line(result.stderr)


def worker(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `train` as a launcher does."""
    return subprocess.run(
        [sys.executable, "-m", "dist_moe", "train", *arguments, f"run.dir={tmp_path / 'run'}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_train_reports_a_config_that_does_not_fit_the_workers(tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "5", "LOCAL_RANK": "0"}
    done = worker(tmp_path, str(DEBUG), "--local_rank=0", **place)
    assert done.returncode == 2
    assert done.stderr.startswith("train.global_batch_size=12 does not divide among 5 workers")
    assert "Traceback" not in done.stderr
    assert "ConfigError" in (tmp_path / "run" / "errors" / "rank-0.txt").read_text()


@pytest.mark.slow
def test_train_tries_the_model_and_the_text_first(tmp_path: Path) -> None:
    rope, text = "model.config.rope_parameters={factor: 4.0}", f"data.sources={tmp_path}/none.txt"
    done = worker(tmp_path, str(DEBUG), rope, text)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in ("Unrecognized keys in `rope_parameters`", "none.txt is not stdlib-code, shakespeare or brown"):
        assert part in done.stderr


def test_train_refuses_an_invalid_rank(tmp_path: Path) -> None:
    done = worker(tmp_path, str(DEBUG), RANK="7", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "RANK=7 must be below WORLD_SIZE=2" in one_line(done.stderr)
    assert "Traceback" not in done.stderr


def test_restore_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    restore_visible_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("DIST_MOE_VISIBLE_DEVICES", "2,3")
    restore_visible_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize("command", [("config",), ("launch", "--dry-run")])
@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        ("hostfile=/nonexistent/h", "cluster.hostfile=/nonexistent/h cannot be read (No such file or directory); give"),
        ("hostfile=/dev/zero", "cluster.hostfile=/dev/zero cannot be read (it is not a regular file); give"),
        ("hosts=[{name: a}, {name: a}]", "cluster.hosts lists a name twice; give each host one entry"),
    ],
)
def test_hosts_are_checked_with_the_rest(command: tuple[str, ...], hosts: str, line: str) -> None:
    result = invoke(*command, DEBUG, f"cluster.{hosts}")
    assert result.exit_code == 2 and result.output.startswith(line) and result.output.count("\n") == 1
    both = invoke(*command, DEBUG, f"cluster.{hosts}", "train.steps=-1").output.splitlines()
    assert len(both) == 2 and both[0].startswith("train.steps=-1 ") and both[1].startswith(line)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        *((f"--temperature={value}", "is not 0, or 0.01 to 100") for value in ("1e-40", "0.009", "101", "nan", "x")),
        (f"--seed={10**30}", "less than or equal to 4294967295"),
        ("--seed=-1", "greater than or equal to 0"),
    ],
)
def test_generate_refuses_what_sampling_cannot_use(option: str, words: str) -> None:
    result = invoke("generate", "gone", "--prompt", "a", option)
    assert result.exit_code == 2 and words in one_line(result.stderr.replace("│", ""))


@pytest.mark.parametrize("option", ["--temperature=0", "--temperature=0.01", "--temperature=100", "--seed=4294967295"])
def test_generate_takes_the_ends_of_its_ranges(option: str) -> None:
    result = invoke("generate", "gone", "--prompt", "a", option)
    assert result.stderr.startswith("gone does not exist")
