"""The cost of `dist_moe.balance` in a step of other frameworks: steps with and without it, in alternation in one run.

Usage: torchrun --nproc-per-node 2 -m benchmarks.overhead {ddp,autoep,trainer} [--rounds N]

In each round the same model makes some steps without the balancer and some with it, and the order changes from round to
round. The time of a turn is the median of its steps without the first two; the result is the ratio of a round's turns.
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import dist_moe
from benchmarks.statistics import spread

SEQUENCES, LENGTH, VOCABULARY, STEPS, WARM = 4, 256, 2048, 8, 2
Turn = Callable[[bool], list[float]]
"""Makes STEPS steps, with the balancer or without, and returns the seconds of each."""


def main() -> None:
    """Measure one framework, and print the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("framework", choices=["ddp", "autoep", "trainer"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        deepspeed.ops.__compatible_ops__.clear()  # or it compiles collectives of its own for CPUs
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    turn = {"ddp": ddp, "autoep": autoep, "trainer": trainer}[arguments.framework]()
    turn(True)
    times: dict[bool, list[float]] = {False: [], True: []}
    for index in range(arguments.rounds):
        for balanced in (False, True) if index % 2 else (True, False):
            dist.barrier()
            times[balanced].append(median(turn(balanced)[WARM:]))
    if dist.get_rank() == 0:
        found = spread([slow / fast for slow, fast in zip(times[True], times[False], strict=True)])
        print(
            f"{arguments.framework}: {1000 * median(times[False]):.1f} ms a step; with dist_moe.balance x "
            f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f}, quartiles of {arguments.rounds} rounds)"
        )


def make_model(**changes: Any) -> nn.Module:
    """A Qwen3-MoE of 10 million parameters."""
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm", **changes)
    return model.train()


def batch_of(step: int) -> Tensor:
    """Random tokens of this rank."""
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + step)
    return torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


def ddp() -> Turn:
    """A plain loop with DDP and AdamW."""
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(index: int) -> None:
        batch = batch_of(index)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda balanced: _timed(model, optimizer, balanced, step)


def autoep() -> Turn:
    """DeepSpeed's AutoEP at ZeRO 1 over all ranks."""
    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "zero_optimization": {"stage": 1},
        "expert_parallel": {"enabled": True, "autoep_size": dist.get_world_size(), "preset_model": "qwen3_moe"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    model = make_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)

    def step(index: int) -> None:
        batch = batch_of(index)
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()

    return lambda balanced: _timed(engine, engine, balanced, step)


def _timed(model: nn.Module, stepper: Any, balanced: bool, step: Callable[[int], None]) -> list[float]:
    balancer = dist_moe.balance(model) if balanced else None
    if balancer is not None:
        balancer.attach(stepper)
    seconds = []
    for index in range(STEPS):
        began_s = time.perf_counter()
        step(index)
        seconds.append(time.perf_counter() - began_s)
    if balancer is not None:
        balancer.remove()
    return seconds


def trainer() -> Turn:
    """transformers' Trainer, from the beginning of a step to that of the next one."""
    model = make_model()
    data = [{"input_ids": row, "labels": row} for index in range(STEPS + 1) for row in batch_of(index)]

    def turn(balanced: bool) -> list[float]:
        clock = Clock()
        arguments = TrainingArguments(
            output_dir="unused", max_steps=STEPS + 1, per_device_train_batch_size=SEQUENCES, learning_rate=1e-4,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        balancer = dist_moe.balance(model) if balanced else None
        callbacks: list[TrainerCallback] = [clock] if balancer is None else [balancer.callback(), clock]
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
        if balancer is not None:
            balancer.remove()
        return [end - start for start, end in zip(clock.begins_s, clock.begins_s[1:], strict=False)]

    return turn


class Clock(TrainerCallback):
    """Reads the clock at the beginning of each step.

    Attributes:
        begins_s: Of the steps.
    """

    def __init__(self) -> None:
        self.begins_s: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Read it."""
        self.begins_s.append(time.perf_counter())


if __name__ == "__main__":
    main()
