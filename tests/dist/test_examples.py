"""The files of examples/ run as their README says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import dist_moe
from tests.selection import only_first

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
RANKS, SEQUENCES, LENGTH, TOP_K = 2, 8, 64, 2
STEPS = 60
LINE = re.compile(r"^step (\d+): loss \d+\.\d+, MaxVio (\d+\.\d+) \(\d\.\d+\), (\d+) assignments on (\d+) ranks$", re.M)


class Uneven(NamedTuple):
    """A small model whose experts have become uneven, with its tokenizer, and the text that it was trained on."""

    folder: Path
    text: Path


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Uneven:
    """Train a model without balance on the reference of Python, a text that no change of this tree alters."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("uneven")
    made = Uneven(folder / "model", folder / "text.txt")
    made.text.write_text("\n\n".join(topics.values()))
    max_vio = train_without_balance(made)
    assert max_vio > 1.5, "a model whose balance is bad enough to become better"
    return made


def train_without_balance(made: Uneven) -> float:
    """Train a model on a text and save it with its tokenizer; mean MaxVio of the last ten steps."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import dist_moe

    tokenizer = train_tokenizer(made.text)
    ids = tokenizer(made.text.read_text(), return_tensors="pt").input_ids[0]
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_experts=8, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, vocab_size=512, max_position_embeddings=512, eos_token_id=0, pad_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).train()
    balancer = dist_moe.balance(model, "none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    max_vio = []
    for _ in range(60):
        starts = torch.randint(0, len(ids) - LENGTH, (SEQUENCES,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        max_vio.append(balancer.step().max_vio)
    model.save_pretrained(made.folder)
    tokenizer.save_pretrained(made.folder)
    return sum(max_vio[-10:]) / 10


def train_tokenizer(text: Path) -> Any:
    """Of 512 pieces of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def run_example(name: str, made: Uneven, *arguments: object, workers: int = RANKS) -> str:
    """What an example prints, on the CPU; without being told, accelerate is not distributed there."""
    argv = [*TORCHRUN, str(workers), f"examples/{name}", str(made.folder), str(made.text), *map(str, arguments)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def check_balanced(max_vio: list[float]) -> None:
    """Uneven at first, and at the end less than half as much."""
    assert len(max_vio) == STEPS and max_vio[0] > 1
    assert sum(max_vio[-10:]) / 10 < max_vio[0] / 2, max_vio


def check_steps(printed: str, micro_batches: int = 2, sequences: int = SEQUENCES) -> None:
    """Every step is printed once, with every assignment of every rank, and the experts become even."""
    lines = LINE.findall(printed)
    assert [int(step) for step, *_ in lines] == list(range(1, STEPS + 1)), printed[-3000:]
    wanted = RANKS * micro_batches * sequences * LENGTH * TOP_K
    assert {(int(assignments), int(ranks)) for *_, assignments, ranks in lines} == {(wanted, RANKS)}
    check_balanced([float(max_vio) for _, max_vio, *_ in lines])


def logged(printed: str, key: str) -> list[float]:
    """The values of a key in what the Trainer prints of each step."""
    return [float(value) for value in re.findall(rf"'{key}': '?([\d.]+)'?", printed)]


def trainer_state(folder: Path) -> dict[str, Any]:
    """The state of the balancer in a checkpoint of the Trainer."""
    state = json.loads((folder / "trainer_state.json").read_text())
    found: dict[str, Any] = state["stateful_callbacks"]["BalancerCallback"]["attributes"]["balancer"]
    return found


def test_every_example_is_listed() -> None:
    listed = re.findall(r"\]\(([\w.]+)\)", (ROOT / "examples" / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.slow
def test_the_custom_loop_trains_on_two_workers(tmp_path: Path) -> None:
    changes = ["train.steps=3", f"run.dir={tmp_path}"]
    argv = [*TORCHRUN, "2", "examples/custom_loop.py", "configs/debug.yaml", *changes]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step (\d): MaxVio \d\.\d+, load of each expert \[(.*)\]$", done.stdout, re.M)
    assert [step for step, _ in lines] == ["1", "2", "3"]
    loads = [[int(load) for load in text.split(",")] for _, text in lines]
    assert all(sum(load) == sum(loads[0]) > 0 and len(load) == 12 for load in loads), "top 2 of the same tokens"


@pytest.mark.slow
def test_a_loop_of_pytorch_becomes_balanced(uneven: Uneven) -> None:
    check_steps(run_example("balance_torch.py", uneven))


@pytest.mark.slow
def test_a_model_that_fsdp_has_sharded_becomes_balanced(uneven: Uneven) -> None:
    check_steps(run_example("balance_fsdp2.py", uneven), micro_batches=1, sequences=16)


@pytest.mark.slow
@pytest.mark.full
def test_a_loop_of_accelerate_becomes_balanced(uneven: Uneven) -> None:
    check_steps(run_example("balance_accelerate.py", uneven))


@pytest.mark.slow
@pytest.mark.parametrize("stage", only_first([3, 0, 1, 2]))
def test_a_loop_of_deepspeed_becomes_balanced(uneven: Uneven, tmp_path: Path, stage: int) -> None:
    check_steps(run_example("balance_deepspeed.py", uneven, stage, tmp_path))
    states = list(tmp_path.glob("*/*model_states.pt"))
    assert states
    # The checkpoint is of this test's own run.
    state = torch.load(states[0], weights_only=False)["dist_moe_balancer"]
    assert (state["steps"], state["taken"]) == (STEPS, STEPS)
    assert all(bool(layer["selection_bias"].any()) for layer in state["layers"].values())


@pytest.mark.slow
def test_experts_that_deepspeed_has_distributed_become_balanced(uneven: Uneven, tmp_path: Path) -> None:
    check_steps(run_example("balance_autoep.py", uneven, tmp_path))


@pytest.mark.slow
def test_distributed_experts_become_balanced_and_are_saved_whole(uneven: Uneven, tmp_path: Path) -> None:
    check_steps(run_example("parallelize_torch.py", uneven, tmp_path))
    start, saved = (dist_moe.from_pretrained(folder, expert_parallel=1) for folder in (uneven.folder, tmp_path))
    before = dict(start.named_parameters())
    assert all(not torch.equal(each, before[name]) for name, each in saved.named_parameters())
    biases = [value for name, value in saved.named_buffers() if name.endswith("selection_bias")]
    assert len(biases) == 2 and all(bool(bias_E.any()) for bias_E in biases)


@pytest.mark.slow
def test_threshold_routing_in_the_trainer_becomes_balanced(uneven: Uneven, tmp_path: Path) -> None:
    printed = run_example("route_trainer.py", uneven, tmp_path)
    check_balanced(logged(printed, "max_vio"))
    found = re.search(r"^(\d\.\d+) experts per token, Qwen3MoeForCausalLM, loss (\d\.\d+)$", printed, re.M)
    assert found and 1.6 < float(found[1]) < 2.0 and float(found[2]) < logged(printed, "loss")[0]


@pytest.mark.slow
def test_the_trainer_becomes_balanced_and_resumes(uneven: Uneven, tmp_path: Path) -> None:
    printed = run_example("balance_trainer.py", uneven, tmp_path)
    first = logged(printed, "max_vio")
    check_balanced(first)
    half, end = (trainer_state(tmp_path / f"checkpoint-{step}") for step in (30, 60))
    assert (half["steps"], end["steps"]) == (30, 60)
    wanted = RANKS * 2 * SEQUENCES * LENGTH * TOP_K
    assert {sum(layer["last_load"]) for state in (half, end) for layer in state["layers"].values()} == {wanted}
    assert list((tmp_path / "load").glob("events.*")), "for TensorBoard"

    (tmp_path / "checkpoint-60").rename(tmp_path / "first-60")
    # On one worker: on several, accelerate calls the CPU cpu:0, on which torch.load loads no optimizer.
    printed = run_example("balance_trainer.py", uneven, tmp_path, workers=1)
    second = logged(printed, "max_vio")
    assert len(second) == 30 and sum(second[:5]) / 5 < first[0] / 2, "balanced from the first step on"
    again = trainer_state(tmp_path / "checkpoint-60")
    assert (again["steps"], again["taken"]) == (60, 60)
    assert {sum(layer["last_load"]) for layer in again["layers"].values()} == {wanted // RANKS}
    for name, layer in again["layers"].items():
        moved_E = torch.tensor(layer["selection_bias"]) - torch.tensor(half["layers"][name]["selection_bias"])
        assert 0 < float(moved_E.abs().max()) < 30.5 * 0.05, "30 more steps of the rate"


@pytest.mark.slow
def test_the_trainer_of_trl_becomes_balanced(uneven: Uneven, tmp_path: Path) -> None:
    printed = run_example("balance_trl.py", uneven, tmp_path)
    check_balanced(logged(printed, "max_vio"))
    state = trainer_state(tmp_path / "checkpoint-60")
    history = json.loads((tmp_path / "checkpoint-60" / "trainer_state.json").read_text())["log_history"]
    tokens = [entry["num_tokens"] for entry in history]
    loads = {sum(layer["last_load"]) for layer in state["layers"].values()}
    assert loads == {TOP_K * int(tokens[STEPS - 1] - tokens[STEPS - 2])}, "without the padding"
