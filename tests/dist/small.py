"""A small model, a ragged global batch, and one optimizer step on any layout: what the tests of many ranks share."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_moe.balancing.balancer import Balancer
from dist_moe.balancing.losses import RoutingLosses
from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.data.stream import IGNORE_INDEX, Batch
from dist_moe.engine.deepspeed import Engine, EngineSettings, start_engine
from dist_moe.model.build import build_model, parameter_groups
from dist_moe.model.inputs import model_inputs
from dist_moe.model.tasks.base import NO_LOSSES
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.moe.select import Rule
from dist_moe.policies.base import Policy
from dist_moe.policies.loss_free import LossFree
from dist_moe.train.step import StepRecord, train_step

CPU = torch.device("cpu")
VOCABULARY = 61
ROWS, LENGTH = 8, 24
DEEPSEEK: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SIGN_RULE = LossFree(rate=0.01)


@dataclass(frozen=True)
class Case:
    """One layout and one step on it."""

    expert_parallel: int = 1
    zero_stage: int = 1
    accumulation: int = 1
    optimizer: str = "sgd"
    clipping: float = 0.0
    bf16: bool = False
    learning_rate: float = 1.0
    steps: int = 1
    checkpointing: bool = False
    policy: Policy = SIGN_RULE
    target_experts_per_token: float | None = None
    poison: str | None = None  # "loss": rank 1's loss is infinite in the first step; "expert": one expert's gradient
    poison_step: int = 0
    model: dict[str, Any] = field(default_factory=lambda: dict(DEEPSEEK))
    rule: Rule | None = None  # None: the family's own
    losses: RoutingLosses = NO_LOSSES
    user_keys: dict[str, Any] = field(default_factory=dict)  # of DeepSpeed's JSON


def ragged_batch(seed: int = 0, rows: int = ROWS) -> Batch:
    """Rows with unequal numbers of labels: documents of random length, padding at some ends, one row without labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator)
    positions_BS = torch.zeros_like(tokens_BS)
    documents_BS = torch.zeros_like(tokens_BS)
    for row in range(rows):
        cut = int(torch.randint(1, LENGTH, (1,), generator=generator))
        positions_BS[row] = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])
        documents_BS[row, cut:] = 1
        if row % 3 == 0:
            documents_BS[row, LENGTH - 1 - row :] = -1
    targets_BS = tokens_BS.roll(-1, dims=1)
    targets_BS[documents_BS < 0] = IGNORE_INDEX
    targets_BS[1] = IGNORE_INDEX
    targets_BS[2, : LENGTH // 2] = IGNORE_INDEX
    return Batch(tokens_BS, targets_BS, documents_BS, positions_BS * (documents_BS >= 0), documents_BS.clamp(max=0))


def part(batch: Batch, first: int, rows: int) -> Batch:
    """Rows first .. first + rows - 1 of a batch."""
    return Batch(*(tensor[first : first + rows] for tensor in batch))


def share(batch: Batch, mesh: Mesh, accumulation: int) -> list[Batch]:
    """The micro-batches of this rank."""
    rows = batch.tokens_BS.shape[0] // (mesh.world_size * accumulation)
    start = mesh.rank * accumulation * rows
    return [part(batch, start + index * rows, rows) for index in range(accumulation)]


def make_task(case: Case, mesh: Mesh) -> LanguageModelTask:
    """The small model with the initial values of seed 0."""
    model = build_model("deepseek_v3", case.model, case.rule or "sigmoid", mesh, seed=0)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    task = LanguageModelTask(model, case.losses, case.policy.needs_margins)
    if case.losses.scope == "global_batch" and case.losses.balance:
        for layer in task.layers:  # as after a step
            layer.router.last_load.copy_(torch.arange(layer.router.num_experts) ** 2)
    return task


def make_balancer(task: LanguageModelTask, case: Case = Case(), device: torch.device = CPU) -> Balancer:
    """A balancer of the task's routers, with a constant rate."""
    routers = {layer.name: layer.router for layer in task.layers}
    return Balancer(routers, case.policy, device, 100, case.target_experts_per_token)


@dataclass
class Trace:
    """The results of a run: values that can be pickled and compared."""

    losses: list[float]
    norms: list[float]
    taken: list[bool]
    loads: list[list[list[int]]]
    biases: list[Tensor]
    state: dict[str, Any]
    experts_per_token: list[float]
    weights: dict[str, Tensor]
    moments: list[Tensor]


def run_case(rank: int, world_size: int, case: Case) -> Trace:
    """Train `case.steps` steps as one rank of a joined world."""
    mesh = make_mesh(case.expert_parallel)
    task = make_task(case, mesh)
    settings = EngineSettings(
        zero_stage=case.zero_stage,
        micro_batch_size=ROWS // (world_size * case.accumulation),
        accumulation=case.accumulation,
        optimizer=case.optimizer,
        gradient_clipping=case.clipping,
        bf16=case.bf16,
        user_keys=case.user_keys,
    )
    with start_engine(task, parameter_groups(task.model, 0.1), settings, mesh) as engine:
        balancer = make_balancer(task, case)
        if case.poison == "expert" and rank == world_size - 1:
            _poison_expert(task)
        records = [_one_step(engine, balancer, case, step, rank, world_size) for step in range(case.steps)]
        return trace(records, engine, balancer, task, mesh)


def _one_step(
    engine: Engine, balancer: Balancer, case: Case, step: int, rank: int, world_size: int
) -> tuple[StepRecord, float]:
    batches = share(ragged_batch(seed=step), engine.mesh, case.accumulation)
    poisoned = case.poison == "loss" and rank == world_size - 1 and step == case.poison_step
    handle = None
    if poisoned:
        norm = engine.module.model.model.norm  # type: ignore[union-attr]
        handle = norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))  # type: ignore
    record = train_step(engine, balancer, batches, case.learning_rate)
    if handle is not None:
        handle.remove()
    return record, float(record.nll_sum)


