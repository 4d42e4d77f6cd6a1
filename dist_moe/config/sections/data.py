"""The fields of the training text and of its tokenizer."""

from typing import Annotated, Literal

from pydantic import Field

from dist_moe.section import OneOrMore, Section, UserPath
from dist_moe.text import listed

BUILT_IN = ("stdlib-code", "shakespeare", "brown")
"""Sources of text."""
LABELED = ("rotten_tomatoes", "bbc_news", "vitaminc", "qnli_like")
"""Sources of labeled examples."""


class DataConfig(Section):
    """The training text and its tokenizer."""

    sources: Annotated[list[UserPath], OneOrMore] = Field(
        default_factory=lambda: ["stdlib-code"],
        min_length=1,
        description="the sources of text, each stdlib-code (the standard library of Python, no download), shakespeare, "
        "brown (American English of 1961, in four domains), or the path or glob of .txt or .jsonl files; one of them "
        f"needs no list; for a classification or a regression each {listed(LABELED)}, the path or glob of .jsonl, .csv "
        "or .tsv files, or the folder of a GLUE task or of a dataset on disk",
    )
    sequence_length: int = Field(ge=2, description="the tokens of a sequence (2 or more)")
    tokenizer: Literal["bytes", "bpe", "pretrained"] = Field(
        default="bytes",
        description="the tokenizer: bytes (256 tokens and the end token), bpe (trained on the training split) or "
        "pretrained (that of model.pretrained, or of model.upcycle_from)",
    )
    vocabulary: int = Field(
        default=8192,
        ge=257,
        le=4_000_000,
        description="the size of the bpe vocabulary in tokens, including the end token (257 to 4,000,000)",
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="the fraction of the documents that is held out for validation, or of blocks of text where whole "
        "documents would leave a split empty (between 0 and 1)",
    )
