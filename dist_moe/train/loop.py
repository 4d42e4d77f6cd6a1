"""The loop around the step: start everything, train, log, save, evaluate, and end everything in reverse."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import torch

from dist_moe.balance.balancer import Balancer
from dist_moe.balance.losses import RoutingLosses
from dist_moe.balance.spec import BalanceSettings
from dist_moe.checkpoint.async_saver import AsyncSaver
from dist_moe.checkpoint.pretrained import load_pretrained
from dist_moe.checkpoint.resume import Checkpoint, find_checkpoint, load_model, restore_run
from dist_moe.checkpoint.training_state import seed_random
from dist_moe.comm.init import DistContext, init_distributed, set_pg_timeouts, set_threads
from dist_moe.comm.mesh import Mesh, make_mesh, ranks_per_node
from dist_moe.comm.reduce import all_gather_objects
from dist_moe.config import Config, Resolved
from dist_moe.config.pretrained import text_vocabulary, tokenizer_folder
from dist_moe.data.cache import cache_folder
from dist_moe.data.corpus import TokenizedData, prepare
from dist_moe.data.mmap_files import detect_change, reject_change
from dist_moe.data.stream import Rows
from dist_moe.engine.deepspeed import EngineSettings, start_engine
from dist_moe.engine.precision import choose_precision
from dist_moe.engine.train_state import TrainState
from dist_moe.errors import DataError
from dist_moe.health.hang_detector import HangDetector, hang_detector
from dist_moe.health.nonfinite import NonFiniteMonitor
from dist_moe.health.replica_check import ReplicaError, check_replicas
from dist_moe.health.stop_signals import stop_requests
from dist_moe.model.build import build_model, parameter_groups, routing_rule
from dist_moe.model.task import LanguageModelTask
from dist_moe.train.checkpointing import CheckpointSchedule
from dist_moe.train.evaluate import evaluate, validation_set
from dist_moe.train.reporting import Report, open_report
from dist_moe.train.schedule import Schedule
from dist_moe.train.step import StepRecord, Word, train_step
from dist_moe.worker.exit import Stopped, exit_hard
from dist_moe.worker.rank_info import RankInfo


def run(resolved: Resolved, rank_info: RankInfo) -> None:
    """Train as one worker: everything that `dist-moe train` does after the config was checked."""
    config = resolved.config
    set_threads(config.run.threads, rank_info)
    prepared = prepare_text(config)
    with contextlib.ExitStack() as stack:
        dist_context = stack.enter_context(
            init_distributed(rank_info, config.parallel.backend, config.parallel.timeout_s)
        )
        stack.enter_context(exit_hard(config.run.dir, rank_info.rank))
        watch = stack.enter_context(hang_detector(rank_info.rank, rank_info.world_size, config.parallel.timeout_s))
        per_node = ranks_per_node(config.parallel.all_to_all, resolved.expert_parallel)
        mesh = make_mesh(resolved.expert_parallel, per_node)
        set_pg_timeouts(config.parallel.timeout_s)
        check_same_text(config, prepared)
        checkpoint = find_checkpoint(config, prepared, mesh, dist_context.device)
        report = stack.enter_context(open_report(config, dist_context, mesh, checkpoint))
        task = make_task(resolved, prepared, mesh)
        if checkpoint is not None:
            load_model(checkpoint, task, mesh)
        elif config.model.pretrained is not None:
            load_pretrained(Path(config.model.pretrained), task.model, mesh)
        report.describe(resolved, prepared, task)
        settings = engine_settings(resolved, dist_context)
        groups = parameter_groups(task.model, config.train.weight_decay)
        engine = stack.enter_context(start_engine(task, groups, settings, mesh))
        set_pg_timeouts(config.parallel.timeout_s)
        balancer = make_balancer(task, config, engine.device)
        training = TrainState(config, engine, balancer, task, prepared)
        seed_random(config.run.seed, 0, rank_info.rank)
        if checkpoint is not None:
            restore_run(checkpoint, training)
        train(resolved, training, report, checkpoint, watch)


def train(
    resolved: Resolved, training: TrainState, report: Report, checkpoint: Checkpoint | None, watch: HangDetector
) -> None:
    """The steps of the run after those of `checkpoint`, its further checkpoints, and the evaluation at its end.

    Errors: Stopped where a worker was asked to stop; then a checkpoint of all steps so far is there. NonFiniteError
    after train.skip_limit skipped steps in a row; ReplicaError where ranks differ; DataError where a file of the text
    was changed, after all steps so far were saved; CheckpointError where the last checkpoint cannot be saved.
    """
    config, engine, prepared = resolved.config, training.engine, training.prepared
    done = 0 if checkpoint is None else checkpoint.counters.step
    saves = CheckpointSchedule(
        AsyncSaver(training, report.warn), report, None if checkpoint is None else checkpoint.folder
    )
    guard = NonFiniteMonitor(config.train.skip_limit)
    with stop_requests() as asked:
        for step in range(done + 1, config.train.steps + 1):
            guard.before_step(engine.device)
            watch.set_step(step)
            try:
                record = one_step(resolved, training, report, step, Word(bool(asked), saves.written))
            except DataError:
                saves.save_before_error(step - 1)
                raise
            if record.written:
                saves.finalize()
            try:
                check_replicas(training, step, done)
            except ReplicaError:
                saves.finalize()  # one of before, which may be what to go on from
                raise
            if guard.after_step(record.taken):
                saves.finalize()
                parts = micro_batches(resolved, engine.mesh, step)
                raise guard.error(training, step, parts, record.scales, saves.newest)
            last = step == config.train.steps
            if last or record.asked:
                saves.save_now(step, record.taken)
            elif config.checkpoint.interval and step % config.checkpoint.interval == 0:
                saves.save_due(step, record.taken, config.checkpoint.asynchronous)
            if record.asked and not last:
                report.stopped(step, saves.newest)
                saves.close()
                raise Stopped
    reject_change(detect_change(prepared.mapped))
    text = validation_set(
        prepared, config.data.sequence_length, config.observe.validation_sequences, config.train.micro_batch_size
    )
    found = evaluate(training.task, text, engine.mesh, engine.device, max(done, config.train.steps))
    report.evaluation(found, saves.newest)
    saves.close()


def one_step(resolved: Resolved, training: TrainState, report: Report, step: int, word: Word) -> StepRecord:
    """Step `step` (from 1), and its report."""
    balancer, started_s = training.balancer, time.perf_counter()
    learning_rate = make_schedule(resolved.config).learning_rate(balancer.taken)
    rate = balancer.settings.rate_at(balancer.taken)
    # Before, as reading a file that has got shorter ends the process; and after, as it may have changed meanwhile.
    changed = detect_change(training.prepared.mapped)
    parts = [] if changed else micro_batches(resolved, training.engine.mesh, step)
    batches = [part.of(training.stream) for part in parts]
    word = replace(word, changed=changed or detect_change(training.prepared.mapped))
    record = train_step(training.engine, balancer, batches, learning_rate, word)
    report.step(step, record, balancer.biases, learning_rate, rate, time.perf_counter() - started_s)
    return record


def micro_batches(resolved: Resolved, mesh: Mesh, step: int) -> list[Rows]:
    """This worker's part of the global batch of `step` (from 1), in micro-batches.

    The global batch is the same rows of the stream whatever the number of workers: each takes a block of it.
    """
    train = resolved.config.train
    share = train.global_batch_size // mesh.world_size
    first = (step - 1) * train.global_batch_size + mesh.rank * share
    return [Rows(first + offset, train.micro_batch_size) for offset in range(0, share, train.micro_batch_size)]


def prepare_text(config: Config) -> TokenizedData:
    """Fetch and tokenise, or open what is there.

    Every worker calls it before the workers meet: those of one host wait for each other at a file, without a
    time limit, and a text that cannot be had stops each of them with the same word.
    """
    data = config.data
    vocabulary, fraction = text_vocabulary(config), data.validation_fraction
    return prepare(data.sources, data.tokenizer, vocabulary, fraction, cache_folder(), tokenizer_folder(config))


def check_same_text(config: Config, prepared: TokenizedData) -> None:
    """Errors: DataError where ranks hold different tokens, which two hosts may come to. A collective call."""
    fingerprints = all_gather_objects(prepared.fingerprint)
    other = next((rank for rank, found in enumerate(fingerprints) if found != fingerprints[0]), None)
    if other is not None:
        raise DataError(
            f"data.sources={config.data.sources}",
            f"give rank {other} other text than rank 0",
            "use the same files, and the same Python version for stdlib-code, on every host",
        )


def make_task(resolved: Resolved, prepared: TokenizedData, mesh: Mesh) -> LanguageModelTask:
    """The model with its initial values, and its loss."""
    config = resolved.config
    tokenizer = prepared.tokenizer
    model_config = {"vocab_size": tokenizer.vocab_size, **resolved.model_config}
    model_config |= {"eos_token_id": tokenizer.end_id, "bos_token_id": None, "pad_token_id": None}
    rule = routing_rule(config.router, config.balance)
    model = build_model(config.model.architecture, model_config, rule, mesh, config.run.seed)
    if config.train.activation_checkpointing:
        # The reentrant kind silently loses the gradient of losses that do not come out of the checkpointed function.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return LanguageModelTask(model, routing_losses(config), balance_settings(config).counts_margins)


def engine_settings(resolved: Resolved, dist_context: DistContext) -> EngineSettings:
    """The engine's part of the config."""
    train = resolved.config.train
    return EngineSettings(
        zero_stage=resolved.config.parallel.zero_stage,
        micro_batch_size=train.micro_batch_size,
        accumulation=resolved.accumulation,
        optimizer=train.optimizer,
        gradient_clipping=train.gradient_clipping,
        bf16=choose_precision(train.precision, dist_context.device) == torch.bfloat16,
        betas=(train.betas[0], train.betas[1]),
        momentum=train.momentum,
        further=dict(train.deepspeed),
    )


def make_balancer(task: LanguageModelTask, config: Config, device: torch.device) -> Balancer:
    """The balancer over the routers of every MoE layer."""
    return Balancer({layer.name: layer.router for layer in task.layers}, balance_settings(config), device)


def routing_losses(config: Config) -> RoutingLosses:
    """The part of the config that is added to the loss."""
    balance = config.balance
    return RoutingLosses(balance.auxiliary_loss, balance.auxiliary_scope, balance.z_loss, config.router.entropy_loss)


def balance_settings(config: Config) -> BalanceSettings:
    """The balancer's part of the config."""
    balance = config.balance
    return BalanceSettings(
        policy=balance.policy,
        rate=balance.rate,
        schedule=balance.schedule,
        schedule_steps=config.train.schedule_steps or config.train.steps,
        center=balance.center,
        proportional=None if balance.rule is None else balance.rule == "proportional",
        freeze_at=balance.freeze_at,
        clip=balance.clip,
        budget=config.router.target_experts_per_token,
    )


def make_schedule(config: Config) -> Schedule:
    """The learning rate's schedule."""
    train = config.train
    steps = train.schedule_steps or train.steps
    return Schedule(train.learning_rate, train.warmup_steps, steps, train.final_learning_rate_ratio)
