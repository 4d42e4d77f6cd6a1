"""Families that compute across the documents of a row: each document has a row, and the records are the batch's."""

import pytest
import torch

from dist_moe.model.inputs import ModelInputs
from dist_moe.model.tasks.language_model import LanguageModelTask
from tests.families.small import small_config
from tests.family_models import converted


@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h", "gpt_oss"])
def test_trap_T103_documents_of_a_packed_row_do_not_see_each_other(family: str) -> None:
    """Recurrent layers, and masks without positions, compute across the documents of a row."""
    task = LanguageModelTask(converted(small_config(family))).eval()
    assert not task.separates_documents
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 1]])
    mask = torch.tensor([[True] * 8, [True] * 6 + [False] * 2])
    tokens = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(tokens, -100)
    targets[0, 4:7] = tokens[0, 5:8]
    losses, kept = [], []
    for first in (tokens[0, :4], tokens[0, :4] + 7):
        given = tokens.clone()
        given[0, :4] = first
        output = task(ModelInputs(given, targets, positions, mask), torch.ones(()), keep_records=True)
        losses.append(float(output.nll_sum))
        kept.append(output.records)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    (record,) = kept[0][:1]
    assert record.ids_TK.shape[0] == 16 and torch.equal(record.ids_TK[:, 0] >= 0, mask.flatten())
    assert sum(int(load.sum()) for load in output.loads) == 14 * 2 * len(output.loads)


def test_trap_T113_a_document_is_computed_by_its_own_positions() -> None:
    """Llama 4 attends to chunks of a row, and scales attention by the place in the row, without its positions."""
    task = LanguageModelTask(converted(small_config("llama4"))).eval()
    tokens = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    losses = []
    for order in ([0, 1], [1, 0]):
        row = tokens[order].view(1, 40)
        targets = torch.full_like(row, -100)
        start = 20 * order.index(1)
        targets[0, start : start + 19] = row[0, start + 1 : start + 20]
        positions = torch.arange(20).repeat(2).unsqueeze(0)
        losses.append(
            float(task(ModelInputs(row, targets, positions, torch.ones_like(row).bool()), torch.ones(())).nll_sum)
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
