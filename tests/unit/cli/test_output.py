"""What commands print: at once, before the imports that take seconds, and in any encoding of the terminal."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_moe.cli.main import app
from dist_moe.cli.messages import report_lost_output
from dist_moe.cli.run import starting_line
from dist_moe.config import dump_config, load_config
from dist_moe.launch.job import Job
from dist_moe.launch.launcher import LaunchRequest
from tests.selection import cross

ROOT = Path(__file__).resolve().parents[3]
DEBUG = ROOT / "configs" / "debug.yaml"
LIMIT_S = 120.0
HEAVY = ("torch", "transformers", "deepspeed")
ENCODINGS = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-c", code, *arguments]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, timeout=LIMIT_S, check=False)


def test_the_first_line_of_a_launch_and_its_check_need_no_heavy_import() -> None:
    code = f"""
import builtins, sys
from pathlib import Path
HEAVY = {HEAVY}
real = builtins.print
def seen(*words, **options):
    real(*words, [name for name in HEAVY if name in sys.modules], **options)
builtins.print = seen
from dist_moe.cli.run import launch
from dist_moe.cli.config import check_before_start
from dist_moe.config import dump_config, load_config
try:
    launch(Path("missing.yaml"))
except BaseException:
    pass
check_before_start(load_config({str(DEBUG)!r}), 2)
print("checked")
"""
    done = python(code)
    assert done.stdout.decode().splitlines() == ["checking missing.yaml []", "checked []"], done.stderr


def test_a_launch_says_what_it_starts_and_where_the_logs_are() -> None:
    for workers, words in ((1, "1 worker"), (2, "2 workers")):
        request = LaunchRequest(load_config(DEBUG, ["run.dir=here"]), DEBUG, asked_workers=workers)
        assert starting_line(Job("torchrun", request)) == f"starting {words} by torchrun; logs: here/logs"


def dist_moe(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return python("from dist_moe.cli.main import main; main()", *arguments, **environment)


@cross(
    ("environment", ENCODINGS), ("command", [("launch", "日本.yaml"), ("data", "fetch", "日本"), ("日本",)]), strength=1
)
def test_every_character_is_written_in_every_encoding(command: tuple[str, ...], environment: dict[str, str]) -> None:
    done = dist_moe(*command, **environment)
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    assert b"\\u65e5\\u672c" in done.stderr or b"\\udce6" in done.stderr


@pytest.mark.parametrize("environment", ENCODINGS)
def test_a_prompt_of_any_bytes_reaches_the_tokenizer_as_text(environment: dict[str, str]) -> None:
    code = """
import json, sys, types
module = sys.modules["dist_moe.train.generate"] = types.ModuleType("generate")
def generate(checkpoint, prompt, *rest):
    return types.SimpleNamespace(text=json.dumps(prompt) + prompt, cut_short="")
module.generate = generate
from dist_moe.cli.main import main
main()
"""
    done = python(code, "generate", "folder", "--prompt", "日本\udcff", **environment)
    assert done.returncode == 0, done.stderr
    prompt = json.JSONDecoder().raw_decode(done.stdout.decode("latin-1"))[0]
    assert prompt == "日本\ufffd"


QWEN = (
    *("model.architecture=qwen3_moe", "data.tokenizer=bytes"),
    "model.config={num_experts: 4, hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 4, head_dim: 12, "
    "num_key_value_heads: 2, moe_intermediate_size: 16, num_experts_per_tok: 2, max_position_embeddings: 256}",
)


@pytest.mark.parametrize(("policy", "own"), [("loss_free", True), ("none", False)])
def test_config_says_where_transformers_will_not_open_the_weights(policy: str, own: bool, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(load_config(DEBUG, [*QWEN, f"balance={{policy: {policy}}}"])))
    shown = CliRunner().invoke(app, ["config", str(config)])
    assert shown.exit_code == 0, shown.output
    first = shown.stdout.splitlines()[0]
    assert first.startswith("# qwen3_moe cannot express this routing: saved weights have the model_type") == own
    assert ("dist_moe_qwen3_moe" in shown.stdout) == own
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert "\n## A model type of its own\n" in page


PROGRAM = "from dist_moe.cli.main import main; main()"
FULL = "the output cannot be written (No space left on device); write it to a disk with free space\n"


@pytest.mark.parametrize("arguments", [("--version",), ("config", "--reference"), ("--help",)])
def test_output_to_a_full_disk_ends_in_one_line(arguments: tuple[str, ...]) -> None:
    argv = [sys.executable, "-c", PROGRAM, *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (1, FULL)


@pytest.mark.parametrize("arguments", [("--version",), ("config", "--reference")])
def test_output_that_nobody_reads_ends_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, timeout=LIMIT_S)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_errors_to_a_full_disk_keep_the_command_from_nothing_else() -> None:
    with open("/dev/full", "wb") as full:
        argv = [sys.executable, "-c", PROGRAM, "config", "gone.yaml"]
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=full, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), (">&- 2>&- <&-", 0), ("2>&-", 0)])
def test_closed_streams_are_as_good_as_none(closed: str, code: int) -> None:
    line = f'exec "$0" -c "$1" --version {closed}'
    done = subprocess.run(["sh", "-c", line, sys.executable, PROGRAM], capture_output=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (code, b"")


def test_an_error_of_a_file_is_not_taken_for_lost_output(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (OSError(errno.ENOSPC, "No space left", "file"), OSError(errno.ECONNRESET, "reset")):
        with pytest.raises(OSError, match=error.strerror), report_lost_output():
            raise error
    assert capsys.readouterr().err == ""
