"""What a model is given of a batch: made on the host, so that nothing waits for the device, and moved there.

Shapes: B sequences, S positions, N documents.
"""

from typing import NamedTuple, overload

import torch
from torch import Tensor

from dist_moe.data.labeled.stream import LabeledBatch
from dist_moe.data.stream import Batch


class Documents(NamedTuple):
    """Where the documents of a batch begin, with the rows of the batch one after the other.

    A row ends its last document. The padding of a row is a document.

    Attributes:
        starts_N1: int32 [N + 1], the first token of each document, and B * S.
        longest: Tokens of the longest document.
    """

    starts_N1: Tensor
    longest: int


class ModelInputs(NamedTuple):
    """The inputs of a `LanguageModelTask`, on its device.

    Attributes:
        tokens_BS: int64 in [0, V).
        targets_BS: int64, the next token, or -100 for a position without loss.
        positions_BS: Index of each token in its document; a return to 0 begins a new document, and tokens attend
            within their document only.
        mask_BS: bool, false for padding, which is neither routed nor counted; None where there is none, which costs
            less than a mask.
        documents: The same documents as in `positions_BS`, for attention on a GPU; None: it finds them itself.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    positions_BS: Tensor
    mask_BS: Tensor | None = None
    documents: Documents | None = None


class LabeledInputs(NamedTuple):
    """The inputs of a `ClassificationTask`, on its device.

    Attributes:
        tokens_BS: int64 in [0, V).
        types_BS: int64, 1 for tokens of the second text of a pair.
        labels_B: float64, the index of the class, or the value.
        mask_BS: bool, false for padding; None where there is none.
    """

    tokens_BS: Tensor
    types_BS: Tensor
    labels_B: Tensor
    mask_BS: Tensor | None = None


@overload
def model_inputs(batch: Batch, device: torch.device) -> ModelInputs: ...


@overload
def model_inputs(batch: LabeledBatch, device: torch.device) -> LabeledInputs: ...


@overload
def model_inputs(batch: Batch | LabeledBatch, device: torch.device) -> ModelInputs | LabeledInputs: ...


def model_inputs(batch: Batch | LabeledBatch, device: torch.device) -> ModelInputs | LabeledInputs:
    """Return the inputs for a batch on the CPU. The host does not wait for the device."""
    if isinstance(batch, LabeledBatch):
        mask_BS = None if bool(batch.mask_BS.all()) else _move(batch.mask_BS, device)
        return LabeledInputs(
            _move(batch.tokens_BS, device), _move(batch.types_BS, device), _move(batch.labels_B, device), mask_BS
        )
    mask_BS = batch.documents_BS >= 0
    has_padding = not bool(mask_BS.all())
    documents = find_documents(batch.documents_BS) if device.type == "cuda" else None
    return ModelInputs(
        _move(batch.tokens_BS, device),
        _move(batch.targets_BS, device),
        _move(batch.positions_BS, device),
        _move(mask_BS, device) if has_padding else None,
        None if documents is None else documents._replace(starts_N1=_move(documents.starts_N1, device)),
    )


def find_documents(documents_BS: Tensor) -> Documents:
    """Return the documents of `Batch.documents_BS`."""
    starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    starts_N = starts_BS.flatten().nonzero().flatten()
    starts_N1 = torch.cat([starts_N, torch.tensor([documents_BS.numel()])])
    return Documents(starts_N1.to(torch.int32), int(starts_N1.diff().max()))


def documents_line(architecture: str) -> str:
    """Say in a line that each document is given a row of its own."""
    return (
        f"{architecture} computes across the documents of a row: each document is given a row of its own, padded to "
        "the longest one"
    )


class SplitInputs(NamedTuple):
    """Inputs with one document in each row.

    Attributes:
        inputs: [N, L], with the length L of the longest document; the rest of a row is padding.
        place_T: int64 [B * S], the place of each token of the original rows in the new ones.
    """

    inputs: ModelInputs
    place_T: Tensor


def split_documents(inputs: ModelInputs) -> SplitInputs:
    """Give each document of packed rows a row of its own."""
    positions_BS = inputs.positions_BS
    is_start_BS = positions_BS == 0
    is_start_BS[:, 0] = True
    document_T = is_start_BS.flatten().cumsum(0) - 1
    starts_N = is_start_BS.flatten().nonzero().flatten()
    token_T = torch.arange(len(document_T), device=document_T.device)
    offset_T = token_T - starts_N[document_T]
    documents, length = len(starts_N), int(offset_T.max()) + 1
    place_T = document_T * length + offset_T
    real_BS = torch.ones_like(is_start_BS) if inputs.mask_BS is None else inputs.mask_BS

    def spread(values_BS: Tensor, filler: int) -> Tensor:
        rows = values_BS.new_full((documents * length,), filler)
        return rows.index_copy_(0, place_T, values_BS.flatten()).view(documents, length)

    positions_NL = torch.arange(length, device=positions_BS.device).expand(documents, length)
    split = ModelInputs(
        spread(inputs.tokens_BS, 0), spread(inputs.targets_BS, -100), positions_NL, spread(real_BS, False)
    )
    return SplitInputs(split, place_T)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device; from pinned memory, from which a GPU copies while the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
