"""Builds everything that a run needs out of its configuration, in one place."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dist_moe.balancing.balancer import Balancer
from dist_moe.balancing.losses import RoutingLosses
from dist_moe.checkpoint.format.dense_folder import Upcycling
from dist_moe.checkpoint.pretrained import load_pretrained, load_upcycled
from dist_moe.checkpoint.resume import Checkpoint, find_checkpoint, load_model, restore
from dist_moe.checkpoint.training_state import seed_rng
from dist_moe.comm.init import (
    DistContext,
    affinities_of_host,
    init_distributed,
    set_pg_timeouts,
    set_threads,
    set_threads_by_affinities,
)
from dist_moe.comm.mesh import Mesh, make_mesh, ranks_per_node
from dist_moe.comm.objects import all_gather_objects
from dist_moe.config import Config, Resolved
from dist_moe.config.pretrained import text_vocabulary, tokenizer_folder
from dist_moe.config.sections.run import RunConfig
from dist_moe.config.sections.task import TaskConfig
from dist_moe.data.cache import cache_folder
from dist_moe.data.corpus import prepare
from dist_moe.data.labeled.prepare import LabeledData, prepare_labeled
from dist_moe.data.packages.models import weights_folder
from dist_moe.engine.deepspeed import EngineSettings, start_engine
from dist_moe.engine.precision import choose_precision
from dist_moe.engine.train_state import RunData, TrainState, training_stream
from dist_moe.errors import DataError
from dist_moe.health.hang_detector import HangDetector, hang_detector
from dist_moe.model.build import build_model, freeze_layers, parameter_groups, routing_rule
from dist_moe.model.centered_router import center_routers, mean_router_inputs
from dist_moe.model.cross_entropy import choose_cross_entropy
from dist_moe.model.head import head_settings
from dist_moe.model.inputs import model_inputs
from dist_moe.model.tasks.base import Task
from dist_moe.model.tasks.classification import ClassificationTask
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.moe.kernels import check_kernels
from dist_moe.observe.routing.observer import RoutingObserver
from dist_moe.status import print_status
from dist_moe.text import listed
from dist_moe.train.reporting import Report, open_report
from dist_moe.worker.cpu import bound_to_cores, keep_freed_memory
from dist_moe.worker.exit import exit_hard
from dist_moe.worker.rank_info import RankInfo


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        resolved: The configuration, checked for this number of workers.
        state: Everything that steps change and that checkpoints hold.
        report: Logs the run; only rank 0's writes anything.
        checkpoint: The checkpoint that the run resumes from; None for a run that begins.
        hang_detector: Reports which ranks a collective waited for.
        observer: Looks at the routing of the steps that are traced or drawn.
    """

    resolved: Resolved
    state: TrainState
    report: Report
    checkpoint: Checkpoint | None
    hang_detector: HangDetector
    observer: RoutingObserver

    @property
    def config(self) -> Config:
        """The configuration, every field filled in."""
        return self.resolved.config

    @property
    def mesh(self) -> Mesh:
        """The layout of the ranks."""
        return self.state.engine.mesh

    @property
    def steps_done(self) -> int:
        """Optimizer steps before this process began."""
        return 0 if self.checkpoint is None else self.checkpoint.counters.step


