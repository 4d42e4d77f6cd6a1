"""Packed documents do not see each other, padding is not there, and attention in fp32 is PyTorch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dist_moe.data.stream import IGNORE_INDEX
from dist_moe.model.inputs import ModelInputs
from dist_moe.model.tasks.base import Output
from dist_moe.model.tasks.language_model import LanguageModelTask
from tests.unit.model.samples import FAMILIES, small_model, tokens

CUT, LENGTH = 10, 24  # document 0 is positions 0 .. CUT - 1 of the row


class Rows:
    """Two documents in each row, or what is made of them."""

    def __init__(self, tokens_BS: Tensor, documents_BS: Tensor, positions_BS: Tensor) -> None:
        self.tokens_BS, self.positions_BS = tokens_BS, positions_BS
        self.mask_BS = documents_BS >= 0
        self.targets_BS = tokens_BS.roll(-1, 1)
        ends_BS = documents_BS != documents_BS.roll(-1, 1)
        ends_BS[:, -1] = True
        self.targets_BS[ends_BS | ~self.mask_BS] = IGNORE_INDEX


def packed(change: int | None = None, padding: int = 0) -> Rows:
    """The rows; `change` replaces the token at one position, the last `padding` positions of row 0 are padding."""
    tokens_BS = tokens(2, LENGTH)
    documents_BS = torch.zeros_like(tokens_BS)
    documents_BS[:, CUT:] = 1
    positions_BS = torch.cat([torch.arange(CUT), torch.arange(LENGTH - CUT)]).repeat(2, 1)
    if change is not None:
        tokens_BS[:, change] = tokens_BS[:, change] % 60 + 1
    if padding:
        documents_BS[0, -padding:] = -1
        positions_BS[0, -padding:] = 0
    return Rows(tokens_BS, documents_BS, positions_BS)


def alone_in_batch(rows: Rows, row: int, start: int, end: int) -> Rows:
    """One document of the rows, in a row of its own."""
    tokens_BS = rows.tokens_BS[row : row + 1, start:end]
    return Rows(tokens_BS, torch.zeros_like(tokens_BS), torch.arange(end - start).unsqueeze(0))


def forward(task: LanguageModelTask, rows: Rows) -> tuple[Tensor, Output]:
    """The task's own forward -> the logits of the hidden states that were made in it, its output."""
    seen: list[Tensor] = []
    norm: Any = task.model.base_model.norm
    handle = norm.register_forward_hook(lambda module, inputs, hidden: seen.append(task.model.lm_head(hidden).detach()))
    try:
        output = task(ModelInputs(rows.tokens_BS, rows.targets_BS, rows.positions_BS, rows.mask_BS), torch.tensor(1.0))
    finally:
        handle.remove()
    (logits_BSV,) = seen
    return logits_BSV, output


def gradients(task: LanguageModelTask, rows: Rows) -> tuple[Output, dict[str, Tensor]]:
    """The task's output and the gradient of every parameter."""
    task.zero_grad()
    _, output = forward(task, rows)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


@pytest.fixture(params=list(FAMILIES))
def task(request: pytest.FixtureRequest) -> LanguageModelTask:
    return LanguageModelTask(small_model(request.param))


def test_a_token_of_one_document_changes_no_logit_of_the_next(task: LanguageModelTask) -> None:
    changed = CUT - 3
    before, _ = forward(task, packed())
    after, _ = forward(task, packed(change=changed))
    torch.testing.assert_close(after[:, CUT:], before[:, CUT:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=1e-5, atol=1e-5)
    assert ((after - before)[:, changed:CUT].abs().amax(-1) > 1e-3).all(), "but it does in its own"


def test_a_packed_row_is_its_documents_run_alone_in_batch(task: LanguageModelTask) -> None:
    rows = packed()
    packed_logits, whole = forward(task, rows)
    nll, loads = torch.zeros(()), [torch.zeros_like(load) for load in whole.loads]
    for row in range(2):
        for start, end in ((0, CUT), (CUT, LENGTH)):
            alone, output = forward(task, alone_in_batch(rows, row, start, end))
            torch.testing.assert_close(packed_logits[row : row + 1, start:end], alone, rtol=1e-4, atol=1e-5)
            nll += output.nll_sum
            loads = [a + b for a, b in zip(loads, output.loads, strict=True)]
    torch.testing.assert_close(whole.nll_sum, nll, rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(whole.loads, loads, strict=True))


def test_what_stands_in_the_padding_changes_nothing(task: LanguageModelTask) -> None:
    rows, other = packed(padding=5), packed(padding=5)
    other.tokens_BS[0, -5:] = 7
    assert not torch.equal(rows.tokens_BS, other.tokens_BS)
    (one, gradient), (two, other_gradient) = gradients(task, rows), gradients(task, other)
    assert torch.equal(one.nll_sum, two.nll_sum)
    assert all(torch.equal(a, b) for a, b in zip(one.loads, two.loads, strict=True))
    for name in gradient:
        torch.testing.assert_close(gradient[name], other_gradient[name], rtol=0, atol=1e-6)


def test_padding_is_neither_routed_nor_counted(task: LanguageModelTask) -> None:
    """Against the same documents in rows without padding; 2 experts a token, 43 tokens in 48 places."""
    rows = packed(padding=5)
    padded, gradient = gradients(task, rows)
    assert [int(load.sum()) for load in padded.loads] == [2 * 43] * 2
    documents = [(0, 0, CUT), (0, CUT, LENGTH - 5), (1, 0, CUT), (1, CUT, LENGTH)]
    nll, summed = torch.zeros(()), {name: torch.zeros_like(value) for name, value in gradient.items()}
    for document in documents:
        output, part = gradients(task, alone_in_batch(rows, *document))
        nll += output.nll_sum
        for name, value in part.items():
            summed[name] += value
    torch.testing.assert_close(padded.nll_sum, nll, rtol=1e-5, atol=0)
    for name in gradient:
        error = (gradient[name] - summed[name]).norm()
        assert error <= 1e-4 * summed[name].norm() + 1e-6, name


def test_a_batch_of_padding_alone_leaves_nothing(task: LanguageModelTask) -> None:
    tokens_BS = tokens(2, 6)
    output, gradient = gradients(task, Rows(tokens_BS, -torch.ones_like(tokens_BS), torch.zeros_like(tokens_BS)))
    assert float(output.nll_sum) == 0.0
    assert not any(load.any() for load in output.loads)
    assert not any(value.any() for value in gradient.values())


class Calls(TorchFunctionMode):
    """Counts the calls of one function while it lets every call through."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.count = function, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is self.function
        return func(*args, **(kwargs or {}))


def test_attention_in_fp32_runs_through_sdpa(task: LanguageModelTask) -> None:
    assert task.model.config._attn_implementation == "dist_moe"
    with Calls(F.scaled_dot_product_attention) as calls:
        forward(task, packed())
    assert calls.count == task.model.config.num_hidden_layers
