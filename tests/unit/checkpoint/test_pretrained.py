"""Starting from a Hugging Face folder: the first logits are those of transformers, or the folder is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from dist_moe.checkpoint.errors import CheckpointError, WeightsError
from dist_moe.checkpoint.format.hf_weights import fill_weights, find_weights, save_weights
from dist_moe.checkpoint.pretrained import load_pretrained
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Resolved, load_config, resolve
from dist_moe.config.sections.task import PoolingName, TaskConfig
from dist_moe.model.convert import find_layers
from dist_moe.model.head import head_settings
from dist_moe.train.setup import build_task, tokenize
from tests.dist.resumable import ROOT, overrides_of, write_text
from tests.experts import gated_experts
from tests.folders import make_folder, make_tokenizer
from tests.unit.model.samples import ALONE, FAMILIES, logits, small_model, tokens

SHARDED = {"max_shard_size": "60KB"}
FUSED = {"save_original_format": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def pretrained_overrides(folder: Path, architecture: str) -> tuple[str, ...]:
    """The overrides of a run that starts from the folder and uses its tokenizer."""
    fixed = (f"model.architecture={architecture}", "model.config={}", f"model.pretrained={folder}")
    return (*fixed, "data.tokenizer=pretrained")


def resolved_run(text: Path, run: Path, *overrides: str) -> Resolved:
    return resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, run, *overrides)), workers=1)


@pytest.mark.parametrize(
    ("architecture", "dtype", "changes"),
    [
        ("deepseek_v3", torch.float32, {"save": SHARDED}),
        ("deepseek_v3", torch.bfloat16, {"tie_word_embeddings": True}),
        ("qwen3_moe", torch.bfloat16, {"save": SHARDED}),
        ("qwen3_moe", torch.float32, {"save": FUSED}),
        ("qwen3_moe", torch.float32, {"tie_word_embeddings": True}),
    ],
)
def test_load_pretrained_gives_the_logits_of_transformers(
    text: Path, tmp_path: Path, architecture: str, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """Through the whole configuration; a bf16 folder gives the logits that transformers computes from it in fp32."""
    folder = tmp_path / "model"
    make_folder(folder, architecture, dtype, **changes)
    make_tokenizer(folder)
    resolved = resolved_run(text, tmp_path / "run", *pretrained_overrides(folder, architecture))
    task = build_task(resolved, tokenize(resolved.config), ALONE)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = logits(theirs, tokens())
    assert not torch.allclose(logits(task.model, tokens()), wanted, atol=1e-2)
    load_pretrained(folder, task.model, ALONE)
    torch.testing.assert_close(logits(task.model, tokens()), wanted, rtol=1e-5, atol=1e-5)
    assert {parameter.dtype for parameter in task.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("save", [SHARDED, FUSED], ids=["one by one", "fused"])
def test_fill_weights_reads_only_the_experts_of_its_rank(tmp_path: Path, save: dict[str, Any]) -> None:
    make_folder(tmp_path, "qwen3_moe", save=save)
    whole = small_model("qwen3_moe", vocab_size=320)
    fill_weights(whole, ALONE, tmp_path)
    for rank in range(4):
        mesh = Mesh(4, rank, 4)
        model = small_model("qwen3_moe", mesh, vocab_size=320)
        read = {name for name in find_weights(model, mesh, tmp_path) if ".experts." in name}
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name in read}
        assert experts == {3 * rank, 3 * rank + 1, 3 * rank + 2} and len(read) == 2 * 3 * 3
        fill_weights(model, mesh, tmp_path)
        for ours, all_of_them in zip(find_layers(model), find_layers(whole), strict=True):
            every = gated_experts(all_of_them).gate_up_proj[3 * rank : 3 * rank + 3]
            assert torch.equal(gated_experts(ours).gate_up_proj, every)


def change_file(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


EXPERT = "model.layers.0.mlp.experts.11.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({EXPERT: None}, f"missing ['{EXPERT}'], unexpected nothing"),
        ({EXPERT.replace("11", "12"): torch.ones(16, 32)}, f"unexpected ['{EXPERT.replace('11', '12')}']"),
        ({EXPERT.replace("11", "011"): torch.ones(16, 32)}, f"unexpected ['{EXPERT.replace('11', '011')}']"),
        ({EXPERT.replace("11", "1٣"): torch.ones(16, 32)}, "unexpected ['model.layers.0.mlp.experts.1٣.up_proj"),
        ({EXPERT.replace("11", "9" * 5000): torch.ones(1)}, "unexpected ['model.layers.0.mlp.experts.999"),
        ({"model.norm.weight": torch.ones(31)}, "model.norm.weight [31] instead of [32]"),
        ({EXPERT: torch.ones(16, 32, dtype=torch.int32)}, f"'{EXPERT} I32 instead of F64, F32, F16 or BF16'"),
        ({EXPERT: torch.ones(16, 32).to(torch.float8_e4m3fn)}, f"'{EXPERT} F8_E4M3 instead of F64, F32, F16 or BF16'"),
    ],
    ids=["missing", "extra", "leading zero", "non-ASCII digit", "5000 digits", "misshapen", "integers", "fp8"],
)
def test_trap_T43_a_folder_that_does_not_match_is_refused_on_every_rank(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    """Missing and unexpected names also on a rank that would not load them; and before anything is changed."""
    make_folder(tmp_path, "qwen3_moe")
    change_file(tmp_path, changes)
    others = [Mesh(4, 0, 4)] if "missing" in message or "unexpected" in message else []
    for mesh in (ALONE, Mesh(4, 3, 4), *others):
        model = small_model("qwen3_moe", mesh, vocab_size=320)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(WeightsError) as caught:
            fill_weights(model, mesh, tmp_path)
        assert message in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fused_experts_of_another_number_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, "qwen3_moe", save=FUSED)
    model: PreTrainedModel = small_model("qwen3_moe", Mesh(2, 0, 2), vocab_size=320, num_experts=6)
    with pytest.raises(WeightsError, match=r"gate_up_proj \[12, 32, 32\] instead of 6 experts"):
        fill_weights(model, Mesh(2, 0, 2), tmp_path)


def classifier(labels: tuple[str, ...], pooling: PoolingName | None = None) -> PreTrainedModel:
    task = TaskConfig(kind="classification", pooling=pooling)
    return small_model("qwen3_moe", **head_settings(task, labels))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_trap_T43_the_rows_of_a_head_keep_their_classes_and_its_pooling(tmp_path: Path) -> None:
    save_weights(classifier(("bad", "good"), "last"), ALONE, tmp_path, balanced=False)
    assert "score.weight" in find_weights(classifier(("bad", "good"), "last"), ALONE, tmp_path)
    for labels, pooling in ((("good", "bad"), "last"), (("bad", "good"), None), (("bad", "best"), "last")):
        with pytest.raises(WeightsError) as caught:
            find_weights(classifier(labels, pooling), ALONE, tmp_path)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"{tmp_path} holds a head for task.labels=['bad', 'good'] with task.pooling=last, which differs from the "
            f"task.labels={list(labels)} with task.pooling={pooling or 'mean'} of the run; set task.labels and "
            "task.pooling to those of the folder"
        )
    regression = small_model("qwen3_moe", **head_settings(TaskConfig(kind="regression", pooling="last"), ()))
    with pytest.raises(WeightsError, match=r"which differs from the regression with task\.pooling=last of the run"):
        find_weights(regression, ALONE, tmp_path)
    change_config(tmp_path, classifier_pooling="median")
    with pytest.raises(WeightsError, match=r"config\.json cannot be used \(classifier_pooling=median is not mean, "):
        find_weights(classifier(("bad", "good"), "last"), ALONE, tmp_path)


def test_a_language_model_has_no_head_for_classes(tmp_path: Path) -> None:
    """Also where its config.json has the key, as some published files do."""
    make_folder(tmp_path, "qwen3_moe")
    model = small_model("qwen3_moe", vocab_size=320, **head_settings(TaskConfig(kind="classification"), ("a", "b")))
    for problem in (None, "multi_label_classification"):
        change_config(tmp_path, problem_type=problem)
        found = find_weights(model, ALONE, tmp_path)
        assert "score.weight" not in found and "model.norm.weight" in found


def test_load_pretrained_reports_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"the run cannot start from model\.pretrained=.*nowhere: the folder does not exist"
    ):
        load_pretrained(tmp_path / "nowhere", small_model("qwen3_moe"), ALONE)


@pytest.mark.slow
def test_a_run_does_not_start_from_a_folder_that_does_not_match(text: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "model", tmp_path / "run"
    make_folder(folder, "deepseek_v3")
    make_tokenizer(folder)
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    change_file(folder, {bias: None, "model.extra.weight": torch.ones(2)})
    words = overrides_of(text, run, *pretrained_overrides(folder, "deepseek_v3"))
    argv = [sys.executable, "-m", "dist_moe", "train", "configs/debug.yaml", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert f"missing ['{bias}'], unexpected ['model.extra.weight']" in done.stderr and "Traceback" not in done.stderr
    assert "step" not in (run / "metrics.jsonl").read_text() and not (run / "checkpoints").exists()


def test_both_families_are_covered() -> None:
    assert set(FAMILIES) == {"deepseek_v3", "qwen3_moe"}
