"""Classes and values of texts: padding is not there, pooling, weights, and the loss as a mean over the global batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.comm.mesh import Mesh
from dist_moe.config.sections.task import TaskConfig
from dist_moe.model.build import build_model
from dist_moe.model.head import head_of, head_settings, label_names
from dist_moe.model.inputs import LabeledInputs
from dist_moe.model.tasks.classification import ClassificationTask, pool
from tests.dist.small import VOCABULARY
from tests.unit.model.samples import FAMILIES, small_model

LABELS = ("bad", "good", "so-so")
LENGTHS = (3, 9, 5, 1)
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_layers": [0, 1],
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""An encoder, whose feed-forward networks are MoE blocks."""
PRIVACY_FILTER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""An encoder of MoE models, whose tokens see those before and after them within a window."""
ENCODERS = {"bert": BERT, "openai_privacy_filter": PRIVACY_FILTER}
ONE = torch.tensor(1.0)


def make_task(
    architecture: str, pooling: str = "mean", kind: str = "classification", **settings: Any
) -> ClassificationTask:
    """A small model with a head."""
    task = TaskConfig(kind=kind, pooling=pooling)  # type: ignore[arg-type]
    keys = {**head_settings(task, LABELS), "initializer_range": 0.3}
    if architecture in ENCODERS:
        model = build_model(architecture, {**ENCODERS[architecture], **keys}, "softmax", Mesh(1, 0, 1), seed=0)
    else:
        model = small_model(architecture, **keys)
    return ClassificationTask(model, **settings)


def inputs(padding: int = 0, fill: int = 0, rows: tuple[int, ...] = LENGTHS) -> LabeledInputs:
    """Texts of different lengths, padded `padding` tokens further than needed with the id `fill`."""
    length = max(1, *rows) + padding
    tokens_BS = torch.randint(1, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(3))[: len(rows), :length]
    mask_BS = torch.arange(length) < torch.tensor(rows)[:, None]
    labels_B = torch.tensor([index % 3 for index in range(len(rows))], dtype=torch.float64)
    return LabeledInputs(tokens_BS.masked_fill(~mask_BS, fill), torch.zeros_like(tokens_BS), labels_B, mask_BS)


def row(batch: LabeledInputs, index: int) -> LabeledInputs:
    """One text without padding."""
    length = LENGTHS[index]
    tokens_BS, types_BS = (each[index : index + 1, :length] for each in (batch.tokens_BS, batch.types_BS))
    return LabeledInputs(tokens_BS, types_BS, batch.labels_B[index : index + 1], None)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("architecture", [*FAMILIES, *ENCODERS])
def test_trap_T04_padding_changes_nothing(architecture: str, pooling: str) -> None:
    """Neither the outputs, nor the gradient, nor the counts of the routing."""
    task = make_task(architecture, pooling)
    found = []
    for batch in (inputs(), inputs(padding=5, fill=7)):
        task.zero_grad()
        output = task(batch, ONE)
        output.loss.backward()
        weight = task.layers[0].router.weight
        found.append((output, weight.grad.clone()))  # type: ignore[union-attr]
    (first, gradient), (second, other) = found
    assert first.outputs_BC is not None and second.outputs_BC is not None
    torch.testing.assert_close(first.outputs_BC, second.outputs_BC, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(first.loads, second.loads, strict=True))
    assert all(int(load_E.sum()) == 2 * sum(LENGTHS) for load_E in first.loads)
    alone = torch.cat([task(row(inputs(), index), ONE).outputs_BC for index in range(4)])
    torch.testing.assert_close(first.outputs_BC, alone, atol=1e-5, rtol=1e-4)


def test_an_encoder_sees_which_text_of_a_pair_a_token_is_of() -> None:
    task, batch = make_task("bert").eval(), inputs()
    other = batch._replace(types_BS=(torch.arange(batch.tokens_BS.shape[1]) > 1).long().expand_as(batch.types_BS))
    assert not torch.allclose(task(batch, ONE).outputs_BC, task(other, ONE).outputs_BC, atol=1e-3)
    assert torch.equal(*(make_task("qwen3_moe").eval()(each, ONE).outputs_BC for each in (batch, other)))


def test_the_loss_is_the_sum_of_cross_entropies() -> None:
    task, batch = make_task("qwen3_moe"), inputs()
    output = task(batch, torch.tensor(0.5))
    assert output.outputs_BC is not None
    nll = -output.outputs_BC.log_softmax(dim=1)[torch.arange(4), batch.labels_B.long()]
    torch.testing.assert_close(output.nll_sum, nll.sum())
    torch.testing.assert_close(output.loss.detach(), 0.5 * nll.sum())


def test_the_outputs_of_a_bf16_model_are_in_fp32() -> None:
    task, batch = make_task("qwen3_moe", kind="regression"), inputs()
    task.bfloat16()
    assert batch.mask_BS is not None
    hidden_BSD = task.model.base_model(
        input_ids=batch.tokens_BS, attention_mask=batch.mask_BS.long(), use_cache=False
    ).last_hidden_state
    outputs_BC = task.eval()(batch, ONE).outputs_BC
    assert outputs_BC is not None and outputs_BC.dtype == torch.float32
    expected_BC = pool(hidden_BSD, batch.mask_BS, "mean") @ head_of(task.model).weight.float().T
    torch.testing.assert_close(outputs_BC, expected_BC, rtol=1e-6, atol=1e-6)
    assert not torch.equal(outputs_BC, outputs_BC.bfloat16().float())


def test_class_weights_are_of_training_alone() -> None:
    weights = [0.5, 2.0, 3.0]
    plain, weighted = make_task("qwen3_moe"), make_task("qwen3_moe", class_weights=weights)
    of_each = [float(plain(row(inputs(), index), ONE).nll_sum) for index in range(4)]
    expected = sum(weights[index % 3] * nll for index, nll in enumerate(of_each))
    assert float(weighted(inputs(), ONE).loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(weighted.eval()(inputs(), ONE).nll_sum) == pytest.approx(sum(of_each), rel=1e-5)


def test_a_regression_has_squared_errors() -> None:
    task = make_task("qwen3_moe", kind="regression")
    batch = inputs()
    output = task(batch, ONE)
    assert output.outputs_BC is not None and output.outputs_BC.shape == (4, 1)
    errors = (output.outputs_BC[:, 0] - batch.labels_B.float()) ** 2
    torch.testing.assert_close(output.nll_sum, errors.sum())
    assert label_names(task.model.config) == ()


def test_a_row_of_padding_alone_adds_nothing() -> None:
    task = make_task("qwen3_moe").eval()
    whole = inputs(rows=(*LENGTHS[:3], 0))
    output, without = task(whole, ONE), task(inputs(rows=LENGTHS[:3]), ONE)
    assert output.outputs_BC is not None and bool(output.outputs_BC.isfinite().all())
    torch.testing.assert_close(output.nll_sum, without.nll_sum)
    assert all(torch.equal(a, b) for a, b in zip(output.loads, without.loads, strict=True))


def test_pooling_by_hand() -> None:
    hidden_BSD = torch.arange(12.0).reshape(2, 3, 2)
    mask_BS = torch.tensor([[True, True, False], [True, True, True]])
    expected: dict[str, Tensor] = {
        "mean": torch.tensor([[1.0, 2.0], [8.0, 9.0]]),
        "first": torch.tensor([[0.0, 1.0], [6.0, 7.0]]),
        "last": torch.tensor([[2.0, 3.0], [10.0, 11.0]]),
    }
    for name, value_BD in expected.items():
        assert torch.equal(pool(hidden_BSD, mask_BS, name), value_BD)  # type: ignore[arg-type]


def test_the_head_takes_the_place_of_that_of_the_language_model() -> None:
    task = make_task("qwen3_moe")
    names = {name for name, _ in task.model.named_parameters()}
    assert "score.weight" in names and not any(name.startswith("lm_head") for name in names)
    assert head_of(task.model).weight.shape == (3, task.model.config.hidden_size)
    assert label_names(task.model.config) == LABELS
