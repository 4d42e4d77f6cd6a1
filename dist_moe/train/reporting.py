"""Logs a run: metrics.jsonl, events.jsonl, TensorBoard and the terminal, from rank 0, on logged steps only."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dist_moe.balancing.counts import unrouted_tokens
from dist_moe.checkpoint.async_saver import Saved
from dist_moe.checkpoint.format.hf_weights import own_type_of_model
from dist_moe.checkpoint.format.layout import checkpoints_root
from dist_moe.checkpoint.resume import Checkpoint, job_id
from dist_moe.comm.init import DistContext
from dist_moe.comm.mesh import Mesh
from dist_moe.comm.reduce import all_reduce_scalars
from dist_moe.config import Config, Resolved, dump_config
from dist_moe.data.labeled.prepare import LabeledData
from dist_moe.data.labeled.stream import ExampleStream
from dist_moe.engine.train_state import RunData
from dist_moe.errors import needs_folder
from dist_moe.families.registry import family_of
from dist_moe.files import others_may_write
from dist_moe.model.inputs import documents_line
from dist_moe.model.tasks.base import Task
from dist_moe.observe.alerts import EARLY_STEPS, LoadAlerts
from dist_moe.observe.console import RunConsole
from dist_moe.observe.evaluation import EvaluationMetrics
from dist_moe.observe.metrics import Progress, StepMetrics, step_metrics
from dist_moe.observe.pictures.logged_load import logged_loads
from dist_moe.observe.record import RunRecorder, archive_previous_run, board_folder
from dist_moe.observe.routing.observer import Distributions, bias_distribution
from dist_moe.observe.tensorboard import TensorBoardWriter
from dist_moe.policies.shares import Shares
from dist_moe.policies.unbalanced import Unbalanced
from dist_moe.text import counted, listed
from dist_moe.train.microbatch_vio import microbatch_max_vio
from dist_moe.train.step import StepRecord

UNBALANCED = Unbalanced.name()


class Report:
    """Collects the metrics of logged steps. Every rank holds one and calls it at the same steps; only rank 0's writes.

    Args:
        config: The configuration of the run.
        dist_context: The joined process group.
        mesh: The layout of the ranks.
        recorder: Writes metrics.jsonl, events.jsonl and run.json; None on other ranks than 0.
        console: Writes to the terminal; None on other ranks than 0.
        board: Writes TensorBoard event files; None on other ranks than 0, and where they are off.
        checkpoint: The checkpoint that the run resumes from, if any.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        config: Config,
        dist_context: DistContext,
        mesh: Mesh,
        recorder: RunRecorder | None,
        console: RunConsole | None,
        board: TensorBoardWriter | None,
        checkpoint: Checkpoint | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.dist_context = dist_context
        self.mesh = mesh
        self.recorder, self.console, self.board = recorder, console, board
        self._alerts = LoadAlerts(
            config.observe.max_vio_limit,
            config.observe.max_vio_patience,
            early_steps=max(EARLY_STEPS, config.train.warmup_length),
            balanced=config.balance.policy != UNBALANCED,
            has_rate=config.balance.has_rate,
            target_shares=config.balance.target_shares,
        )
        self._checkpoint = checkpoint
        self._done = 0 if checkpoint is None else checkpoint.counters.step
        self._skipped_steps = 0 if checkpoint is None else self._done - checkpoint.counters.taken
        self._clock = clock
        # When the previous logged step had been taken.
        self._since_s: float | None = None
        self._steps = 0
        # Positions, or tokens of examples, of all rows before one.
        self._tokens_before: Callable[[int], int] = config.data.sequence_length.__mul__

    def describe(self, resolved: Resolved, tokenized: RunData, task: Task) -> None:
        """Record what the run is, and print what will be trained, on which text, and which layers are balanced."""
        if self.recorder is None or self.console is None:
            return
        plain = self.config.model_dump(mode="json")
        layout = {
            "workers": self.mesh.world_size,
            "expert_parallel": self.mesh.expert_parallel,
            "accumulation": resolved.accumulation,
            "backend": self.dist_context.backend,
            "device": str(self.dist_context.device),
            "launcher": self.dist_context.rank_info.launcher,
            "sources": [record.__dict__ for record in tokenized.records],
            "corpus": tokenized.fingerprint,
            "job": job_id(os.environ),
            "resumed_from": None if self._checkpoint is None else str(self._checkpoint.folder),
        }
        self.recorder.describe(plain, dump_config(self.config), layout)
        of_start = ("workers", "expert_parallel", "backend", "launcher", "job", "resumed_from")
        self.recorder.event("start", self._done, **{name: layout[name] for name in of_start})
        if self.board is not None:
            self.board.describe(plain, dump_config(self.config))
        experts = sum(p.numel() for layer in task.layers for p in layer.experts.local.parameters())
        others = sum(p.numel() for p in task.parameters()) - experts
        total = others + experts * self.mesh.expert_parallel
        self.console.log(
            f"{self.config.model.architecture}: {total / 1e6:.1f} M parameters, "
            f"{counted(len(task.layers), 'MoE layer')} of {counted(resolved.experts, 'expert')}; "
            f"{counted(self.mesh.world_size, 'worker')}, expert parallel {self.mesh.expert_parallel}, "
            f"ZeRO {self.config.parallel.zero_stage}"
        )
        if own_type := own_type_of_model(task.model, self.config.balance.moves_bias):
            self.console.log(own_type)
        if not task.separates_documents:
            self.console.log(documents_line(self.config.model.architecture))
        if untrained := family_of(self.config.model.architecture).untrained:
            self.console.log(f"not trained, since the loss gives it no gradient: {listed(untrained, last='and')}")
        names = ", ".join(layer.name for layer in task.layers)
        if self.config.balance.policy == UNBALANCED:
            self.console.log(f"balance.policy={UNBALANCED}: the load is measured but not balanced, without warnings")
        else:
            plural = "s"[: len(task.layers) > 1]
            self.console.log(f"balancing policy {self.config.balance.policy} on layer{plural} {names}")
        if self.config.balance.target_shares(resolved.experts) is not None:
            self.console.log("MaxVio, load deviation and their floors are measured against balance.shares")
        if isinstance(tokenized, LabeledData):
            self._tokens_before = ExampleStream(tokenized.train, self.config.run.seed).tokens_before
        self.console.log(describe_data(tokenized))
        for note in tokenized.notes:
            self.console.log(f"text: {note}")
        if self._checkpoint is not None:
            self.warn(*self._checkpoint.passed_over)
            for change in self._checkpoint.changes:
                self.console.log(f"changed since the checkpoint: {change}")
            self.console.log(f"resuming after step {self._checkpoint.counters.step} from {self._checkpoint.folder}")
            if self._checkpoint.counters.step >= self.config.train.steps:
                self.console.log(
                    f"train.steps={self.config.train.steps} are done; raise it to train more, or set "
                    "checkpoint.resume=never to start again (existing checkpoints are kept)"
                )

    def step(
        self,
        step: int,
        record: StepRecord,
        biases: Sequence[Tensor],
        learning_rate: float,
        balance_rate: float,
        started_s: float,
        distributions: Distributions | None = None,
    ) -> None:
        """Record a step, and log it if it is due or was skipped. A collective call.

        A logged step takes one collective over all ranks, and with expert parallelism one within its group. Every rank
        decides the same way whether a step is logged.

        Args:
            step: The step, from 1.
            record: Its record.
            biases: The selection bias [E] of each MoE layer after the step.
            learning_rate: The learning rate of the step.
            balance_rate: The rate of the balancing policy in the step.
            started_s: When this rank began the step, by the clock of this report.
            distributions: Scores and gate weights, in a step whose pictures are due; None: no pictures.
        """
        self._since_s = started_s if self._since_s is None else self._since_s
        self._steps, self._done = self._steps + 1, step
        self._skipped_steps += not record.taken
        self._advance(step)
        if step % self.config.observe.interval and record.taken and step not in (1, self.config.train.steps):
            return
        nll, auxiliary, microbatch_vio_L = self._over_ranks(record)
        step_s, tokens_per_step = self._since_last(step, self._since_s)
        if self.recorder is None or self.console is None:
            return
        progress = Progress(
            step=step,
            loss=nll / record.label_tokens if record.label_tokens else math.nan,
            auxiliary_loss=auxiliary,
            learning_rate=learning_rate,
            grad_norm=record.grad_norm,
            tokens=self._tokens_before(step * self.config.train.global_batch_size),
            tokens_per_s=tokens_per_step / step_s,
            step_ms=1e3 * step_s,
            skipped=not record.taken,
            skipped_steps=self._skipped_steps,
            balance_rate=balance_rate,
            threshold=record.threshold,
        )
        metrics = self._metrics(progress, record, biases, microbatch_vio_L)
        self._write(metrics, None if distributions is None else {**bias_distribution(biases), **distributions})

    def _metrics(
        self,
        progress: Progress,
        record: StepRecord,
        biases: Sequence[Tensor],
        microbatch_vio_L: Sequence[tuple[float, float]],
    ) -> StepMetrics:
        """Return the metrics of a logged step."""
        return step_metrics(
            progress,
            load_L=[load.cpu() for load in record.loads],
            k_histogram_L=[layer_counts.k_histogram_K.cpu() for layer_counts in record.routing_counts],
            microbatch_vio_L=microbatch_vio_L,
            bias_L=[bias.cpu() for bias in biases],
            expert_parallel=self.mesh.expert_parallel,
            shares=self._shares(record),
            unrouted_L=unrouted_tokens(record.routing_counts),
        )

    def _write(self, metrics: StepMetrics, distributions: Distributions | None) -> None:
        """Write a logged step, with its pictures where there are distributions; on rank 0."""
        if self.recorder is None or self.console is None:
            return
        self.recorder.write(metrics.as_dict())
        self.console.step(metrics)
        self.warn(*self._alerts.check(metrics))
        if self.board is not None:
            self.board.step(metrics)
        if self.board is not None and distributions is not None:
            self.board.pictures(metrics, distributions)

    def _since_last(self, step: int, since_s: float) -> tuple[float, float]:
        """Return seconds and tokens of each step from `since_s` until now, where the time of the next ones begins."""
        now_s, rows = self._clock(), self.config.train.global_batch_size
        tokens = self._tokens_before(step * rows) - self._tokens_before((step - self._steps) * rows)
        per_step = ((now_s - since_s) / self._steps, tokens / self._steps)
        self._since_s, self._steps = now_s, 0
        return per_step

    def _advance(self, step: int) -> None:
        """Move the bar on the terminal, between logged steps too."""
        if self.console is not None:
            self.console.advance(step)

    def _over_ranks(self, record: StepRecord) -> tuple[float, float, list[tuple[float, float]]]:
        """Return, over all ranks: sum of -ln p, auxiliary loss, (micro-batch MaxVio, floor) of each layer."""
        scalars = {"nll": float(record.nll_sum), "auxiliary": float(record.auxiliary)}
        microbatch_vio_L = microbatch_max_vio(
            record.micro_loads, self.mesh, self.dist_context.device, self._shares(record)
        )
        for layer, (value, floor) in enumerate(microbatch_vio_L):
            scalars |= {f"value {layer}": value, f"floor {layer}": floor}
        sums = all_reduce_scalars(scalars, self.dist_context.device)
        # The ranks of a group hold the same value, and all groups have one size, so the mean over ranks is that over
        # groups.
        means = {name: total / self.mesh.world_size for name, total in sums.items()}
        pairs = [(means[f"value {layer}"], means[f"floor {layer}"]) for layer in range(len(microbatch_vio_L))]
        return sums["nll"], means["auxiliary"], pairs

    def _shares(self, record: StepRecord) -> Shares:
        """Return the target shares of the experts of every layer; None for equal shares."""
        return self.config.balance.target_shares(record.loads[0].numel()) if record.loads else None

    def warn(self, *lines: str) -> None:
        """Print and record each line as a warning."""
        if self.recorder is None or self.console is None:
            return
        self.console.warn(*lines)
        for line in lines:
            self.recorder.event("warning", self._done, text=line)

    def saved(self, saved: Saved) -> None:
        """Log a complete checkpoint: in metrics.jsonl, in TensorBoard and on the terminal."""
        if self.recorder is None or self.console is None:
            return
        times_ms = {"stall_ms": 1e3 * saved.stall_s, "write_ms": 1e3 * saved.write_s}
        self.recorder.write({"event": "checkpoint", "step": saved.step, "bytes": saved.bytes, **times_ms})
        if self.board is not None:
            self.board.checkpoint(saved.step, times_ms["stall_ms"])
        self.console.log(
            f"checkpoint of step {saved.step}: {saved.bytes / 1e6:,.1f} MB, written in {saved.write_s:.2f} s; "
            f"training stalled for {times_ms['stall_ms']:,.0f} ms"
        )
        self.warn(*saved.warnings)

    def stopped(self, step: int, checkpoint: Path | None) -> None:
        """Print and record that the run ends here on request."""
        if self.recorder is not None and self.console is not None:
            self.recorder.event("stopped", step, checkpoint=None if checkpoint is None else str(checkpoint))
            self.console.log(f"stopped on request after step {step}; the same command resumes from {checkpoint}")

    def evaluation(self, metrics: EvaluationMetrics, checkpoint: Path | None) -> None:
        """Log the final evaluation, and print where the results are."""
        if self.recorder is None or self.console is None:
            return
        self.recorder.write(metrics.as_dict())
        self.recorder.event("finished", self._done)
        if self.board is not None:
            self.board.evaluation(metrics)
        paths = {"metrics": self.recorder.metrics_path}
        paths |= {"checkpoint": checkpoint} if checkpoint is not None else {}
        board = None if self.board is None else self.board.folder
        self.console.summary(metrics, paths, board, self.config.balance.target_shares)


