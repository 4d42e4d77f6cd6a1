"""Everything of a run that a step changes or that a checkpoint is made from."""

from dataclasses import dataclass
from functools import cached_property

from dist_moe.balance.balancer import Balancer
from dist_moe.config import Config
from dist_moe.data.corpus import TokenizedData
from dist_moe.data.stream import Stream
from dist_moe.engine.deepspeed import Engine
from dist_moe.model.task import LanguageModelTask


@dataclass(frozen=True)
class TrainState:
    """The objects of a started run; a checkpoint is written from them and restored into them."""

    config: Config
    engine: Engine
    balancer: Balancer
    task: LanguageModelTask
    data: TokenizedData

    @cached_property
    def stream(self) -> Stream:
        """The infinite stream of training rows."""
        return Stream(self.data.train, self.config.data.sequence_length, self.config.run.seed)
