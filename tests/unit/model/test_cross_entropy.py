"""The loss from hidden states in chunks equals that of the logits, forward and backward, and knows where it applies."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dist_moe.config.sections.model import CrossEntropyName
from dist_moe.data.stream import IGNORE_INDEX
from dist_moe.errors import ConfigError
from dist_moe.model import cross_entropy, liger
from dist_moe.model.cross_entropy import (
    choose_cross_entropy,
    chunk_rows,
    chunked_nll_sum,
    output_head,
    plain_nll_sum,
)
from dist_moe.model.inputs import ModelInputs
from dist_moe.model.tasks.language_model import LanguageModelTask
from tests.unit.model.samples import FAMILIES, small_model, tokens

SCALE = 0.37
ROWS, WIDTH, VOCABULARY = 50, 16, 23
SMALLEST = {  # keys of the config classes of families with a head of their own kind
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 31,
}


class Case(NamedTuple):
    """Inputs of a head."""

    hidden_TD: Tensor
    head: nn.Linear
    targets_T: Tensor


def make_case(dtype: torch.dtype, bias: bool = False, ignored: float = 0.3, rows: int = ROWS) -> Case:
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    targets_T = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    targets_T[torch.rand(rows, generator=generator) < ignored] = IGNORE_INDEX
    return Case(torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_(), head, targets_T)


def run(case: Case, chunked: bool, scale: float = SCALE) -> dict[str, Tensor]:
    """The loss, and the gradients of `scale` times it."""
    leaves = {"hidden": case.hidden_TD, **dict(case.head.named_parameters())}
    for leaf in leaves.values():
        leaf.grad = None
    nll_sum = chunked_nll_sum(*case) if chunked else plain_nll_sum(case.head(case.hidden_TD), case.targets_T)
    (nll_sum * scale).backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(found) == len(leaves)
    return {"nll_sum": nll_sum.detach(), **found}


def exact(case: Case) -> dict[str, Tensor]:
    """What `run` gives in fp64 for the same values."""
    head = nn.Linear(WIDTH, VOCABULARY, bias=case.head.bias is not None, dtype=torch.float64)
    head.load_state_dict(case.head.state_dict())
    return run(Case(case.hidden_TD.detach().double().requires_grad_(), head, case.targets_T), chunked=False)


def error(found: Tensor, wanted: Tensor) -> float:
    """The relative distance of two tensors, by their 2-norms."""
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 7 rows: 8 of them for 50 rows, the last smaller."""
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)]
)
def test_trap_T70_chunks_equal_the_logits_of_all_rows(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    case = make_case(dtype, bias)
    found, wanted = run(case, chunked=True), exact(case)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert error(value, wanted[name]) < tolerance, name
        assert value.dtype == (dtype if name != "nll_sum" else torch.promote_types(dtype, torch.float32))


@pytest.mark.usefixtures("small_chunks")
def test_a_bias_that_is_trained_alone_has_its_gradient() -> None:
    case = make_case(torch.float64, bias=True)
    wanted = run(case, chunked=False)["bias"]
    case.head.weight.requires_grad_(False)
    nll_sum = chunked_nll_sum(case.hidden_TD.detach(), case.head, case.targets_T)
    (found,) = torch.autograd.grad(nll_sum * SCALE, [case.head.bias])
    assert error(found, wanted) < 1e-14


@pytest.mark.usefixtures("small_chunks")
def test_trap_T70_in_bf16_no_gradient_is_less_exact_than_that_of_the_logits() -> None:
    """The weight's gradient is a sum over 286 chunks: in bf16 each sum would be rounded."""
    case = make_case(torch.bfloat16, bias=True, rows=2_000)
    chunked, plain, wanted = run(case, chunked=True), run(case, chunked=False), exact(case)
    for name in ("hidden", "weight", "bias"):
        assert error(chunked[name], wanted[name]) < 1.5 * error(plain[name], wanted[name]), name


@pytest.mark.usefixtures("small_chunks")
def test_the_factor_of_the_loss_is_not_rounded() -> None:
    case = make_case(torch.bfloat16)
    once, scaled = run(case, chunked=True, scale=1.0), run(case, chunked=True, scale=1 + 2**-10)
    for name in ("hidden", "weight"):
        wanted = once[name].float() * (1 + 2**-10)
        assert error(scaled[name], wanted.double()) < 2**-8, name


@pytest.mark.usefixtures("small_chunks")
def test_two_runs_give_equal_bits() -> None:
    case = make_case(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(*(run(case, chunked=True).values() for _ in range(2)), strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_without_labels_loss_and_gradients_are_zero() -> None:
    assert not any(
        value.any() for value in run(make_case(torch.float32, bias=True, ignored=1.1), chunked=True).values()
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_gradients_that_are_needed_are_computed(frozen: str) -> None:
    case = make_case(torch.float32)
    whole = run(case, chunked=True)
    (case.hidden_TD if frozen == "hidden" else case.head.weight).requires_grad_(False)
    case.hidden_TD.grad = case.head.weight.grad = None
    (chunked_nll_sum(*case) * SCALE).backward()
    found: dict[str, Any] = {"hidden": case.hidden_TD.grad, "weight": case.head.weight.grad}
    assert found.pop(frozen) is None
    ((name, value),) = found.items()
    assert value is not None and torch.equal(value, whole[name])


def test_an_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.float32)
    wanted = run(case, chunked=False)["nll_sum"]
    monkeypatch.setattr(cross_entropy, "_logits_gradient", None)
    with torch.no_grad():
        torch.testing.assert_close(chunked_nll_sum(*case), wanted)


def test_chunks_have_equal_sizes_and_enough_rows() -> None:
    assert chunk_rows(2048, 4096, 4, "cpu") == 512
    assert chunk_rows(2049, 4096, 4, "cpu") == 410  # 5 chunks, not 4 and one of a row
    assert chunk_rows(2048, 151_936, 4, "cpu") == 256
    assert chunk_rows(16_384, 151_936, 4, "cuda") == 432
    assert chunk_rows(3, 4096, 4, "cpu") == 3
    assert chunk_rows(0, 4096, 4, "cpu") == 1


def gradients(task: LanguageModelTask, name: CrossEntropyName) -> dict[str, Tensor]:
    """The loss and the gradients of a task."""
    task.zero_grad()
    task.cross_entropy = name
    tokens_BS = tokens()
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    output = task(ModelInputs(tokens_BS, tokens_BS.roll(-1, 1), positions_BS), torch.tensor(0.1))
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return {"nll_sum": output.nll_sum, **found}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_gives_the_same_gradients_by_chunks(architecture: str, tied: bool) -> None:
    task = LanguageModelTask(small_model(architecture, tie_word_embeddings=tied))
    assert task.cross_entropy == "auto"
    plain, chunked = gradients(task, "plain"), gradients(task, "chunked")
    assert plain.keys() == chunked.keys() and ("model.lm_head.weight" in plain) == (not tied)
    for name, value in plain.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-4, atol=1e-6)


def test_no_logits_of_all_rows_are_made() -> None:
    task = LanguageModelTask(small_model("qwen3_moe"))
    calls: list[Any] = []
    task.model.lm_head.register_forward_hook(lambda *call: calls.append(call))
    gradients(task, "auto")
    assert not calls
    gradients(task, "plain")
    assert len(calls) == 1


def test_auto_is_by_device_and_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert choose_cross_entropy("auto", cpu) is chunked_nll_sum
    assert choose_cross_entropy("plain", cpu) is None
    for missing, wanted in (("a C compiler", chunked_nll_sum), ("", liger.linear_nll_sum)):
        monkeypatch.setattr(liger, "missing", lambda missing=missing: missing)
        assert choose_cross_entropy("auto", cuda) is wanted
        assert choose_cross_entropy("auto", cpu) is chunked_nll_sum
    assert choose_cross_entropy("liger", cuda) is liger.linear_nll_sum
    with pytest.raises(ConfigError, match="cross_entropy=liger needs a GPU, and the device is cpu; use auto"):
        choose_cross_entropy("liger", cpu)
    monkeypatch.setattr(liger, "missing", lambda: "a C compiler")
    with pytest.raises(ConfigError, match=r"needs a C compiler; install it \(the extra gpu has .*\), or use auto"):
        choose_cross_entropy("liger", cuda)


@pytest.mark.parametrize(
    ("architecture", "changes", "linear"),
    [
        ("qwen3_moe", {}, True),
        ("mixtral", {}, True),
        ("granitemoe", {"logits_scaling": 8.0}, False),  # logits / 8
        ("gemma2", {"final_logit_softcapping": 30.0}, False),  # 30 tanh(logits / 30)
        ("cohere", {"logit_scale": 0.25}, False),
    ],
)
def test_trap_T70_the_head_is_known_to_be_linear(architecture: str, changes: dict[str, Any], linear: bool) -> None:
    config = AutoConfig.for_model(architecture, **{**SMALLEST, **changes}, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    before = dict(model.named_children())
    assert output_head(model) is (model.lm_head if linear else None)
    assert dict(model.named_children()) == before
