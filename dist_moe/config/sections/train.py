"""The fields of the optimizer, the batch size and the schedule of the learning rate."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator

from dist_moe.config.deepspeed_keys.check import allowed_settings, deepspeed_violations
from dist_moe.errors import ConfigError, Violation
from dist_moe.section import Auto, Fraction, Section, broken_rules
from dist_moe.text import divisors

# A micro-batch that `auto` chooses has at most as many.
AUTO_SEQUENCES = 16
AUTO_TOKENS = 16_384


class TrainConfig(Section):
    """The optimizer, the batch size and the schedule of the learning rate."""

    steps: int = Field(ge=1, description="the optimizer steps of the run (1 or more)")
    schedule_steps: int | None = Field(
        default=None,
        ge=1,
        description="the optimizer steps that the schedules span (steps or more), or null (steps)",
    )
    global_batch_size: int = Field(
        ge=1,
        le=1_000_000_000_000,
        description="the sequences of one optimizer step over all workers, a multiple of workers * micro_batch_size "
        "(1 to 1e12)",
    )
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        default="auto",
        description="the sequences of one forward pass on a worker (1 or more), or auto (the largest divisor of "
        f"global_batch_size / workers up to {AUTO_SEQUENCES} sequences and {AUTO_TOKENS:,} tokens)",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="the data type of weights and activations: fp32, bf16 (with fp32 master weights), or auto (bf16 "
        "where the device supports it natively, else fp32)",
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="the optimizer: adamw or sgd")
    learning_rate: float = Field(ge=0, le=1e30, description="the peak learning rate, reached after warmup (0 to 1e30)")
    warmup_steps: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0,
        description="the optimizer steps of linear warmup from 0, or, below 1, their fraction of schedule_steps; a "
        "longer warmup ends with the schedule",
    )
    final_learning_rate_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="the ratio of the last to the peak learning rate, with a cosine in between (0 to 1)",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, le=1e6, description="the weight decay, decoupled with adamw (0 to 1e6)"
    )
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = Field(
        default=(0.9, 0.95),
        description="the decay rates of the two moments of adamw, a list of two numbers (0 to below 1)",
    )
    momentum: float = Field(
        default=0.0, ge=0, lt=1, description="the momentum of sgd (0 to below 1; must be 0 with adamw)"
    )
    gradient_clipping: float = Field(
        default=1.0,
        ge=0,
        le=1e30,
        description="the maximum global 2-norm of the gradient, to which a larger one is scaled down (0 to 1e30; 0: "
        "off)",
    )
    frozen_layers: int = Field(
        default=0,
        ge=0,
        description="the number of first layers that are not trained, nor are the embeddings (0: all of the model is "
        "trained)",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="whether to recompute activations in the backward pass, to save memory",
    )
    skip_limit: int = Field(
        default=10,
        ge=0,
        description="the consecutive steps that may be skipped because of a non-finite gradient before the run aborts "
        "with a diagnosis (0: no limit)",
    )
    deepspeed: Annotated[dict[str, Any], WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]})] = Field(
        default_factory=dict,
        description="the keys to add to the configuration of DeepSpeed, or the path of its JSON file; "
        "docs/deepspeed.md has the keys that may be set, and why others are refused",
    )

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _named_keys(cls, settings: Any) -> Any:
        """Take null, as of a mapping whose keys are all commented out, for an empty one, and keys as texts."""
        if settings is None:
            return {}
        return {str(key): value for key, value in settings.items()} if isinstance(settings, dict) else settings

    @field_validator("deepspeed")
    @classmethod
    def _only_allowed_keys(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if violations := deepspeed_violations(settings):
            raise broken_rules(violations)
        return allowed_settings(settings)

    @property
    def schedule_length(self) -> int:
        """The optimizer steps that the schedules span."""
        return self.schedule_steps or self.steps

    @property
    def warmup_length(self) -> int:
        """The optimizer steps of warmup: `warmup_steps`, or that fraction of the schedule, and at most all of it."""
        steps = self.warmup_steps
        if isinstance(steps, float):
            steps = round(steps * self.schedule_length)
        return min(steps, self.schedule_length)

    @property
    def sequences_per_forward(self) -> int:
        """`micro_batch_size` as a number.

        Raises:
            ConfigError: It is auto, which `dist_moe.config.resolve` replaces for a number of workers.
        """
        if isinstance(self.micro_batch_size, int):
            return self.micro_batch_size
        rule, remedy = "depends on the number of workers, which is not known here", "give a number"
        raise ConfigError([Violation("train.micro_batch_size", self.micro_batch_size, rule, remedy)])

    def micro_batch_for(self, workers: int, sequence_length: int) -> int:
        """Return `micro_batch_size`, or what auto is for a number of workers that divides the global batch."""
        if isinstance(self.micro_batch_size, int):
            return self.micro_batch_size
        bound = max(1, min(AUTO_SEQUENCES, AUTO_TOKENS // sequence_length))
        return max(count for count in divisors(max(1, self.global_batch_size // workers)) if count <= bound)
