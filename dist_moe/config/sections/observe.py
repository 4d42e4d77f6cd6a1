"""The fields of logging and evaluation."""

from pydantic import Field

from dist_moe.section import Section


class ObserveConfig(Section):
    """What is shown, and how often."""

    interval: int = Field(default=10, ge=1, description="the optimizer steps between logged steps (1 or more)")
    tensorboard: bool = Field(default=True, description="whether TensorBoard event files are written")
    validation_sequences: int = Field(
        default=256, ge=0, description="the validation sequences of one evaluation, at most (0: all)"
    )
    max_vio_limit: float = Field(
        default=1.0,
        gt=0,
        description="the MaxVio over which a layer counts as imbalanced ((max - mean) / mean of its load)",
    )
    max_vio_patience: int = Field(
        default=5,
        ge=1,
        description="the logged steps in a row over max_vio_limit before a warning (1 or more)",
    )
    replica_check_interval: int = Field(
        default=100,
        ge=0,
        description="the optimizer steps between comparisons of what several ranks hold alike, bit by bit (0: none)",
    )