@contextlib.contextmanager
def build_run(resolved: Resolved, rank_info: RankInfo) -> Iterator[Run]:
    """Build a run for the length of the context: data, process group, model, engine, balancer, report.

    A collective call. An exception inside the context ends the process, as `exit_hard` documents.

    Args:
        resolved: The configuration, checked for `rank_info.world_size` workers.
        rank_info: This worker's rank.
    """
    config = resolved.config
    set_threads(config.run.threads, rank_info)
    if rank_info.rank == 0:
        print_status(f"preparing text: {listed(config.data.sources, last='and', most=3)}")
    data = tokenize(config)
    with contextlib.ExitStack() as stack:
        dist_context = stack.enter_context(
            init_distributed(rank_info, config.parallel.backend, config.parallel.timeout_s)
        )
        stack.enter_context(use_cpu(config.run, dist_context))
        stack.enter_context(exit_hard(config.run.dir, rank_info.rank))
        # An implementation that this device does not have is refused here, and not in the first step.
        choose_cross_entropy(config.model.cross_entropy, dist_context.device)
        check_kernels(config.model.moe_kernels, dist_context.device)
        detector = stack.enter_context(hang_detector(rank_info.rank, rank_info.world_size, config.parallel.timeout_s))
        mesh = build_mesh(resolved)
        set_pg_timeouts(config.parallel.timeout_s)
        check_same_data(config, data)
        checkpoint = find_checkpoint(config, data, mesh, dist_context.device)
        report = stack.enter_context(open_report(config, dist_context, mesh, checkpoint))
        task = build_task(resolved, data, mesh)
        if checkpoint is not None:
            load_model(checkpoint, task, mesh)
        else:
            load_start(config, task, mesh)
            if config.model.upcycle_router == "centered":
                center_start(config, task, data, mesh)
        report.describe(resolved, data, task)
        settings = engine_settings(resolved, dist_context.device)
        state = stack.enter_context(start_training(config, task, data, mesh, settings))
        seed_rng(config.run.seed, 0, rank_info.rank)
        if checkpoint is not None:
            report.warn(*restore(checkpoint, state))
        routers, done = [layer.router for layer in task.layers], checkpoint.counters.step if checkpoint else 0
        domains = () if isinstance(data, LabeledData) else data.train.domains
        observer = RoutingObserver(config, mesh, routers, domains, done)
        yield Run(resolved, state, report, checkpoint, detector, observer)


def load_start(config: Config, task: Task, mesh: Mesh) -> None:
    """Load the weights that a run starts from, if they are not drawn at random. A collective call."""
    model, folder = config.model, weights_folder(config, cache_folder())
    if folder is None:
        return
    if model.upcycle_from is not None:
        upcycling = Upcycling(model.upcycle_noise, model.upcycle_router_std, config.run.seed)
        load_upcycled(folder, task.model, mesh, upcycling)
    else:
        load_pretrained(folder, task.model, mesh)


def center_start(config: Config, task: Task, data: RunData, mesh: Mesh) -> None:
    """Make the routers of an upcycled model ignore the mean of their inputs. A collective call.

    Rank 0 computes the means on the rows of the first global batch, so that they do not depend on the layout.
    """
    means: list[list[float]] = []
    if mesh.rank == 0:
        stream, size = training_stream(config, data), config.train.sequences_per_forward
        rows = config.train.global_batch_size
        batches = (stream.batch(first, min(size, rows - first)) for first in range(0, rows, size))
        inputs = (model_inputs(batch, torch.device("cpu")) for batch in batches)
        means = [mean_D.tolist() for mean_D in mean_router_inputs(task, inputs)]
    means = all_gather_objects(means, list[list[float]])[0]
    center_routers([layer.router for layer in task.layers], [torch.tensor(mean) for mean in means])


@contextlib.contextmanager
def use_cpu(config: RunConfig, dist_context: DistContext) -> Iterator[None]:
    """Bind a worker on the CPU to its cores for the length of the context, and make it keep freed memory.

    A collective call on the CPU.
    """
    if dist_context.device.type != "cpu":
        yield
        return
    if config.keep_memory:
        keep_freed_memory()
    affinities = affinities_of_host()
    if config.threads == "auto":
        set_threads_by_affinities(dist_context.rank_info, affinities)
    bound = bound_to_cores(dist_context.rank_info, torch.get_num_threads(), affinities)
    with bound if config.bind_cores else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def start_training(
    config: Config, task: Task, data: RunData, mesh: Mesh, settings: EngineSettings
) -> Iterator[TrainState]:
    """Start the engine and the balancer of `task` for the length of the context. A collective call."""
    with start_engine(task, parameter_groups(task.model, config.train.weight_decay), settings, mesh) as engine:
        # DeepSpeed has made process groups of its own, whose time-out is torch's default, 30 minutes.
        set_pg_timeouts(config.parallel.timeout_s)
        yield TrainState(config, engine, build_balancer(task, config, engine.device), task, data)


