"""Every field a run can set, with its type, range, unit and default.

A description is worded to follow "give": errors end with it, and the files in `configs/` say the same.
"""

from pydantic import Field

from dist_moe.config.sections.balance import BalanceConfig
from dist_moe.config.sections.checkpoint import CheckpointConfig
from dist_moe.config.sections.cluster import ClusterConfig
from dist_moe.config.sections.data import DataConfig
from dist_moe.config.sections.kubernetes import KubernetesConfig
from dist_moe.config.sections.model import ModelConfig
from dist_moe.config.sections.observe import ObserveConfig
from dist_moe.config.sections.parallel import ParallelConfig
from dist_moe.config.sections.router import RouterConfig
from dist_moe.config.sections.run import RunConfig
from dist_moe.config.sections.slurm import SlurmConfig
from dist_moe.config.sections.train import TrainConfig
from dist_moe.policies.registry import DEFAULT
from dist_moe.section import Section


class Config(Section):
    """A whole run, as written in one YAML file."""

    run: RunConfig = Field(default_factory=RunConfig, description="the run as a whole")
    model: ModelConfig = Field(description="the Hugging Face model")
    router: RouterConfig = Field(
        default_factory=RouterConfig,
        description="how a token finds its experts; null means what the Hugging Face config says",
    )
    balance: BalanceConfig = Field(default_factory=DEFAULT, description="how the load of the experts is kept even")
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
