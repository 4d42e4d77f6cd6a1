"""What is known of one program in one case, as bench.json holds it."""

from dataclasses import dataclass, field

LIMIT = "limit"
"""The name of the row of the bare grouped matmuls."""


@dataclass
class Row:
    """One program in one case.

    Attributes:
        name: Of the program.
        reason: Why it was not measured; "" where it was.
        seconds: Wall time of a step (the mean over a turn) or of a block, for each round.
        peak_mib: Peak of the resident memory of rank 0, in MiB.
        loss: Mean of -ln p over the label tokens of the last timed step, in nats.
        max_vio: MaxVio of the global batch of that step, mean over the MoE layers; None where it is not known.
        max_vio_floor: What chance alone would give, with as many assignments.
        experts_per_token: Mean number of experts of a token in that step; None where it is not known.
        start_s: Seconds from the start of the processes to the end of the first step.
        bytes: Collective -> bytes that rank 0 gave to it in one step; empty where they were not counted.
    """

    name: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    loss: float | None = None
    max_vio: float | None = None
    max_vio_floor: float | None = None
    experts_per_token: float | None = None
    start_s: float | None = None
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether there is a time."""
        return not self.reason and bool(self.seconds)
