"""The fields of logging, evaluation and monitoring."""

from pydantic import Field

from dist_moe.section import Section


class ObserveConfig(Section):
    """Logging, evaluation and monitoring."""

    interval: int = Field(default=10, ge=1, description="the optimizer steps between logged steps (1 or more)")
    tensorboard: bool = Field(default=True, description="whether TensorBoard event files are written")
    picture_interval: int = Field(
        default=100,
        ge=0,
        description="the optimizer steps between pictures and distributions in TensorBoard (0: in the last step alone)",
    )
    trace_interval: int = Field(
        default=0,
        ge=0,
        description="the optimizer steps between steps whose routing is recorded in run.dir/trace (0: none)",
    )
    trace_tokens: int = Field(
        default=8,
        ge=0,
        description="the tokens of each sequence whose experts and gate weights are recorded with trace_interval (0: "
        "loads alone)",
    )
    validation_sequences: int = Field(
        default=256, ge=0, description="the most validation sequences of one evaluation (0: all)"
    )
    max_vio_limit: float = Field(
        default=1.0,
        gt=0,
        description="the MaxVio above which a layer counts as imbalanced: (max - mean) / mean of its load (above 0)",
    )
    max_vio_patience: int = Field(
        default=5,
        ge=1,
        description="the consecutive logged steps above max_vio_limit, or without a token for an expert, before a "
        "warning (1 or more); the first 100 steps and those of the warm-up do not count",
    )
    replica_check_interval: int = Field(
        default=100,
        ge=0,
        description="the optimizer steps between bitwise comparisons of replicated state across ranks (0: none)",
    )
