"""The commands inspect, verify and export: what they print, which damage they find, and what they refuse."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from dist_moe.checkpoint.format.hf_weights import load_weights
from dist_moe.checkpoint.format.manifest import FORMAT_VERSION, MANIFEST_NAME, file_entry
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.cli.main import app
from dist_moe.errors import UserError
from tests.dist.resumable import elements
from tests.unit.model.samples import ALONE
from tests.unit.train.runs import STATE, WEIGHTS, find, step, train

BALANCE = "state/balance.safetensors"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, words)])


def output_of(result: Result, code: int) -> str:
    """The output of a command that exited with `code`, and not with an uncaught exception."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step-000006"])
def test_inspect_describes_the_latest_checkpoint(made: Path, below: str) -> None:
    shown = output_of(invoke("inspect", made / below), 0)
    assert "step 6, 0 skipped" in shown and "deepseek_v3" in shown and "2 MoE layers of 12 experts" in shown
    found = json.loads(output_of(invoke("inspect", made / below, "--json"), 0))
    assert found["step"] == 6


def test_inspect_describes_a_hugging_face_folder(made: Path) -> None:
    assert "deepseek_v3" in output_of(invoke("inspect", step(made, 6) / "model"), 0)
    assert "Traceback" not in output_of(invoke("inspect", made / "tensorboard"), 2)


def test_verify_accepts_every_checkpoint_of_a_run(made: Path) -> None:
    shown = output_of(invoke("verify", made), 0)
    assert shown.count("is intact") == 3 and "every element of the optimizer once" in shown