def tokenize(config: Config) -> RunData:
    """Fetch and tokenize the data of a run, or open the tokens that exist.

    Every worker calls it before the process group exists. Workers of one host wait for each other at a file lock,
    without a time limit. If the data cannot be obtained, each of them ends with the same message.

    Raises:
        DataError: The data cannot be fetched, read or split.
    """
    data, folder = config.data, tokenizer_folder(config)
    if folder is None and data.tokenizer == "pretrained":
        folder = weights_folder(config, cache_folder())
    vocabulary, fraction = text_vocabulary(config), data.validation_fraction
    if config.task.kind != "language_model":
        length, cache = data.sequence_length, cache_folder()
        return prepare_labeled(data.sources, config.task, data.tokenizer, vocabulary, length, fraction, cache, folder)
    return prepare(data.sources, data.tokenizer, vocabulary, fraction, cache_folder(), folder)


def check_same_data(config: Config, data: RunData) -> None:
    """Check that all ranks hold the same tokens, which two hosts may not. A collective call.

    Raises:
        DataError: Ranks hold different tokens; raised on every rank.
    """
    fingerprints = all_gather_objects(data.fingerprint, str)
    other = next((rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]), None)
    if other is not None:
        raise DataError(
            f"data.sources={config.data.sources}",
            f"has different text on rank {other} and rank 0",
            "use the same files, and the same Python version for stdlib-code, on every host",
        )


def build_mesh(resolved: Resolved) -> Mesh:
    """Return the mesh of a run. A collective call."""
    per_node = ranks_per_node(resolved.config.parallel.all_to_all, resolved.expert_parallel)
    return make_mesh(resolved.expert_parallel, per_node, shared_memory=resolved.config.parallel.shared_memory)


def build_task(resolved: Resolved, data: RunData, mesh: Mesh) -> Task:
    """Return the model with its initial values, and its loss."""
    config = resolved.config
    tokenizer = data.tokenizer
    model_config = {"vocab_size": tokenizer.vocab_size, **resolved.model_config, "eos_token_id": tokenizer.end_id}
    model_config |= head_settings(config.task, data.labels if isinstance(data, LabeledData) else ())
    rule = routing_rule(config.router, config.balance, config.model.architecture)
    model = build_model(
        config.model.architecture,
        model_config,
        rule,
        mesh,
        config.run.seed,
        config.model.attention,
        config.model.norm,
        config.model.moe_kernels,
    )
    freeze_layers(model, config.train.frozen_layers)
    if config.train.activation_checkpointing:
        # Reentrant checkpointing silently loses the gradient of losses computed outside the checkpointed function.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, needs_margins = routing_losses(config), config.balance.needs_margins
    if isinstance(data, LabeledData):
        return ClassificationTask(model, losses, needs_margins, class_weights(config.task, data))
    return LanguageModelTask(model, losses, needs_margins, config.model.cross_entropy)


def class_weights(task: TaskConfig, data: LabeledData) -> list[float]:
    """Return the weight of each class in the training loss; none where all are 1."""
    if task.class_weights != "balanced":
        return list(task.class_weights or ())
    counts_C = np.bincount(data.train.labels_N.astype(np.int64), minlength=len(data.labels))
    return [float(data.train.count / (len(data.labels) * count)) for count in counts_C]


def build_balancer(task: Task, config: Config, device: torch.device) -> Balancer:
    """Return the balancer over the routers of every MoE layer."""
    return Balancer(
        {layer.name: layer.router for layer in task.layers},
        config.balance,
        device,
        schedule_steps=config.train.schedule_steps or config.train.steps,
        target_experts_per_token=config.router.target_experts_per_token,
    )


def engine_settings(resolved: Resolved, device: torch.device) -> EngineSettings:
    """Return the engine's part of the configuration."""
    train = resolved.config.train
    return EngineSettings(
        zero_stage=resolved.config.parallel.zero_stage,
        micro_batch_size=train.sequences_per_forward,
        accumulation=resolved.accumulation,
        optimizer=train.optimizer,
        gradient_clipping=train.gradient_clipping,
        bf16=choose_precision(train.precision, device) == torch.bfloat16,
        betas=(train.betas[0], train.betas[1]),
        momentum=train.momentum,
        user_keys=dict(train.deepspeed),
    )


def routing_losses(config: Config) -> RoutingLosses:
    """Return the routing losses that are added to the loss."""
    balance = config.balance
    return RoutingLosses(
        balance.auxiliary_loss,
        balance.auxiliary_scope,
        balance.z_loss,
        config.router.entropy_loss,
        balance.orthogonality_loss,
    )
