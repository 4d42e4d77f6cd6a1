"""Everything of a run that a step changes or that a checkpoint is made from."""

from dataclasses import dataclass
from functools import cached_property

from dist_moe.balance.balancer import Balancer
from dist_moe.config import Config
from dist_moe.data.corpus import TokenizedData
from dist_moe.data.labeled.prepare import LabeledData
from dist_moe.data.labeled.stream import ExampleStream, LabeledBatch
from dist_moe.data.stream import Batch, Stream
from dist_moe.engine.deepspeed import Engine
from dist_moe.model.tasks.base import Task

RunData = TokenizedData | LabeledData
RunBatch = Batch | LabeledBatch
RunStream = Stream | ExampleStream


@dataclass(frozen=True)
class TrainState:
    """The objects of a started run; a checkpoint is written from them and restored into them."""

    config: Config
    engine: Engine
    balancer: Balancer
    task: Task
    data: RunData

    @cached_property
    def stream(self) -> RunStream:
        """The infinite stream of training rows."""
        if isinstance(self.data, LabeledData):
            return ExampleStream(self.data.train, self.config.run.seed)
        return Stream(self.data.train, self.config.data.sequence_length, self.config.run.seed)
