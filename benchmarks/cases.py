"""The cases of the benchmark as data: models, sizes, and which programs run each of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.row import LIMIT

Precision = Literal["fp32", "bf16"]
Allocator = Literal["kept", "default"]
OURS = ("ours-gloo", "ours-mpi")
AUTOEP = ("autoep", "autoep-tuned")
PEERS = {"": (*AUTOEP, "autoep-mpi"), "-hf": ("hf-tuned", "hf-native"), "-classic": ("hf", "classic")}
"""Part of the name of a case -> its peers: all programs of a case are live at once, and memory has room for four."""
PACKAGE = "ours"
"""What the names of the programs that run this package begin with."""

COARSE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
FINE = COARSE | {"num_experts": 64, "moe_intermediate_size": 64, "num_experts_per_tok": 8}
DEEPSEEK: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
    "num_mtp_layers": 0,
}


@dataclass(frozen=True)
class Entry:
    """One program in a case.

    Attributes:
        program: A name of `benchmarks.step.programs.PROGRAMS`.
        overrides: Values of this package's configuration that replace those of the case; for its own programs only.
        label: The name in tables, unique in the case; "" for the name of the program.
    """

    program: str
    overrides: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """The name in tables and results."""
        return self.label or self.program


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A full training step.

    Attributes:
        name: Unique among all cases.
        entries: The programs that are measured in one run.
        architecture: Hugging Face's `model_type`.
        model: Keyword arguments of its config class.
        precision: Of weights and activations.
        workers: Processes, each with one thread and one core.
        expert_parallel: Workers that share one set of experts.
        sequences: Sequences of one step on one worker.
        length: Tokens of a sequence.
        warmup_steps: Steps before the first one that is timed.
        overrides: Values of this package's configuration, for each of its entries.
        sources: `data.sources` of the text.
        tokenizer: `data.tokenizer`.
        vocabulary: `data.vocabulary`.
    """

    name: str
    entries: tuple[Entry, ...]
    architecture: str = "qwen3_moe"
    model: Mapping[str, Any]
    precision: Precision
    workers: int = 2
    expert_parallel: int = 2
    sequences: int = 8
    length: int = 256
    warmup_steps: int = 3
    overrides: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("stdlib-code",)
    tokenizer: str = "bpe"
    vocabulary: int = 4096

    @property
    def tokens(self) -> int:
        """Tokens of one step over all workers."""
        return self.workers * self.sequences * self.length


@dataclass(frozen=True, kw_only=True)
class BlockCase:
    """Forward and backward of one MoE block (router and experts) in one process.

    Attributes:
        name: Unique among all cases.
        programs: Names of `benchmarks.block.blocks.BLOCKS`.
        hidden, width, experts, top_k: The sizes: of a token, of an expert, and the numbers of experts.
        tokens: Tokens of a forward.
        precision: Of weights and activations.
        zipf_exponent: Skew of the load, by a constant in the logits of expert e of -zipf_exponent * ln(e + 1).
        allocator: "kept": freed memory stays with the process, as a worker of this package sets it; or glibc's default.
    """

    name: str
    programs: tuple[str, ...] = ("ours", "autoep", "hf", "loop", "classic")
    hidden: int = 256
    width: int = 256
    experts: int = 16
    top_k: int = 4
    tokens: int = 2048
    precision: Precision
    zipf_exponent: float = 0.0
    allocator: Allocator = "kept"


@dataclass(frozen=True, kw_only=True)
class StartCase:
    """The time from a launch to the first line of metrics, of a tiny model.

    Attributes:
        name: Unique among all cases.
        launchers: Names of launchers; "none" is a single worker without one.
        workers: Workers of a launch.
        precision: As of the other cases; here without effect.
    """

    name: str
    launchers: tuple[str, ...] = ("deepspeed", "torchrun", "mpirun", "none")
    workers: int = 2
    precision: Precision = "fp32"


Case = StepCase | BlockCase | StartCase


def row_names(case: Case) -> list[str]:
    """Return the names of the rows that a case measures."""
    if isinstance(case, StepCase):
        return [entry.name for entry in case.entries]
    if isinstance(case, BlockCase):
        return [*case.programs, LIMIT]
    return [LIMIT, *(f"{PACKAGE}-{name}" for name in case.launchers)]


def entries(*programs: str) -> tuple[Entry, ...]:
    """Return entries without overrides."""
    return tuple(map(Entry, programs))


def variants(program: str, labels: Mapping[str, tuple[str, ...]]) -> tuple[Entry, ...]:
    """Return entries of one program that differ in their overrides: label -> overrides."""
    return tuple(Entry(program, overrides, f"{program} {label}") for label, overrides in labels.items())


def deep(layers: int) -> dict[str, Any]:
    """Return the coarse model with another number of layers."""
    return COARSE | {"num_hidden_layers": layers}


