"""What a trained model is used for: evaluation on any text, and generation, from any folder that holds one."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import resolve_path
from dist_moe.cli.main import app
from dist_moe.config import load_stored_config
from dist_moe.errors import ConfigError
from dist_moe.train.checkpoint_evaluation import Part, choose_part, refuse_unread
from tests.dist.loaded import run_loaded
from tests.unit.train.runs import STATE, WEIGHTS, step

OTHER = ("To be, or not to be: 日本. " * 12, "Whether 'tis nobler in the mind to suffer\n" * 9, "the slings " * 15)


def evaluate(folder: Path, *words: str) -> str:
    done = run_loaded([sys.executable, "-m", "dist_moe", "evaluate", *words], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def generate(*words: object) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["generate", *map(str, words), "--temperature", "0"])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another text than the one of the runs, in several files, as the value of data.sources."""
    folder = tmp_path_factory.mktemp("other")
    for number in range(8):
        for name, text in zip("abc", OTHER, strict=True):
            (folder / f"{name}{number}.txt").write_text(f"{number} {text}", encoding="utf-8")
    return f"data.sources=[{folder}/*.txt]"


def test_evaluate_gives_a_table_or_the_record_of_the_run(made: Path, text: Path, tmp_path: Path) -> None:
    expected = json.loads((made / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(evaluate(tmp_path, str(made), "--json"))
    assert found["load"] == expected["load"] and found["step"] == expected["step"] == 6
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-6)
    (tmp_path / "linked.jsonl").symlink_to(text)
    table = evaluate(tmp_path, str(made), f"data.sources=[{tmp_path}/./*.jsonl]")
    assert f"validation loss  {found['validation_loss']:.4f} nats/token after 6 steps\n" in table
    assert f"checkpoint       {step(made, 6)}\n" in table
    assert "the held-out part" in table and "MaxVio_global" in table


@pytest.mark.slow
def test_evaluate_takes_any_text_and_a_hugging_face_folder(made: Path, other: str, tmp_path: Path) -> None:
    folder = shutil.copytree(step(made, 6) / "model", tmp_path / "model")
    length = "data.sequence_length=32"
    trained, copied = (json.loads(evaluate(tmp_path, str(path), other, length, "--json")) for path in (made, folder))
    documents = [f"{number} {text}".encode() for number in range(8) for text in OTHER]
    assert sum(map(len, documents)) >= trained["bytes"] > 0.95 * sum(map(len, documents)), "all of the text"
    assert trained["validation_loss"] == pytest.approx(copied["validation_loss"], rel=1e-6)
    assert (trained["load"], copied["step"]) == (copied["load"], 0)


def chosen(run: Path, *overrides: str) -> Part:
    """What of the text of these overrides is evaluated, by the newest checkpoint of a run."""
    stored = step(run, 6) / "config.yaml"
    asked = {override.partition("=")[0] for override in overrides}
    trained_on = load_stored_config(stored).data.sources
    return choose_part(load_stored_config(stored, overrides), trained_on, step(run, 6), asked)


def test_text_of_the_training_is_known_under_any_name(
    made: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Part([str(text)], 0.1, "the held-out part")
    assert chosen(made) == expected
    monkeypatch.chdir(text.parent)
    (tmp_path / "linked.jsonl").symlink_to(text)
    for source in (f"./{text.name}", f"{text.parent}/tex?.jsonl", f"{tmp_path}/linked.jsonl"):
        assert chosen(made, f"data.sources=[{source}]") == expected
    shutil.copy(text, tmp_path / text.name)
    copied = f"{tmp_path}/{text.name}"
    assert chosen(made, f"data.sources=[{copied}]") == Part([copied], 0.1, "the held-out part")


def test_text_that_is_partly_or_not_of_the_training(made: Path, text: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.txt"
    new.write_text("abc")
    assert chosen(made, f"data.sources=[{new}]") == Part([str(new)], None, "all")
    asked = chosen(made, f"data.sources=[{new}]", "data.validation_fraction=0.2")
    assert asked == Part([str(new)], 0.2, "the held-out part")
    words = "a newly held-out part, which may hold training text (1 of 2 files were read in training)"
    assert chosen(made, f"data.sources=[{new}, {text}]") == Part([str(new), str(text)], 0.1, words)


def test_evaluate_refuses_what_the_checkpoint_gives() -> None:
    refuse_unread(["data.sources=[a.txt]", "data.sequence_length=3"])
    with pytest.raises(ConfigError) as refused:
        refuse_unread(["data.tokenizer=bpe", "train.micro_batch_size=2", "model.config.hidden_size=3"])
    assert str(refused.value).startswith(
        "data.tokenizer=bpe and model.config.hidden_size=3 are not read: the checkpoint gives its model and tokenizer; "
        "set data.sources, "
    )


def test_a_hugging_face_folder_needs_a_text(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(step(made, 6) / "model", tmp_path / "model")
    result = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert result.exit_code == 2
    assert "data.sources is missing, and the folder of a Hugging Face model names no text; add" in result.output


def test_generate_takes_a_run_a_checkpoint_and_a_model(made: Path) -> None:
    folders = (made, made / "checkpoints", step(made, 6), step(made, 6) / "model")
    texts = {generate(folder, "--prompt", "import", "--tokens", 3)[0] for folder in folders}
    assert len(texts) == 1 and texts.pop().startswith("import")


def test_generation_stops_at_the_last_position_with_a_line_that_says_so(made: Path) -> None:
    text, told = generate(made, "--prompt", "a" * 250, "--tokens", 9)
    assert told == "stopped after 6 tokens of 9: the model has no position after max_position_embeddings=256\n"
    assert generate(made, "--prompt", "a" * 250, "--tokens", 6) == (text, "")
    result = CliRunner().invoke(app, ["generate", str(made), "--prompt", "a" * 256])
    assert result.exit_code == 2 and "give one of at most 255 tokens" in result.output


def test_the_newest_checkpoint_that_is_whole_is_used(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (step(run, 6) / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert resolve_path(run) == step(run, 6), "only sizes are compared"
    assert resolve_path(run, read=("model/",)) == step(run, 4)
    assert f"{step(run, 6)} is damaged: {WEIGHTS} was changed, or cannot be read; using step-000004" in caplog.text
    (step(run, 4) / STATE).unlink()
    (step(run, 6) / "manifest.json").unlink()
    assert resolve_path(run) == step(run, 2)
    (step(run, 2) / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        resolve_path(run)


@pytest.mark.parametrize("command", ["generate", "evaluate", "inspect", "verify", "export"])
def test_every_command_says_what_it_takes(command: str, tmp_path: Path) -> None:
    more = {"generate": ["--prompt", "a"], "export": [str(tmp_path / "out")]}.get(command, [])
    words = [command] if command in ("generate", "evaluate") else ["checkpoint", command]
    for path, what in (
        (tmp_path, "holds no checkpoint"),
        (Path("Qwen/Qwen3"), "does not exist, and nothing is fetched"),
    ):
        result = CliRunner().invoke(app, [*words, str(path), *more])
        assert result.exit_code == 2
        assert f"{path} {what}" in result.output and "use a run.dir, a step-NNNNNN folder of it" in result.output
