"""Folders of models that `route` has changed: saved, opened again, and refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dist_moe
from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.hf_folder import read_raw_config
from tests.attached import EXPERTS, logits_of, make_model, routers


def test_its_own_save_pretrained_writes_what_is_opened_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers' own method would write the names of replaced modules, which its classes do not read."""
    model: Any = dist_moe.route(make_model(), threshold=0.5)
    model.save_pretrained(tmp_path / "routed")
    assert "qwen3_moe cannot express this routing" in caplog.text
    opened = dist_moe.from_pretrained(tmp_path / "routed")
    assert torch.allclose(logits_of(opened), logits_of(model), atol=1e-5)
    same: Any = dist_moe.route(make_model("gpt_oss"), "top_k")
    same.save_pretrained(tmp_path / "same")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert torch.allclose(logits_of(plain), logits_of(same), atol=1e-5)


def test_the_target_of_the_threshold_is_in_the_folder(tmp_path: Path) -> None:
    model: Any = dist_moe.route(make_model(), threshold=0.5, target_experts_per_token=2.5)
    model.save_pretrained(tmp_path)
    opened = dist_moe.from_pretrained(tmp_path)
    assert [router.target_experts_per_token for router in routers(opened)] == [2.5] * len(routers(model))
    opened.save_pretrained(tmp_path / "again")
    assert read_raw_config(tmp_path / "again")["dist_moe"]["target_experts_per_token"] == 2.5
    raw = read_raw_config(tmp_path)
    for wrong in (0, 99, "two", True):
        raw["dist_moe"]["target_experts_per_token"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(WeightsError, match=rf"per_token=.*not a number of experts of {EXPERTS}; correct it"):
            dist_moe.from_pretrained(tmp_path)


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = dist_moe.route(make_model(), "top_k")
    copied: Any = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    copied.save_pretrained(tmp_path)
    assert not dist_moe.from_pretrained(tmp_path).get_parameter("lm_head.weight").any()


def test_a_save_on_every_rank_writes_on_the_main_one(tmp_path: Path) -> None:
    model: Any = dist_moe.route(make_model())
    model.save_pretrained(tmp_path / "none", is_main_process=False, state_dict=model.state_dict())
    assert not (tmp_path / "none").exists()


def test_settings_of_generation_and_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    model: Any = make_model()
    model.generation_config.update(eos_token_id=[2, 5], top_k=7, do_sample=True)
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "routed").mkdir()
    (tmp_path / "routed" / "adapter_model.safetensors").write_bytes(b"")
    dist_moe.save_pretrained(dist_moe.route(dist_moe.from_pretrained(tmp_path / "whole")), tmp_path / "routed")
    opened: Any = dist_moe.from_pretrained(tmp_path / "routed")
    assert (opened.generation_config.eos_token_id, opened.generation_config.top_k) == ([2, 5], 7)
    assert (tmp_path / "routed" / "adapter_model.safetensors").exists()
    dist_moe.save_pretrained(dist_moe.parallelize(model), tmp_path / "routed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "routed", use_safetensors=True)
    assert not (tmp_path / "routed" / "model.safetensors.index.json").exists(), "of the earlier save"


def test_adapters_are_not_saved_under_other_names(tmp_path: Path) -> None:
    model: Any = dist_moe.route(make_model())
    projection = model.model.layers[0].self_attn
    projection.q_proj = nn.Sequential()
    projection.q_proj.base_layer = nn.Linear(32, 32)
    with pytest.raises(dist_moe.UserError, match=r"the model has adapters \(PEFT\); call merge_and_unload"):
        model.save_pretrained(tmp_path)
