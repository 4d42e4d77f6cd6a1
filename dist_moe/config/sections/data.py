"""The fields of the text and of its tokenizer."""

from typing import Annotated, Literal

from pydantic import Field

from dist_moe.section import Section


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