def step_cases(precision: Precision) -> list[StepCase]:
    """Return the cases of the full step in one precision."""
    few = entries(*OURS, *AUTOEP)
    coarse = StepCase(name=f"coarse-{precision}", entries=few, model=COARSE, precision=precision)
    models = {
        "coarse": coarse,
        "fine": replace(coarse, model=FINE),
        "deepseek": replace(coarse, architecture="deepseek_v3", model=DEEPSEEK),
    }
    single = replace(coarse, workers=1, expert_parallel=1)
    top2 = COARSE | {"num_experts_per_tok": 2}
    threshold = (
        "router.selection=threshold",
        "router.threshold=0.15",
        "router.max_experts=8",
        "router.target_experts_per_token=2.0",
        "balance.policy=none",
    )
    routing = {
        "natural": ("balance.policy=none",),
        "uniform": ("router.selection=uniform", "balance.policy=none"),
        "zipf": ("router.selection=zipf", "router.zipf_exponent=1.0", "balance.policy=none"),
    }
    return [
        *(
            replace(case, name=f"{name}{group}-{precision}", entries=entries(*OURS, *peers))
            for name, case in models.items()
            for group, peers in PEERS.items()
        ),
        replace(coarse, name=f"ep1-{precision}", expert_parallel=1, entries=entries(*OURS, *AUTOEP[1:], "hf-tuned")),
        replace(single, name=f"one-worker-{precision}", entries=entries("ours-gloo", *AUTOEP, "hf-tuned")),
        replace(
            coarse,
            name=f"threshold-{precision}",
            model=top2,
            warmup_steps=20,
            entries=variants("ours-mpi", {"top-2": ("balance.policy=none",), "threshold": threshold}),
        ),
        replace(coarse, name=f"routing-{precision}", entries=variants("ours-mpi", routing)),
        replace(
            coarse,
            name=f"balancing-{precision}",
            entries=variants("ours-mpi", {"balanced": (), "unbalanced": ("balance.policy=none",)}),
        ),
        *(
            replace(coarse, name=f"experts-{count}-{precision}", entries=few, model=COARSE | {"num_experts": count})
            for count in (8, 32, 64, 128, 256)
        ),
        *(replace(coarse, name=f"layers-{depth}-{precision}", entries=few, model=deep(depth)) for depth in (3, 12)),
        *(
            replace(coarse, name=f"length-{length}-{precision}", entries=few, length=length, sequences=2048 // length)
            for length in (128, 512, 2048)
        ),
        replace(coarse, name=f"workers-4-{precision}", entries=few, workers=4, expert_parallel=4),
    ]


def block_cases(precision: Precision) -> list[BlockCase]:
    """Return the cases of the MoE block in one precision."""
    base = BlockCase(name=f"block-{precision}", precision=precision)
    wide = replace(base, hidden=1024, width=512)
    return [
        *(replace(base, name=f"block-experts-{count}-{precision}", experts=count) for count in (8, 16, 64)),
        *(
            replace(base, name=f"block-experts-{count}-{precision}", experts=count, programs=("ours", "autoep", "hf"))
            for count in (128, 256)
        ),
        *(replace(wide, name=f"block-wide-{count}-{precision}", experts=count) for count in (8, 64)),
        replace(base, name=f"block-fine-{precision}", experts=64, width=64, top_k=8),
        replace(base, name=f"block-zipf-{precision}", zipf_exponent=1.0),
        replace(base, name=f"block-allocator-{precision}", allocator="default"),
        replace(base, name=f"block-threshold-{precision}", top_k=2, programs=("ours", "ours-threshold")),
    ]


def cases_of(precision: Precision) -> list[Case]:
    """Return all cases in one precision."""
    return [*step_cases(precision), *block_cases(precision)]


PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
START = StartCase(name="start")
CASES: dict[str, Case] = {case.name: case for precision in PRECISIONS for case in cases_of(precision)}
CASES[START.name] = START
QUICK_STEPS = {"coarse-bf16": (*OURS, "autoep"), "coarse-fp32": (*OURS, "autoep"), "ep1-fp32": (OURS[0], "hf-tuned")}
"""A step of the quick cases -> its programs, fewer than in all cases."""
QUICK = (
    *(
        replace(case, entries=entries(*programs))
        for name, programs in QUICK_STEPS.items()
        if isinstance(case := CASES[name], StepCase)
    ),
    *(CASES[f"{name}-{precision}"] for precision in PRECISIONS for name in ("block-experts-16", "block-fine")),
)
"""The cases of `make bench-quick` and `make bench-check`: those whose precision the CPU has.

The step beside transformers' grouped_mm, with all experts on each worker, is in fp32 alone, which every CPU has: this
keeps the set short.
"""
