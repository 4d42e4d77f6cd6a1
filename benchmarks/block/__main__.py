"""Measures one case of the MoE block in this process: `python -m benchmarks.block CASE ROUNDS OUT` (JSON)."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.block.blocks import BLOCKS, Block, Limit, expert_loads, skew, tokens
from benchmarks.cases import BlockCase
from benchmarks.row import LIMIT, Row

WARMUP_ROUNDS = 2


def main(argv: list[str]) -> None:
    """Measure the case in the file argv[0], and write the rows into the file argv[2]."""
    case = BlockCase(**json.loads(Path(argv[0]).read_text()))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(case, int(argv[1]))
    Path(argv[2]).write_text(json.dumps([asdict(row) for row in rows]))


def measure(case: BlockCase, rounds: int) -> list[Row]:
    """Run each implementation once in every round, on the same new tokens -> a row for each, and that of the limit.

    The order moves on by one in each round.
    """
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    rows = [Row(name) for name in (*case.programs, LIMIT)]
    blocks: list[tuple[Row, Block]] = []
    for row in rows[:-1]:
        try:
            blocks.append((row, prepare(case, row.name, dtype)))
        except Exception as error:  # of a peer: it becomes its row
            row.reason = f"{type(error).__name__}: {error}"
    limit = Limit(case, expert_loads(case, blocks[0][1].router_weight_ED, tokens(case, seed=0)), dtype)
    for number in range(-WARMUP_ROUNDS, rounds):
        hidden_TD = tokens(case, seed=number + WARMUP_ROUNDS).to(dtype)
        gradient_TD = torch.randn_like(hidden_TD)
        passes = [(row, pass_of(block, hidden_TD, gradient_TD)) for row, block in blocks]
        turns: list[tuple[Row, Callable[[], None]]] = [*passes, (rows[-1], limit)]
        offset = number % len(turns)
        for row, operation in turns[offset:] + turns[:offset]:
            if operation is limit:
                # All programs share oneDNN's cache of 1,024 kernels for bf16. Those that do not pad the rows of an
                # expert need new kernels in every round, which push out the limit's. To compile them again within the
                # timed run would make the limit slow, and the fractions of its speed too high.
                limit()
            seconds = timed(operation)
            if number >= 0:
                row.seconds.append(seconds)
    return rows


def prepare(case: BlockCase, name: str, dtype: torch.dtype) -> Block:
    """Return an implementation in the precision of the case, with the skew of its load."""
    block = BLOCKS[name](case)
    if case.zipf_exponent:
        skew(block, case.zipf_exponent)
    block.module.to(dtype).train()
    return block


def pass_of(block: Block, hidden_TD: torch.Tensor, gradient_TD: torch.Tensor) -> Callable[[], None]:
    """Return a forward and backward of a block; each gradient is new, as after a step."""

    def run() -> None:
        hidden_1TD = hidden_TD.unsqueeze(0).requires_grad_()
        output = block.module(hidden_1TD)
        mixed_1TD = output[0] if isinstance(output, tuple) else output
        mixed_1TD.backward(gradient_TD.unsqueeze(0))
        for parameter in block.module.parameters():
            parameter.grad = None

    return run


def timed(operation: Callable[[], None]) -> float:
    """Return the seconds of an operation."""
    began_s = time.perf_counter()
    operation()
    return round(time.perf_counter() - began_s, 6)


if __name__ == "__main__":
    main(sys.argv[1:])
