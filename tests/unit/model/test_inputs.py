"""What a model is given of a batch: a mask only where there is padding, and where documents begin."""

import pytest
import torch

from dist_moe.data.stream import PADDING, Batch
from dist_moe.model.inputs import find_documents, model_inputs

DOCUMENTS_BS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0], [0, 0, 0, PADDING, PADDING, PADDING]])
CPU = torch.device("cpu")


def batch_of(documents_BS: torch.Tensor) -> Batch:
    return Batch(*(torch.arange(documents_BS.numel()).view_as(documents_BS),) * 2, documents_BS, *(documents_BS,) * 2)


def test_trap_T71_a_batch_without_padding_has_no_mask() -> None:
    assert model_inputs(batch_of(DOCUMENTS_BS[:2]), CPU).mask_BS is None
    mask_BS = model_inputs(batch_of(DOCUMENTS_BS), CPU).mask_BS
    assert mask_BS is not None and torch.equal(mask_BS, DOCUMENTS_BS >= 0)


def test_documents_begin_where_their_number_changes_and_in_each_row() -> None:
    starts_N1, longest = find_documents(DOCUMENTS_BS)
    assert starts_N1.tolist() == [0, 2, 5, 6, 12, 15, 18] and starts_N1.dtype == torch.int32
    assert longest == 6
    assert find_documents(DOCUMENTS_BS[:1, :1]).longest == 1


def test_on_a_cpu_the_model_finds_documents_itself() -> None:
    assert model_inputs(batch_of(DOCUMENTS_BS), CPU).documents is None


@pytest.mark.parametrize("rows", [0, 1])
def test_tensors_are_those_of_the_batch(rows: int) -> None:
    batch = batch_of(DOCUMENTS_BS[rows : rows + 1])
    inputs = model_inputs(batch, CPU)
    assert all(torch.equal(a, b) for a, b in zip(inputs[:2], batch[:2], strict=True))
    assert torch.equal(inputs.positions_BS, batch.positions_BS)
