"""A worker of this package: `dist-moe train`, as a launcher starts it, with a gate at the end of each step.

`python -m benchmarks.step.ours train CONFIG OVERRIDES`. Everything between two steps is part of the measured time:
reading, the report, the health checks and the checkpoint schedule.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast
from unittest import mock

from benchmarks.step.gate import Gate, StepFacts


class GatedReport:
    """The report of a run, after which each step passes the gate; everything else is that of the report.

    Args:
        report: The report.
        world_size: The number of workers.
        gate: The gate.
    """

    def __init__(self, report: Any, world_size: int, gate: Gate) -> None:
        self._report = report
        self._world_size = world_size
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._report, name)

    def step(self, step: int, record: Any, *arguments: Any, **options: Any) -> None:
        """Report the step, then pass the gate."""
        self._report.step(step, record, *arguments, **options)

        def facts() -> StepFacts:
            loads = [load.tolist() for load in record.loads]
            return StepFacts(float(record.nll_sum), record.label_tokens / self._world_size, loads, over_ranks=True)

        self._gate.pass_step(facts)


def gated(train: Callable[[Any], None], gate: Gate) -> Callable[[Any], None]:
    """Return the training loop with a gate in the report of its run."""

    def train_gated(run: Any) -> None:
        train(replace(run, report=cast(Any, GatedReport(run.report, run.mesh.world_size, gate))))

    return train_gated


def main() -> None:
    """Run the command line with the gated training loop."""
    gate = Gate()
    from dist_moe.cli.main import main as command_line
    from dist_moe.train import loop

    with mock.patch.object(loop, "train", gated(loop.train, gate)):
        command_line()


if __name__ == "__main__":
    main()
