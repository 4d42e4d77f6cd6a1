"""Every field a run can set, with its type, range, unit and default.

A description is worded to follow "give": errors end with it, and the files in `configs/` say the same.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from dist_moe.config.sections.cluster import ClusterConfig
from dist_moe.config.deepspeed_keys import deepspeed_violations
from dist_moe.config.family import Architecture
from dist_moe.config.sections.router import BalanceConfig, RouterConfig
from dist_moe.config.sections.scheduler import KubernetesConfig, SlurmConfig
from dist_moe.config.base import Section

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class RunConfig(Section):
    """The run as a whole."""

    dir: str = Field(
        default="runs/default",
        min_length=1,
        description="the folder for everything the run writes; made if it is not there",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="the seed of the initial weights and of the data order (0 or more)",
    )
    threads: Annotated[int, Field(ge=1)] | Auto = Field(
        default="auto",
        description="the CPU threads of each worker inside one operation (1 or more), or auto: the "
        "host's cores divided by its workers",
    )


class ModelConfig(Section):
    """The Hugging Face model."""

    architecture: Architecture = Field(
        description="the model's family, Hugging Face's model_type: deepseek_v3 or qwen3_moe"
    )
    pretrained: str | None = Field(
        default=None,
        min_length=1,
        description="the folder of a Hugging Face model of this family, with whose weights the run begins, or null "
        "(the weights begin at random)",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="the keys of the family's Hugging Face config class; a key left out is as in model.pretrained, or "
        "else keeps the default of that class, and vocab_size comes from the tokenizer",
    )


class ParallelConfig(Section):
    """How the work is divided among the workers."""

    expert_parallel: Annotated[int, Field(ge=1)] | Auto = Field(
        default="auto",
        description="the number of workers that share one set of experts; it divides the workers and the "
        "experts (auto: the largest number that does)",
    )
    exchange: Literal["auto", "flat", "hierarchical"] = Field(
        default="auto",
        description="the way of tokens to their experts: flat (one all-to-all), hierarchical (first to each host, once "
        "for all experts there, then within it), or auto (hierarchical between hosts with as many workers each)",
    )
    zero_stage: Literal[0, 1, 2] = Field(
        default=1,
        description="the ZeRO stage of DeepSpeed: 0 nothing is sharded, 1 optimizer states, 2 gradients too",
    )
    backend: Literal["auto", "nccl", "gloo", "mpi"] = Field(
        default="auto",
        description="the library of the collectives: nccl (GPU), gloo (CPU), mpi (CPU, under mpirun), or auto (nccl "
        "where each worker has a GPU of its own, else mpi where mpirun started them, else gloo)",
    )
    timeout_s: float = Field(default=600, gt=0, description="the time limit of each collective, in seconds")

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _stage_is_no_boolean(cls, stage: Any) -> Any:
        if isinstance(stage, bool):
            raise PydanticCustomError("literal_error", "Input should be 0, 1 or 2")
        return stage


class DataConfig(Section):
    """The text and how it becomes tokens."""

    sources: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=lambda: ["stdlib-code"],
        min_length=1,
        description="the sources of text, each stdlib-code (the Python files of the running interpreter, "
        "no download), shakespeare, or the path or glob of .txt or .jsonl files",
    )
    sequence_length: int = Field(ge=2, description="the tokens of one sequence (2 or more)")
    tokenizer: Literal["bytes", "bpe", "pretrained"] = Field(
        default="bytes",
        description="the tokenizer: bytes (256 tokens and the end token), bpe (trained on the training text) or "
        "pretrained (that of model.pretrained)",
    )
    vocabulary: int = Field(
        default=8192,
        ge=257,
        description="the tokens of a bpe vocabulary, the end token among them (257 or more)",
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="the share of the documents kept for validation (between 0 and 1)",
    )


class TrainConfig(Section):
    """The optimization."""

    steps: int = Field(ge=1, description="the optimizer steps after which this run ends (1 or more)")
    schedule_steps: int | None = Field(
        default=None,
        ge=1,
        description="the optimizer steps that the schedules are stretched over (steps or more), or null (steps)",
    )
    global_batch: int = Field(
        ge=1,
        description="the sequences of one optimizer step, all workers together; divides by workers * micro_batch",
    )
    micro_batch: int = Field(ge=1, description="the sequences a worker puts through the model at once (1 or more)")
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


class CheckpointConfig(Section):
    """When the run is saved, and from where it goes on."""

    every: int = Field(default=0, ge=0, description="the optimizer steps between checkpoints (0: one at the end only)")
    resume: str = Field(
        default="auto",
        min_length=1,
        description="the checkpoint to go on from: auto (the newest good one in run.dir, if there is one), never, or "
        "the path of a step-NNNNNN folder",
    )
    asynchronous: bool = Field(
        default=True,
        description="whether training goes on while the files of a checkpoint are written, from a copy in memory",
    )
    keep_last: int = Field(default=0, ge=0, description="the newest checkpoints that are kept (0: all)")
    keep_every: int = Field(
        default=0, ge=0, description="the steps whose multiples are kept beside the newest (0: none; with keep_last)"
    )


class ObserveConfig(Section):
    """What is shown, and how often."""

    every: int = Field(default=10, ge=1, description="the optimizer steps between logged steps (1 or more)")
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
    check_ranks_every: int = Field(
        default=100,
        ge=0,
        description="the optimizer steps between comparisons of what several ranks hold alike, bit by bit (0: none)",
    )


class Config(Section):
    """A whole run, as written in one YAML file."""

    run: RunConfig = Field(default_factory=RunConfig, description="the run as a whole")
    model: ModelConfig = Field(description="the Hugging Face model")
    router: RouterConfig = Field(
        default_factory=RouterConfig,
        description="how a token finds its experts; null means what the Hugging Face config says",
    )
    balance: BalanceConfig = Field(
        default_factory=BalanceConfig, description="how the load of the experts is kept even"
    )
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="how the work is divided among the workers"
    )
    data: DataConfig = Field(description="the text and how it becomes tokens")
    train: TrainConfig = Field(description="the optimization")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="when the run is saved, and from where it goes on"
    )
    observe: ObserveConfig = Field(default_factory=ObserveConfig, description="what is shown, and how often")
    cluster: ClusterConfig = Field(
        default_factory=ClusterConfig, description="the hosts; without any the run stays on one"
    )
    slurm: SlurmConfig = Field(default_factory=SlurmConfig, description="the job that Slurm is asked for")
    kubernetes: KubernetesConfig = Field(
        default_factory=KubernetesConfig, description="the job that Kubernetes is asked for"
    )