def _poison_expert(task: LanguageModelTask) -> None:
    """Make the gradient of one local expert of the last layer NaN; the loss stays finite."""
    task.layers[-1].experts.local.get_parameter("down_proj").register_hook(lambda gradient: gradient * float("nan"))


def trace(
    records: list[tuple[StepRecord, float]],
    engine: Engine,
    balancer: Balancer,
    task: LanguageModelTask,
    mesh: Mesh,
) -> Trace:
    """Collect a run's results; losses are this rank's share, so that the shares of all ranks add up."""
    return Trace(
        losses=[nll / record.label_tokens for record, nll in records],
        norms=[record.grad_norm for record, _ in records],
        taken=[record.taken for record, _ in records],
        loads=[[load.tolist() for load in record.loads] for record, _ in records],
        biases=[bias.clone() for bias in balancer.biases],
        state=balancer.state_dict(),
        experts_per_token=[
            sum(int(layer_counts.load_E.sum()) for layer_counts in record.routing_counts)
            / max(1, sum(int(layer_counts.k_histogram_K.sum()) for layer_counts in record.routing_counts))
            for record, _ in records
        ],
        weights=named_weights(task, mesh),
        moments=[
            value.detach().clone()
            for state in engine._engine.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.ndim > 0
        ],
    )


def named_weights(task: LanguageModelTask, mesh: Mesh) -> dict[str, Tensor]:
    """Every parameter under a name without layout: experts one by one under their global ids."""
    return named_experts(task, mesh, {name: p.detach().clone() for name, p in task.named_parameters()})


def named_experts(task: LanguageModelTask, mesh: Mesh, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`values` by parameter name, with the stacked experts split and named by global id."""
    named = {}
    for name, value in values.items():
        if ".experts.local." not in name:
            named[name] = value
            continue
        experts = next(layer.experts.num_experts for layer in task.layers if name.startswith(f"model.{layer.name}."))
        for index, expert in enumerate(mesh.local_experts(experts)):
            named[name.replace(".local.", f".{expert}.")] = value[index]
    return named


def reference(case: Case, dtype: torch.dtype) -> tuple[float, float, dict[str, Tensor]]:
    """One process, plain autograd, the whole global batch at once -> (loss, gradient norm, gradients by name).

    In fp64 the norms of the Hugging Face model still compute in fp32, so it is exact to about 1e-6.
    """
    mesh = Mesh(world_size=1, rank=0, expert_parallel=1)
    task = make_task(case, mesh)
    for parameter in task.parameters():  # buffers stay as they are, as DeepSpeed leaves them
        parameter.data = parameter.data.to(dtype)
    batch = ragged_batch(seed=0)
    labels = (batch.targets_BS != IGNORE_INDEX).sum()
    output = task(
        model_inputs(batch, CPU),
        torch.tensor(1.0 / float(labels), dtype=torch.promote_types(dtype, torch.float32)),
        torch.tensor(1.0 / float((batch.documents_BS >= 0).sum()), dtype=torch.promote_types(dtype, torch.float32)),
    )
    output.loss.backward()
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    norm = torch.sqrt(
        sum((g.double().square().sum() for g in gradients.values()), torch.zeros((), dtype=torch.float64))
    )
    return float(output.loss.detach()), float(norm), named_experts(task, mesh, gradients)
