"""Tests of routers that are orthogonal to the mean of their inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.errors import ConfigError
from dist_moe.model.centered_router import center_routers, mean_router_inputs
from dist_moe.model.inputs import ModelInputs
from dist_moe.model.tasks.language_model import LanguageModelTask
from tests.dense import dense_folder, upcycled
from tests.unit.model.samples import ALONE, tokens


def inputs(rows: int, padding: int) -> ModelInputs:
    """Make a batch of one document a row, with padding at its end."""
    tokens_BS = tokens(rows)
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[:, tokens_BS.shape[1] - padding :] = False
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    targets_BS = tokens_BS.roll(-1, dims=1).masked_fill(~mask_BS, -100)
    return ModelInputs(tokens_BS, targets_BS, positions_BS, mask_BS if padding else None)


def test_trap_T58_the_mean_is_that_of_the_dense_network_without_padding(tmp_path: Path) -> None:
    dense: Any = dense_folder(tmp_path, "llama")
    task = LanguageModelTask(upcycled(tmp_path, "llama", ALONE))
    batches = [inputs(2, padding=0), inputs(3, padding=4)]
    means = mean_router_inputs(task, batches)
    seen: list[Tensor] = []
    for layer in (1, 3):
        dense.model.layers[layer].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in batches:
        seen.clear()
        with torch.no_grad():
            dense(input_ids=batch.tokens_BS, position_ids=batch.positions_BS)
        mask_BS = torch.ones_like(batch.tokens_BS, dtype=torch.bool) if batch.mask_BS is None else batch.mask_BS
        for hidden_BSD, part in zip(seen, kept, strict=True):
            part.append(hidden_BSD[mask_BS])
    for mean_D, part in zip(means, kept, strict=True):
        torch.testing.assert_close(mean_D, torch.cat(part).mean(dim=0), rtol=1e-4, atol=1e-5)
    blocks = [module for module in task.modules() if hasattr(module, "as_dense")]
    assert len(blocks) == 2 and not any(block.as_dense for block in blocks)


def test_the_mean_is_computed_on_the_cpu_where_the_loss_of_the_run_needs_a_gpu(tmp_path: Path) -> None:
    dense_folder(tmp_path, "llama")
    model, batch = upcycled(tmp_path, "llama", ALONE), inputs(2, padding=0)
    task = LanguageModelTask(model, cross_entropy="liger")
    for mean_D, expected_D in zip(
        mean_router_inputs(task, [batch]), mean_router_inputs(LanguageModelTask(model), [batch]), strict=True
    ):
        assert torch.equal(mean_D, expected_D)
    with pytest.raises(ConfigError, match="cross_entropy=liger needs a GPU"):
        task(batch, torch.ones(()))


def test_centered_rows_are_orthogonal_to_the_mean_and_keep_the_rest(tmp_path: Path) -> None:
    dense_folder(tmp_path, "bert")
    model = upcycled(tmp_path, "bert", ALONE)
    routers = [layer.router for layer in LanguageModelTask(model).layers]
    means = [torch.randn(32, generator=torch.Generator().manual_seed(index)) for index in range(len(routers))]
    before = [router.weight.detach().clone() for router in routers]
    center_routers(routers, means)
    for router, mean_D, before_ED in zip(routers, means, before, strict=True):
        weight_ED = router.weight.detach()
        torch.testing.assert_close(weight_ED @ mean_D, torch.zeros(8), rtol=0, atol=1e-5)
        other_D = torch.randn(32)
        other_D -= mean_D * (other_D @ mean_D) / (mean_D @ mean_D)
        torch.testing.assert_close(weight_ED @ other_D, before_ED @ other_D, rtol=1e-4, atol=1e-5)