def describe_data(data: RunData) -> str:
    """Say in a line what is trained on, and what is held out."""
    if not isinstance(data, LabeledData):
        tokens = [len(corpus.tokens) for corpus in (data.train, data.validation)]
        return f"text: {counted(tokens[0], 'token')} to train on, {tokens[1]:,} held out"
    line = f"text: {counted(data.train.count, 'example')} to train on, {data.validation.count:,} held out"
    return f"{line}; classes: {listed(data.labels, last='and', most=10)}" if data.labels else line


@contextlib.contextmanager
def open_report(
    config: Config,
    dist_context: DistContext,
    mesh: Mesh,
    checkpoint: Checkpoint | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Report]:
    """Open the report of a run for the length of the context; files and terminal are open on rank 0 only.

    Args:
        config: The configuration of the run.
        dist_context: The joined process group.
        mesh: The layout of the ranks.
        checkpoint: The checkpoint that the run resumes from. Where it is of this run.dir, the files there are
            continued; otherwise the files of an earlier run are moved into `earlier-N`.
        clock: As `Report` takes it.

    Raises:
        RunFolderError: run.dir cannot be written.
    """
    if dist_context.rank_info.rank != 0:
        yield Report(config, dist_context, mesh, None, None, None, checkpoint, clock)
        return
    folder = Path(config.run.dir)
    continues = checkpoint is not None and checkpoint.folder.resolve().parent == checkpoints_root(config).resolve()
    with needs_folder(folder):
        aside = None if continues else archive_previous_run(folder)
    done = 0 if checkpoint is None else checkpoint.counters.step
    with contextlib.ExitStack() as stack:
        console = RunConsole(config.train.steps, done)
        recorder = stack.enter_context(RunRecorder(folder, console.warn))
        board = None
        if config.observe.tensorboard:
            board = stack.enter_context(
                TensorBoardWriter(
                    board_folder(folder, continues), done or None, console.warn, config.balance.target_shares
                )
            )
            if continues:
                board.recall(logged_loads(recorder.metrics_path, done))
        stack.enter_context(console)
        if reason := others_may_write(folder):
            console.warn(f"run.dir={folder} can be changed by others ({reason}); use `chmod go-w`, or another folder")
        if aside is not None:
            console.log(f"the files of an earlier run in {folder} were moved to {aside}")
        yield Report(config, dist_context, mesh, recorder, console, board, checkpoint, clock)
