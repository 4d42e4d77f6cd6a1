"""Models of transformers with distributed experts in a script: they train as the whole model does, and lose nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dist_moe
from tests.attached import EXPERTS, make_model, tokens
from tests.dist.pool import RankPool
from tests.dist.replaced import (
    Run,
    loaded,
    misused,
    read_folder,
    routed,
    saved_into,
    saved_while_sharded,
    trained,
    trained_later,
    trained_whole,
)

CLOSE = 1e-5


def check_same_folder(found: Path, wanted: Path) -> None:
    """The same tensors by name, up to the order of sums."""
    ours, theirs = read_folder(found), read_folder(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=CLOSE), name


def check_same_run(runs: list[Run], alone: Run) -> None:
    """The same losses, norms of gradients, and loads."""
    for run in runs:
        assert run.losses == pytest.approx(alone.losses, rel=CLOSE)
        assert run.norms == pytest.approx(alone.norms, rel=1e-4)
        assert run.counts == alone.counts


@pytest.mark.parametrize(
    ("family", "world_size", "expert_parallel", "wrapper", "clipped"),
    [
        ("qwen3_moe", 2, 2, "ddp", False),
        ("deepseek_v3", 2, 2, "ddp", True),
        ("gpt_oss", 2, 2, "fsdp", True),
        ("mixtral", 4, 2, "ddp", True),
        ("llama4_text", 2, 2, "ddp", True),
        pytest.param("qwen3_moe", 4, 4, "fsdp", False, marks=pytest.mark.slow),
    ],
)
def test_trap_T104_distributed_experts_train_as_the_whole_model(
    ranks: RankPool, tmp_path: Path, family: str, world_size: int, expert_parallel: int, wrapper: str, clipped: bool
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (alone,) = ranks.run(trained_whole, 1, family, str(whole), clipped)
    runs = ranks.run(trained, world_size, family, expert_parallel, wrapper, str(parts), clipped)
    check_same_run(runs, alone)
    assert [run.held for run in runs] == [EXPERTS // expert_parallel] * world_size
    check_same_folder(parts, whole)
    opened = AutoModelForCausalLM.from_pretrained(parts)
    wanted = AutoModelForCausalLM.from_pretrained(whole)
    with torch.no_grad():
        found, expected = (model(input_ids=tokens(0)).logits for model in (opened, wanted))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("wrapped", "the ranks have the same experts since the model was put into a wrapper"),
        ("sharded", "was sharded over ranks that hold different experts"),
        ("state", "has the experts 0 to 3, and this rank holds 4 to 7"),
        ("saved", "call dist_moe.save_pretrained(model, folder) on all ranks"),
        ("clipped", "the dense weights of the ranks differ"),
    ],
    ids=["wrapped", "sharded", "state", "saved", "clipped"],
)
def test_trap_T104_what_would_mix_the_experts_of_ranks_is_refused(ranks: RankPool, how: str, said: str) -> None:
    messages = ranks.run(misused, 2, how)
    assert said in messages[1]
    assert said in messages[0] or how == "state"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_folder_is_loaded_in_parts_and_saved_whole(ranks: RankPool, tmp_path: Path, family: str) -> None:
    model = make_model(family).eval()
    model.save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    with torch.no_grad():
        wanted = model(input_ids=tokens(0)).logits
    for logits, held in ranks.run(loaded, 2, str(tmp_path / "whole"), str(tmp_path / "parts")):
        assert torch.allclose(logits, wanted, atol=CLOSE)
        assert set(held) == {EXPERTS // 2}
    check_same_folder(tmp_path / "parts", tmp_path / "whole")


def test_trap_T107_experts_that_every_rank_has_are_trained_as_copies(ranks: RankPool, tmp_path: Path) -> None:
    (alone,) = ranks.run(trained_whole, 1, "qwen3_moe", str(tmp_path / "whole"), True)
    runs = ranks.run(trained, 2, "qwen3_moe", 1, "fsdp", str(tmp_path / "copies"), True)
    assert {run.held for run in runs} == {0}, "none is distributed"
    check_same_run(runs, alone)
    check_same_folder(tmp_path / "copies", tmp_path / "whole")


def test_trap_T107_experts_that_are_frozen_at_first_get_the_gradient_of_the_mean(ranks: RankPool) -> None:
    for found, wanted in ranks.run(trained_later, 2):
        assert torch.allclose(found, wanted, atol=CLOSE)


def test_an_error_of_the_rank_that_writes_is_raised_on_all(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    first, second = ranks.run(saved_into, 2, str(tmp_path / "file" / "model"))
    assert "could not be saved" in first and first == second


def test_a_sharded_model_with_routers_of_this_package_is_refused_on_all_ranks(ranks: RankPool) -> None:
    for message in ranks.run(saved_while_sharded, 2):
        assert "FSDP2 has sharded a model with routers of this package" in message


def test_threshold_routing_with_distributed_experts_is_that_of_one_rank(ranks: RankPool, tmp_path: Path) -> None:
    (alone,) = ranks.run(routed, 1, 1, str(tmp_path / "one"))
    both = ranks.run(routed, 2, 2, str(tmp_path / "two"))
    for run in both:
        assert run.counts == alone.counts
    check_same_folder(tmp_path / "two", tmp_path / "one")
    model = dist_moe.from_pretrained(tmp_path / "two")
    assert model.config.model_type == "qwen3_moe"
