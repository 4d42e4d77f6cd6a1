"""The section `model`: the Hugging Face model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from dist_moe.errors import Violation
from dist_moe.families.built_in import BUILT_IN
from dist_moe.families.dense import DENSE
from dist_moe.families.registry import ARCHITECTURES, FAMILIES_TEXT
from dist_moe.section import Section, UserPath, broken_rules
from dist_moe.text import listed, shown
from dist_moe.untrusted import printable

if TYPE_CHECKING:
    Architecture = str
else:
    Architecture = Literal[tuple(ARCHITECTURES)]

AttentionName = Literal["auto", "sdpa"]
CrossEntropyName = Literal["auto", "plain", "chunked", "liger"]
NormName = Literal["auto", "plain"]
KernelsName = Literal["auto", "torch", "triton"]


class ModelConfig(Section):
    """The Hugging Face model."""

    architecture: Architecture = Field(
        description=f"the model's family, Hugging Face's model_type: {FAMILIES_TEXT}; with model.pretrained it "
        f"may be left out, and with model.upcycle_from too, where it is {listed(DENSE)}"
    )
    pretrained: UserPath | None = Field(
        default=None,
        description="the folder of a Hugging Face model of this family, whose weights the run starts from, or null "
        "(random initial weights)",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="the keys of the family's Hugging Face config class; a key left out is that of model.pretrained or "
        "the default of the class, and vocab_size comes from the tokenizer",
    )
    upcycle_from: UserPath | None = Field(
        default=None,
        description=f"the folder of a dense Hugging Face model ({listed(DENSE)}) that the run makes an MoE model of, "
        f"or the name of a built-in one ({listed(BUILT_IN)}), or null; each expert starts as a copy of a layer's "
        "feed-forward network",
    )
    upcycle_experts: int = Field(
        default=8, ge=1, le=1_000_000, description="the experts of each MoE layer, with model.upcycle_from (1 to 1e6)"
    )
    upcycle_every: int = Field(
        default=1,
        ge=1,
        description="the number n where every n-th layer becomes an MoE layer, counted from the last, with "
        "model.upcycle_from (1 or more; 1: all)",
    )
    upcycle_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None,
        description="the layers that become MoE layers in place of those of model.upcycle_every, a list of indices "
        "(the first layer is 0), or null",
    )
    upcycle_noise: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="the standard deviation of the normal noise on each expert's copies, relative to the root mean "
        "square of the copied tensor (0 to 10; 0: exact copies)",
    )
    upcycle_router_std: float = Field(
        default=1.7,
        gt=0,
        le=100,
        description="the standard deviation of the routing logits at the start, with model.upcycle_from (above 0, up "
        "to 100)",
    )
    upcycle_router: Literal["normal", "centered"] = Field(
        default="normal",
        description="the routers at the start, with model.upcycle_from: normal (drawn at random) or centered (drawn, "
        "and made orthogonal to the mean of their inputs over the first global batch, so that they ignore what all "
        "tokens have in common)",
    )
    attention: AttentionName = Field(
        default="auto",
        description="the implementation of attention: sdpa (PyTorch's own), or auto (matrix products for short "
        "sequences in bf16 on a CPU that multiplies bf16, a kernel for packed documents on a GPU in bf16, else sdpa)",
    )
    cross_entropy: CrossEntropyName = Field(
        default="auto",
        description="the implementation of the loss: plain (of the logits of the whole batch), chunked (of some rows "
        "at a time), liger (Liger's kernel on a GPU), or auto (liger on a GPU where it can run, else chunked); "
        "plain in any case where the model scales or caps its logits",
    )
    norm: NormName = Field(
        default="auto",
        description="the implementation of RMSNorm: plain (that of transformers), or auto (one function with a small "
        "backward pass, on a GPU Liger's where it can run; other norms stay as they are)",
    )
    moe_kernels: KernelsName = Field(
        default="auto",
        description="the implementation of what an MoE layer computes on a GPU besides its matmuls: torch (operations "
        "of PyTorch), triton (kernels that are compiled on first use, which needs a C compiler), or auto (triton where "
        "it can run, else torch)",
    )

    @field_validator("config")
    @classmethod
    def _named_keys(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Refuse keys that are not texts in the mappings below it; the type of the field checks its own."""
        if violations := list(_other_keys("model.config", settings)):
            raise broken_rules(violations)
        return settings


def _other_keys(where: str, value: Any) -> Iterator[Violation]:
    if isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _other_keys(f"{where}[{index}]", inner)
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        key = f"{where}.{printable(name if isinstance(name, str) else shown(name))}"
        if not isinstance(name, str):
            yield Violation(key, inner, "has a key that is not a text", "remove it, or quote the key")
        yield from _other_keys(key, inner)
