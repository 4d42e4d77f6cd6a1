"""The section `task`: what the model is trained to do."""

from typing import Annotated, Literal

from pydantic import Field

from dist_moe.section import Section

TaskKind = Literal["language_model", "classification", "regression"]
PoolingName = Literal["mean", "first", "last"]


class TaskConfig(Section):
    """What the model is trained to do."""

    kind: TaskKind = Field(
        default="language_model",
        description="the task: language_model (the next token of a text), classification (one of several classes of a "
        "text or a pair of texts) or regression (a number for it)",
    )
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] | None = Field(
        default=None,
        description="the names of the classes, in the order of their indices, or null (those of the examples, sorted)",
    )
    pooling: PoolingName | None = Field(
        default=None,
        description="the hidden states that the class or value of a text is computed from: mean (of all tokens), "
        "first, last, or null (mean)",
    )
    class_weights: Literal["balanced"] | list[Annotated[float, Field(gt=0, le=1e6)]] | None = Field(
        default=None,
        description="the weight of each class in the training loss, a list in the order of task.labels, balanced "
        "(inverse to its share of the training examples, 1 on average), or null (1)",
    )
