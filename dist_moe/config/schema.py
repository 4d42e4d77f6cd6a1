"""The configuration of a run: every field that can be set, with its type, range, unit, default and description.

A description is worded to follow "give", since errors end with it. The configuration reference prints it, too.
"""

from pydantic import Field

from dist_moe.config.sections.balance import BalanceConfig
from dist_moe.config.sections.checkpoint import CheckpointConfig
from dist_moe.config.sections.cluster import ClusterConfig
from dist_moe.config.sections.data import DataConfig
from dist_moe.config.sections.jobs.kubernetes import KubernetesConfig
from dist_moe.config.sections.jobs.slurm import SlurmConfig
from dist_moe.config.sections.model import ModelConfig
from dist_moe.config.sections.observe import ObserveConfig
from dist_moe.config.sections.parallel import ParallelConfig
from dist_moe.config.sections.router import RouterConfig
from dist_moe.config.sections.run import RunConfig
from dist_moe.config.sections.task import TaskConfig
from dist_moe.config.sections.train import TrainConfig
from dist_moe.policies.registry import DEFAULT
from dist_moe.section import Section


class Config(Section):
    """The whole configuration of a run, as written in one YAML file."""

    run: RunConfig = Field(default_factory=RunConfig, description="the run as a whole")
    task: TaskConfig = Field(default_factory=TaskConfig, description="what the model is trained to do")
    model: ModelConfig = Field(description="the Hugging Face model")
    router: RouterConfig = Field(
        default_factory=RouterConfig,
        description="how tokens are routed to experts; null takes the value of the Hugging Face config",
    )
    balance: BalanceConfig = Field(default_factory=DEFAULT, description="how the load of the experts is balanced")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="how the work is distributed over the workers"
    )
    data: DataConfig = Field(description="the training text and its tokenizer")
    train: TrainConfig = Field(description="the optimizer, the batch size and the schedule of the learning rate")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="when checkpoints are saved, and from which one the run resumes"
    )
    observe: ObserveConfig = Field(default_factory=ObserveConfig, description="logging, evaluation and monitoring")
    cluster: ClusterConfig = Field(
        default_factory=ClusterConfig, description="the hosts; with none, the run uses this host alone"
    )
    slurm: SlurmConfig = Field(default_factory=SlurmConfig, description="the job that is submitted to Slurm")
    kubernetes: KubernetesConfig = Field(
        default_factory=KubernetesConfig, description="the job that is submitted to Kubernetes"
    )
