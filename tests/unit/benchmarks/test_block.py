"""Tests of the order in which the programs of an MoE block run."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.block import __main__ as block_command
from benchmarks.block.blocks import Block
from benchmarks.cases import BlockCase

PROGRAMS = ("ours", "autoep", "hf")


class Recorded(nn.Module):
    """A module that notes each of its forwards."""

    def __init__(self, name: str, seen: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))
        self._name, self._seen = name, seen

    def forward(self, hidden_1TD: Tensor) -> Tensor:
        self._seen.append(self._name)
        return hidden_1TD * self.weight[0]


def test_programs_rotate_and_the_limit_is_timed_after_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def prepare(case: BlockCase, name: str, dtype: torch.dtype) -> Block:
        module = Recorded(name, seen)
        return Block(module, module.weight)

    class Limit:
        def __init__(self, case: BlockCase, load_E: Tensor, dtype: torch.dtype) -> None:
            assert int(load_E.sum()) == case.tokens * case.top_k

        def __call__(self) -> None:
            seen.append("limit")

    def timed(operation: Callable[[], None]) -> float:
        seen.append("timed")
        operation()
        return 1.0

    for name, replacement in (("prepare", prepare), ("Limit", Limit), ("timed", timed)):
        monkeypatch.setattr(block_command, name, replacement)
    case = BlockCase(name="tiny", programs=PROGRAMS, hidden=8, experts=4, top_k=2, tokens=16, precision="fp32")
    rows = block_command.measure(case, rounds=2)
    assert [(row.name, len(row.seconds)) for row in rows] == [(name, 2) for name in (*PROGRAMS, "limit")]
    text = " ".join(seen)
    # Without its untimed run, the limit runs as often as each other program.
    assert text.count("limit timed limit") == block_command.WARMUP_ROUNDS + 2
    order = text.replace("limit timed limit", "timed limit").replace("timed ", "").split()
    names = [*PROGRAMS, "limit"]
    starts = [(number - block_command.WARMUP_ROUNDS) % 4 for number in range(4)]
    assert order == [name for start in starts for name in names[start:] + names[:start]]
