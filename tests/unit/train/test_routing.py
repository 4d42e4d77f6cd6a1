"""What the configuration says of routing is what the model of a run does."""

import json
from pathlib import Path

import pytest

from dist_moe.config import Config, resolve
from dist_moe.data.corpus import TokenizedData, prepare
from dist_moe.moe.select import TopK
from dist_moe.train.setup import build_task
from tests.unit.config.files import debug, qwen
from tests.unit.model.samples import ALONE

DEEPSEEK = (
    "num_experts_per_tok=3", "norm_topk_prob=false", "routed_scaling_factor=1.75", "n_group=4", "topk_group=2"
)  # fmt: skip


@pytest.fixture
def tokenized(tmp_path: Path) -> TokenizedData:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Document {n}.", "name": str(n)}) + "\n" for n in range(40)))
    return prepare([str(text)], "bytes", 0, 0.5, tmp_path / "cache")


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (qwen("router.scaling_factor=2.5", "router.score=sigmoid"), TopK(2, "sigmoid", routed_scaling_factor=2.5)),
        (qwen("router.normalize=true"), TopK(2, "softmax", normalize=True)),
        (
            debug(*(f"model.config.{setting}" for setting in DEEPSEEK), "router.score=softmax"),
            TopK(3, "softmax", routed_scaling_factor=1.75, groups=4, topk_groups=2),
        ),
    ],
    ids=["not in Qwen3's config", "in Qwen3's config", "in DeepSeek's config"],
)
def test_every_router_value_reaches_every_router(tokenized: TokenizedData, config: Config, rule: TopK) -> None:
    task = build_task(resolve(config, workers=1), tokenized, ALONE)
    assert len(task.layers) > 0
    assert {layer.router.rule for layer in task.layers} == {rule}
