"""The fields of the optimization."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from dist_moe.config.deepspeed_keys import deepspeed_violations
from dist_moe.section import Fraction, Section


class TrainConfig(Section):
    """The optimization."""

    steps: int = Field(ge=1, description="the optimizer steps after which this run ends (1 or more)")
    schedule_steps: int | None = Field(
        default=None,
        ge=1,
        description="the optimizer steps that the schedules are stretched over (steps or more), or null (steps)",
    )
    global_batch_size: int = Field(
        ge=1,
        description="the sequences of one optimizer step, all workers together; divides by workers * micro_batch",
    )
    micro_batch_size: int = Field(ge=1, description="the sequences a worker puts through the model at once (1 or more)")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="the number format of the weights in use: fp32, bf16, or auto "
        "(bf16 where the device computes it natively, else fp32)",
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="the optimizer: adamw or sgd")
    learning_rate: float = Field(ge=0, description="the highest learning rate, reached after the warm-up")
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="the optimizer steps over which the learning rate rises from 0 (at most schedule_steps)",
    )
    final_learning_rate_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="the ratio of the last learning rate to the highest (cosine in between; 0 to 1)",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="the weight decay of the optimizer (decoupled with adamw)"
    )
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = Field(
        default=(0.9, 0.95),
        description="the two decay rates of AdamW's moments, a list of two numbers (0 to below 1)",
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="the momentum of sgd (0 to below 1; 0 with adamw)")
    gradient_clipping: float = Field(
        default=1.0,
        ge=0,
        description="the highest global 2-norm of the gradient; a longer one is scaled down (0: off)",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="whether activations are computed again in the backward pass, to save memory",
    )
    skip_limit: int = Field(
        default=10,
        ge=0,
        description="the steps in a row that may be skipped, because a gradient is not finite, before the run stops "
        "with a diagnosis (0: any number)",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="the further keys of DeepSpeed's own configuration that no field here sets",
    )

    @field_validator("deepspeed")
    @classmethod
    def _no_owned_keys(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if violations := deepspeed_violations(settings):
            listed = "; ".join(str(violation) for violation in violations)
            raise PydanticCustomError("owned_keys", "{listed}", {"listed": listed, "violations": violations})
        return settings
