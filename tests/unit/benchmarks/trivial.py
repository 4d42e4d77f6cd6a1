"""A worker of the benchmark without a model: step N of rank R has the loss N + R and sends N bytes."""

import itertools
import os
import sys

from benchmarks.step.gate import Gate, StepFacts


def main() -> None:
    """Make steps; rank 1 ends before the step that argv[1] names."""
    gate = Gate()
    assert len(os.sched_getaffinity(0)) == 1
    for number in itertools.count():
        if gate.rank == 1 and number == int(sys.argv[1]):
            sys.exit("rank 1 has an error")
        facts = StepFacts(float(number + gate.rank), 1.0, [[1, 2 * gate.rank]])
        gate.pass_step(lambda facts=facts: facts)  # type: ignore[misc]


if __name__ == "__main__":
    main()
