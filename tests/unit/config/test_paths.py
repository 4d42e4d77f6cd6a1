"""Paths of the configuration and of the command line: `~` in each of them, and what is not there."""

import ast
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import AfterValidator, BaseModel
from typer.testing import CliRunner

from dist_moe.checkpoint.format.layout import resolve_path
from dist_moe.cli.main import app
from dist_moe.cli.options import user_path
from dist_moe.config import Config, ConfigError, load_config, resolve
from dist_moe.errors import RunFolderError, needs_folder
from dist_moe.files import UNSEEN_REMEDY, UnseenPathError, entries, exists, is_file, is_folder, why_unseen
from dist_moe.section import expand_home
from dist_moe.train.data_check import data_violations
from tests.selection import only_first
from tests.unit.config.files import DEBUG, debug
from tests.unit.source import Source, sources

HOME = "/somebody's home"
# A value that ends in a path -> its field.
FIELDS = {
    "run.dir": "{}",
    "data.sources": "[stdlib-code, {}]",
    "model.pretrained": "{}",
    "model.upcycle_from": "{}",
    "checkpoint.resume": "{}",
    "cluster.hostfile": "{}",
    "cluster.folder": "{}",
    "cluster.python": "{}",
}


def _metadata(annotation: Any) -> list[Any]:
    """What is in the `Annotated` parts of a type, however deep."""
    own = list(getattr(annotation, "__metadata__", ()))
    return own + [each for part in get_args(annotation) for each in _metadata(part)]


def _fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def test_every_field_that_is_a_path_has_the_type_of_paths() -> None:
    """All fields whose description says so."""
    fields = _fields(Config)
    paths = {name for name, field in fields.items() if re.search(r"\b(path|folder|glob)\b", str(field.description))}
    assert paths - {"model.config", "cluster.shared_storage", "train.deepspeed"} == set(FIELDS)
    for name in FIELDS:
        found = [*fields[name].metadata, *_metadata(fields[name].annotation)]
        assert any(isinstance(each, AfterValidator) and each.func is expand_home for each in found), name


@pytest.mark.parametrize("field", FIELDS)
def test_every_path_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setenv("HOME", HOME)
    config = debug(f"{field}={FIELDS[field].format('~/x')}")
    section, _, name = field.partition(".")
    value = getattr(getattr(config, section), name)
    assert (value[-1] if isinstance(value, list) else value) == f"{HOME}/x"


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("path", "rule"), [("~nobody-of-this-name/x", "names a home folder that is not known"), ('"a\\0b"', "has a NUL")]
)
def test_a_path_that_cannot_be_is_refused(field: str, path: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        load_config(DEBUG, [f"{field}={FIELDS[field].format(path)}"])
    assert caught.value.violations[0].key.startswith(field)


def test_every_path_of_the_command_line_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", HOME)
    assert user_path("~/x") == user_path(Path("~/x")) == Path(HOME, "x")
    with pytest.raises(typer.BadParameter, match="is not known"):
        user_path("~nobody-of-this-name")

    declared = [pair for source in sources("dist_moe/cli") for pair in _annotated_paths(source)]
    assert len(declared) > 10
    assert {by for _, by in declared} == {"path_argument", "path_option"}, declared


def _annotated_paths(source: Source) -> Iterator[tuple[str, str]]:
    """Yield the type of each parameter that is a path, and what declares it."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated":
            assert isinstance(node.slice, ast.Tuple)
            kind, declaration = node.slice.elts[:2]
            if "Path" in ast.unparse(kind):
                yield ast.unparse(kind), ast.unparse(declaration).partition("(")[0]


def test_paths_that_are_not_there_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dead").symlink_to(tmp_path / "gone")
    missing = ["checkpoint.resume=gone/step-000001", "data.sources=[stdlib-code, gone.txt, 'gone/*.jsonl', shakespear]"]
    found = {(each.key, each.value): each for each in data_violations(debug(*missing, f"run.dir={tmp_path}/file"))}
    no_file = "is not stdlib-code, shakespeare or brown and matches no .txt or .jsonl file"
    assert {key: violation.rule for key, violation in found.items()} == {
        ("run.dir", f"{tmp_path}/file"): "is not a folder",
        ("checkpoint.resume", "gone/step-000001"): "is not a folder",
        ("data.sources", "gone.txt"): no_file,
        ("data.sources", "gone/*.jsonl"): no_file,
        ("data.sources", "shakespear"): no_file,
    }
    assert found["data.sources", "shakespear"].remedy == "did you mean 'shakespeare'?"
    (dead,) = data_violations(debug(f"run.dir={tmp_path}/dead"))
    assert dead.rule == f"is a link to {tmp_path}/gone, which does not exist"
    assert resolve(debug(*missing), 1).workers == 1, "its files are looked at where they are"


def test_a_path_with_brackets_is_found(tmp_path: Path) -> None:
    (tmp_path / "data[1]").mkdir()
    (tmp_path / "data[1]" / "a.txt").write_text("some text " * 100)
    for name in ("a.txt", "*.txt", "**/a.*"):
        assert data_violations(debug(f"data.sources=['{tmp_path}/data[1]/{name}']")) == []


@pytest.mark.parametrize("variables", only_first([{"HOME": "/"}, {}, {"HOME": "/nowhere"}]))
def test_without_a_home_folder_one_line_names_the_variable(tmp_path: Path, variables: dict[str, str]) -> None:
    """By a user who is in no passwd file, where these tests may become one."""
    program = """if True:
        import os, sys
        from pathlib import Path
        from dist_moe.data.corpus import prepare
        from dist_moe.data.cache import cache_folder
        from dist_moe.errors import DataError
        if os.geteuid() == 0:
            os.chmod(".", 0o755)
            os.setuid(54321)
        try:
            prepare(["a.txt"], "bytes", 0, 0.1, cache_folder())
        except DataError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "DIST_MOE_CACHE")}
    root = Path(__file__).parents[3]
    (tmp_path / "a.txt").write_text("some text " * 100)
    told = subprocess.check_output(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**environment, **variables, "PYTHONPATH": str(root)},
        text=True,
    )
    assert told.count("\n") == 1 and "; set DIST_MOE_CACHE to a folder that this user can write" in told