def rewrite(at: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file, and update the manifest so that size and digest are valid."""
    tensors = load_file(at / name)
    change(tensors)
    save_file(tensors, at / name, {"format": "pt"})
    relist(at, name)


def relist(at: Path, name: str) -> None:
    manifest = json.loads((at / MANIFEST_NAME).read_text())
    manifest["files"][name] = file_entry(at / name).model_dump()
    (at / MANIFEST_NAME).write_text(json.dumps(manifest))


def first(tensors: dict[str, torch.Tensor], start: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(start))


def remove_first(start: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(first(tensors, start))


def make_nan(start: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[first(tensors, start)].view(-1)[:1].fill_(torch.nan)


def overlap(tensors: dict[str, torch.Tensor]) -> None:
    name = first(tensors, "exp_avg:")
    tensors[f"{name.rpartition(':')[0]}:1"] = tensors[name].clone()


VALID_DIGESTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a missing expert": (
        WEIGHTS,
        lambda at: rewrite(at, WEIGHTS, remove_first("model.layers.2.mlp.experts.11.")),
        "model.layers.2.mlp.experts.11.",
    ),
    "a non-finite weight": (WEIGHTS, lambda at: rewrite(at, WEIGHTS, make_nan("model.layers.1.")), "finite"),
    "a missing moment": (STATE, lambda at: rewrite(at, STATE, remove_first("exp_avg:")), "exp_avg"),
    "overlapping moments": (STATE, lambda at: rewrite(at, STATE, overlap), "exp_avg"),
    "a moment of an unknown tensor": (
        STATE,
        lambda at: rewrite(at, STATE, lambda t: t.update({"exp_avg:model.nothing:0": torch.zeros(3)})),
        "model.nothing",
    ),
    "a bias that differs from the weights": (
        BALANCE,
        lambda at: rewrite(at, BALANCE, lambda t: t[first(t, "selection_bias")].add_(1.0)),
        "bias",
    ),
    "an integer tensor": (
        WEIGHTS,
        lambda at: rewrite(at, WEIGHTS, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int64)})),
        "model.norm.weight",
    ),
}


@pytest.mark.parametrize("case", VALID_DIGESTS)
def test_verify_finds_damage_with_valid_digests(run: Path, case: str) -> None:
    """Every file is as the manifest lists it, and the checkpoint is still invalid."""
    _, damage, named = VALID_DIGESTS[case]
    damage(step(run, 6))
    shown = output_of(invoke("verify", run), 1)
    assert shown.count("is intact") == 2 and shown.count("is damaged") == 1 and named in shown


@pytest.mark.parametrize("below", ["", "checkpoints/step-000006"])
def test_verify_finds_a_damaged_manifest_wherever_it_is_pointed_at(run: Path, below: str) -> None:
    (step(run, 6) / "manifest.json").write_text("{}")
    shown = output_of(invoke("verify", run / below), 1)
    assert shown.count("is damaged") == 1 and "manifest.json cannot be used" in shown


def test_verify_exits_differently_for_a_folder_without_checkpoint(tmp_path: Path) -> None:
    assert "holds no checkpoint" in output_of(invoke("verify", tmp_path), 2)


@pytest.mark.parametrize("dtype", ["keep", "fp32", "bf16"])
def test_transformers_loads_an_export(made: Path, tmp_path: Path, dtype: str) -> None:
    output_of(invoke("export", made, tmp_path / "out", "--dtype", dtype), 0)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ids = torch.arange(24).reshape(1, -1)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert model.dtype == kind
    ours = load_weights(step(made, 6) / "model", ALONE)
    with torch.no_grad():
        difference = (model.float()(ids).logits - ours(ids).logits).abs().max()
    assert difference < (0.2 if dtype == "bf16" else 1e-5)


def test_export_in_fp32_writes_the_master_weights(text: Path, tmp_path: Path) -> None:
    done = train(text, tmp_path / "run", "train.steps=2", "train.precision=bf16")
    assert done.returncode == 0, done.stderr
    output_of(invoke("export", tmp_path / "run", tmp_path / "out", "--dtype", "fp32"), 0)
    kept = elements(step(tmp_path / "run", 2))
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        masters = {name.removeprefix("master:"): value for name, value in kept.items() if name.startswith("master:")}
        assert masters
        assert all(torch.equal(file.get_tensor(name).reshape(-1), value) for name, value in masters.items())


def test_export_removes_no_existing_files(made: Path, tmp_path: Path) -> None:
    for name in ("out", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    assert "is not an empty folder" in output_of(invoke("export", made, tmp_path / "out"), 2)
    assert "from another export" in output_of(invoke("export", made, tmp_path / "other"), 2)
    assert [(tmp_path / name / "mine").read_text() for name in ("out", "other.partial")] == ["mine", "mine"]


def header(path: Path, text: str | bytes, length: int | None = None) -> None:
    """Write a file with this safetensors header, and `length` instead of its real length if given."""
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content)


def tensor(shape: list[int], end: int, dtype: str = "F32", name: str = "a") -> str:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}})


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a header of terabytes": (WEIGHTS, lambda path: header(path, "{}", 1 << 44)),
    "a truncated header": (STATE, lambda path: header(path, "{}", 100)),
    "a tensor of terabytes": (WEIGHTS, lambda path: header(path, tensor([1 << 40], 1 << 42))),
    "thousands of dimensions": (WEIGHTS, lambda path: header(path, tensor([1 << 62] * 5000, 4))),
    "a number of 5,000 digits": (STATE, lambda path: header(path, tensor([1], 4).replace("[1]", f"[{'9' * 5000}]"))),
    "a name of 5,000 digits": (STATE, lambda path: header(path, tensor([0], 0, name=f"exp_avg:a:{'9' * 5000}"))),
    "deep nesting": (STATE, lambda path: header(path, "[" * 100_000)),
    "a header that is not UTF-8": (WEIGHTS, lambda path: header(path, b"\xff\xfe\x00")),
    "a duplicate key": (STATE, lambda path: header(path, '{"a": 1, "a": 2}')),
    "a pipe": (WEIGHTS, pipe),
    "a pipe in place of the manifest": (MANIFEST_NAME, pipe),
    "a manifest of deep nesting": (MANIFEST_NAME, lambda path: path.write_text("[" * 100_000)),
    "a manifest with a number of 5,000 digits": (
        MANIFEST_NAME,
        lambda path: path.write_text(
            json.dumps({"format": FORMAT_VERSION, "step": 6, "files": {}}).replace("6", "9" * 5000)
        ),
    ),
    "a manifest with a path outside": (
        MANIFEST_NAME,
        lambda path: path.write_text(
            json.dumps({"format": FORMAT_VERSION, "step": 6, "files": {"../../x": {"bytes": 1, "xxh3_128": "0" * 32}}})
        ),
    ),
    "counters with NaN": (
        "state/training.json",
        lambda path: path.write_text(path.read_text().replace('"taken":', '"taken": NaN, "taken":')),
    ),
    "a config with Python code": (
        "config.yaml",
        lambda path: path.write_text("!!python/object/apply:os.system [id]"),
    ),
}


@pytest.mark.timeout(30, func_only=True)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_checkpoint_is_refused_with_a_message(text: Path, run: Path, case: str) -> None:
    """By every command and by a run, although the manifest lists the file; the previous checkpoint is used."""
    name, damage = HOSTILE[case]
    folder = step(run, 6)
    damage(folder / name)
    if name != MANIFEST_NAME and not (folder / name).is_fifo():
        relist(folder, name)
    assert output_of(invoke("verify", folder), 1)
    assert invoke("inspect", folder).exit_code in (0, 2)
    if name in (MANIFEST_NAME, "state/training.json") or (folder / name).is_fifo():
        found = find(text, run)
        assert found is not None and found.counters.step == 4
    elif name == WEIGHTS:
        with pytest.raises(UserError, match=re.escape(str(folder))):
            load_weights(folder / "model", ALONE)
    else:
        with pytest.raises(UserError, match=re.escape(str(folder))), ShardReader(folder / "state"):
            find(text, run)
