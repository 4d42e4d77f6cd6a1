"""What a configuration names is looked at before a process starts: text, tokenizer and weights."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config import load_config
from dist_moe.data.files import RECORDS, UNPACKED_WITH
from dist_moe.data.files import TO_JSONL as CONVERT
from dist_moe.data.tokenizer import byte_tokenizer
from dist_moe.train.data_check import OPENED_FILES, data_violations
from tests.unit.config.files import DEBUG

MODEL: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "hidden_size": 48, "num_experts": 8, "vocab_size": 400, "num_hidden_layers": 2},
}


def found(*overrides: str) -> list[str]:
    return [str(violation) for violation in data_violations(load_config(DEBUG, overrides))]


def sources(*names: str | Path) -> str:
    return f"data.sources={json.dumps([str(name) for name in names])}"


def test_a_run_dir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = found(f"run.dir={tmp_path}/file/run/7")
    rule = f"is below {tmp_path}/file, which is not a folder; give the path of a folder that this user may write"
    assert line == f"run.dir={tmp_path}/file/run/7 {rule}"
    assert found(f"run.dir={tmp_path}/new/run") == []


@pytest.mark.parametrize("name", ["stdlib-code", "shakespeare"])
def test_built_in_sources_are_not_fetched(name: str) -> None:
    assert found(sources(name)) == []


def test_text_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "é".encode() * 4096)  # the head ends inside a character
    (tmp_path / "b.jsonl").write_text('\n{"text": "x"}\n')
    assert found(sources(tmp_path / "*")) == []
    assert found(f"data.sources={tmp_path / 'a.txt'}") == [], "one path is a list of one"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", b"", "{path} is an empty file; give files with text"),
        ("a.txt", b"caf\xe9 ", "{path} has a file that is not UTF-8 ({path}: byte 3); convert the file to UTF-8"),
        ("a.txt", gzip.compress(b"x", mtime=0), "{path} has a file that is not text ({path}); unpack it with gunzip"),
        ("a.txt", bz2.compress(b"x"), "{path} has a file that is not text ({path}); unpack it with bunzip2"),
        ("a.txt", lzma.compress(b"x"), "{path} has a file that is not text ({path}); unpack it with unxz"),
        ("a.jsonl", b"PAR1", f"{{path}} has a file that is not text ({{path}}); {CONVERT}"),
        (
            "a.jsonl",
            b"[1]",
            f"{{path}} has a file whose first line is no JSON object ({{path}}); {CONVERT}",
        ),
    ],
)
def test_a_file_that_cannot_be_used(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert found(sources(path)) == ["data.sources=" + line.replace("{path}", str(path))]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    (line,) = found(sources(tmp_path / "a.txt"))
    assert line.endswith(f"({tmp_path / 'a.txt'}: Input/output error); restore it, or leave it out")


def test_many_bad_files_are_counted(tmp_path: Path) -> None:
    for number in range(OPENED_FILES + 5):
        (tmp_path / f"{number:03}.txt").write_bytes(b"\xff")
    (line,) = found(sources(tmp_path / "*.txt"))
    assert f"and {OPENED_FILES - 3} more; convert the file to UTF-8" in line


def test_a_small_text_that_cannot_be_divided(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("three words only")
    (line,) = found(sources(tmp_path / "a.txt"), "data.validation_fraction=0.2")
    assert line == (
        "data.validation_fraction=0.2 leaves the validation split empty, and the text of 16 characters is too short to "
        "be divided; raise data.validation_fraction, or give more text"
    )
    (tmp_path / "a.txt").write_text("enough words " * 50)
    assert found(sources(tmp_path / "a.txt"), "data.validation_fraction=0.2") == []


def test_a_small_text_is_read_whole(tmp_path: Path) -> None:
    lines = ['{"text": "some words"}'] * 300 + ['{"txt": ""}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (line,) = found(sources(tmp_path / "a.jsonl"))
    assert f"cannot be used: {tmp_path}/a.jsonl:301 is not an object with the field 'text'; write one JSON" in line
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    (line,) = found(sources(tmp_path / "a.jsonl"))
    assert line.endswith(
        f"data source '{tmp_path}/a.jsonl' has no text; give a source with text, or leave this one out"
    )


def test_sources_that_share_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("enough words " * 50)
    (line,) = found(sources(tmp_path / "a.txt", tmp_path / "*.txt", "stdlib-code"))
    assert "are one file, whose text would count twice; give it once" in line


def test_the_text_is_divided_without_torch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    program = """if True:
        import sys
        from dist_moe.config import load_config
        from dist_moe.train.data_check import data_violations
        (violation,) = data_violations(load_config(sys.argv[1], sys.argv[2:]))
        print(violation.key, "torch" in sys.modules)
    """
    argv = [sys.executable, "-c", program, str(DEBUG), sources(tmp_path / "a.txt")]
    root = Path(__file__).parents[3]
    assert subprocess.check_output(argv, cwd=root, text=True) == "data.validation_fraction False\n"


def test_several_sources_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "e1.txt").touch()
    (tmp_path / "e2.txt").touch()
    lines = found(sources(tmp_path / "none.txt", tmp_path / "*.txt", "shakespear", "stdlib-code", "stdlib-code"))
    assert [line.partition("; ")[0].partition("=")[2] for line in lines] == [
        f"{tmp_path}/none.txt is not stdlib-code, shakespeare or brown and matches no .txt or .jsonl file",
        f"{tmp_path}/*.txt matches 2 files, all of them empty",
        "shakespear is not stdlib-code, shakespeare or brown and matches no .txt or .jsonl file",
        lines[-1].partition("; ")[0].partition("=")[2],
    ]
    assert lines[2].endswith("did you mean 'shakespeare'?")
    assert lines[-1].endswith("repeats stdlib-code; give each source once")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.parquet", CONVERT),
        ("a.csv", CONVERT),
        ("a.json", CONVERT),
        ("a.txt.gz", "unpack it with gunzip"),
        ("a.jsonl.zst", "unpack it with unzstd"),
        ("a.zip", "unpack it with unzip"),
        ("a.md", f"rename a text to .txt, or {CONVERT}"),
        ("a", f"rename a text to .txt, or {CONVERT}"),
    ],
)
def test_other_formats_get_a_hint(name: str, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("x")
    (line,) = found(sources(path))
    assert line == f"data.sources={path} matches {path}, which is not .txt or .jsonl; {remedy}"
    (line,) = found(sources(tmp_path / "*"))
    remedy = remedy if path.suffix in RECORDS or path.suffix in UNPACKED_WITH else "leave it out, for example by a glob"
    assert line.startswith(f"data.sources={tmp_path}/* matches {path}, which is not .txt or .jsonl; {remedy}")


def pretrained(folder: Path, tokenizer: bool = True, weights: bool = True) -> list[str]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    if weights:
        (folder / "model.safetensors").touch()
    if tokenizer:
        byte_tokenizer().save(folder)
    return [
        f"model.pretrained={folder}",
        "model.config={}",
        "model.architecture=qwen3_moe",
        "data.tokenizer=pretrained",
    ]


def test_the_tokenizer_and_the_weights_of_a_folder(tmp_path: Path) -> None:
    assert found(*pretrained(tmp_path / "a")) == []
    (line,) = found(*pretrained(tmp_path / "b", tokenizer=False))
    assert line == (
        f"data.tokenizer=pretrained cannot be used: {tmp_path}/b/tokenizer.json does not exist; "
        "give a folder that a tokenizer was saved to"
    )
    (line,) = found(*pretrained(tmp_path / "c", weights=False))
    assert line == (
        f"model.pretrained={tmp_path}/c has no weights (*.safetensors); give a folder with the weights, or "
        "model.config alone"
    )


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    overrides = pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 200}))
    (line,) = found(*overrides)
    assert "has 257 tokens, and the model 200" in line


def test_a_folder_that_is_missing_is_left_to_the_rules_of_the_model(tmp_path: Path) -> None:
    assert found(f"model.pretrained={tmp_path / 'none'}", "data.tokenizer=pretrained") == []
