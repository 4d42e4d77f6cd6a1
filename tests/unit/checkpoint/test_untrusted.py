"""Every file of a checkpoint as untrusted input: what is no regular file, too deep or too large is refused in words."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from typer.testing import CliRunner

from dist_moe.cli.main import app
from tests.unit.train.runs import step

FILES = [
    "manifest.json",
    "config.yaml",
    "state/training.json",
    "state/balance.safetensors",
    "state/rank-00000.safetensors",
    "model/config.json",
    "model/generation_config.json",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/model.safetensors.index.json",
    "model/model-00001-of-00001.safetensors",
]
LIMIT_S = 60


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _deep(path: Path) -> None:
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


def _header(path: Path) -> None:
    """A safetensors header of which the file says that it is 2^60 bytes long."""
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


@pytest.fixture
def limited() -> Iterator[None]:
    """Fail a test that waits, as for the writer of a pipe."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the command waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def checkpoint(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(step(made, 6), tmp_path_factory.mktemp("untrusted") / "step-000006")


def test_the_files_are_those_of_a_checkpoint(checkpoint: Path) -> None:
    assert {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()} == set(FILES)


KINDS = [_pipe, _endless, _deep, _header, Path.mkdir]
# Each file with one kind, and in `make test-all` with all.
CASES = [
    pytest.param(name, make, marks=[] if (number + kind) % len(KINDS) == 0 else pytest.mark.full)
    for number, name in enumerate(FILES)
    for kind, make in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_no_file_stops_a_command_or_ends_it_with_a_traceback(
    checkpoint: Path, tmp_path: Path, limited: None, name: str, make: Callable[[Path], None]
) -> None:
    path, kept = checkpoint / name, tmp_path / "kept"
    path.rename(kept)
    try:
        make(path)
        commands = [
            ["checkpoint", "verify", str(checkpoint)],
            ["checkpoint", "inspect", str(checkpoint)],
            ["checkpoint", "export", str(checkpoint), str(tmp_path / "out")],
            ["generate", str(checkpoint), "--prompt", "a", "--tokens", "1"],
            *([["evaluate", str(checkpoint)]] if name == "config.yaml" or name.startswith("model/") else []),
        ]
        for words in commands if make is _pipe else commands[:2]:
            result = CliRunner().invoke(app, words)
            assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
            assert result.exit_code in (0, 1, 2) and len(result.output) < 10_000
            if words[1] == "verify":
                assert result.exit_code, result.output
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
        kept.rename(path)