def test_a_run_folder_that_is_a_dead_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "dead").symlink_to(tmp_path / "gone")
    rule = r"/dead is a link to .*/gone, which does not exist; make that folder"
    with pytest.raises(RunFolderError, match=rule), needs_folder(tmp_path / "dead"):
        (tmp_path / "dead").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.slow
def test_output_of_any_script_on_a_pipe_of_any_encoding(encoding: str) -> None:
    command = [sys.executable, "-m", "dist_moe", "config", str(DEBUG), "run.dir=日本"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"dir: \u65e5\u672c" in done.stdout


@contextlib.contextmanager
def _without_access(folder: Path) -> Iterator[None]:
    """Close a folder to this user, who becomes another one if it is root."""
    before = os.geteuid()
    folder.chmod(0)
    if before == 0:
        os.seteuid(54321)
    try:
        yield
    finally:
        os.seteuid(before)
        folder.chmod(0o700)


LONG = "z" * 300
TOO_LONG = f"cannot be looked at (File name too long); {UNSEEN_REMEDY}"


def test_a_path_that_cannot_be_looked_at_is_not_taken_for_absent(tmp_path: Path) -> None:
    looks: list[Callable[[Path], object]] = [exists, is_file, is_folder, entries]
    for each in looks:
        assert not each(tmp_path / "gone") and not each(DEBUG / "below a file")
        with pytest.raises(UnseenPathError) as caught:
            each(tmp_path / LONG)
        assert str(caught.value) == f"{tmp_path / LONG} {TOO_LONG}"
    assert exists(tmp_path) and is_folder(tmp_path) and not is_file(tmp_path) and is_file(DEBUG)


def test_a_path_in_a_closed_folder_is_not_taken_for_absent() -> None:
    # Below pytest's own folder, another user than its owner would see nothing at all.
    with tempfile.TemporaryDirectory() as name:
        closed = Path(name, "closed")
        closed.parent.chmod(0o755)
        (closed / "inner").mkdir(parents=True)
        config = debug(f"run.dir={closed}/x", f"checkpoint.resume={closed}/inner")
        with _without_access(closed):
            assert why_unseen(closed / "inner") == "cannot be looked at (Permission denied)"
            assert why_unseen(closed) == ""
            with pytest.raises(UnseenPathError, match=r"closed cannot be looked at \(Permission denied\)"):
                entries(closed)
            with pytest.raises(
                UnseenPathError, match=r"closed/manifest.json cannot be looked at \(Permission denied\)"
            ):
                resolve_path(closed)
            found = [(each.key, each.rule) for each in data_violations(config)]
            assert found[:2] == [
                ("run.dir", "cannot be looked at (Permission denied)"),
                ("checkpoint.resume", "cannot be looked at (Permission denied)"),
            ]


def test_every_path_with_a_name_that_is_too_long_is_refused_at_once() -> None:
    paths = [f"run.dir={LONG}", f"checkpoint.resume={LONG}", f"model.pretrained={LONG}"]
    found = {each.key: each.rule for each in data_violations(debug(*paths))}
    assert found == dict.fromkeys(["run.dir", "checkpoint.resume"], "cannot be looked at (File name too long)")
    with pytest.raises(ConfigError) as caught:
        resolve(debug(*paths), 1, data_violations)
    keys = [each.key for each in caught.value.violations if each.rule == "cannot be looked at (File name too long)"]
    assert sorted(keys) == ["checkpoint.resume", "model.pretrained", "run.dir"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", LONG, "--prompt", "a"),
        ("evaluate", LONG),
        *(("checkpoint", command, LONG) for command in ("inspect", "verify")),
        ("checkpoint", "export", LONG, "out"),
    ],
)
def test_every_command_names_a_checkpoint_that_cannot_be_looked_at(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code, result.stderr) == (2, f"{LONG}/manifest.json {TOO_LONG}\n")


def test_an_export_names_the_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for out, line in {
        Path("/proc/gone/x"): "/proc/gone/x cannot be written (No such file or directory: /proc/gone); use a",
        Path(LONG): f"{LONG} {TOO_LONG}",
        tmp_path / "a" / "x": f"{tmp_path}/a/x is inside the checkpoint; use another folder",
    }.items():
        result = CliRunner().invoke(app, ["checkpoint", "export", str(tmp_path), str(out)])
        assert result.exit_code == 2 and result.stderr.startswith(line), result.output
