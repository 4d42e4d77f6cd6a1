"""Everything of a run that a step changes or that a checkpoint is made from."""

from dataclasses import dataclass
from functools import cached_property

from dist_moe.balancing.balancer import Balancer
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
        return training_stream(self.config, self.data)


def training_stream(config: Config, data: RunData) -> RunStream:
    """Return the infinite stream of training rows of a run."""
    if isinstance(data, LabeledData):
        return ExampleStream(data.train, config.run.seed)
    return Stream(data.train, config.data.sequence_length, config.run.seed)
