"""Aborts after too many consecutive skipped steps, and locates the first non-finite value.

A step is skipped if a gradient is not finite on any rank. A single skipped step does no harm. `train.skip_limit`
consecutive ones mean that the run no longer trains; its repair needs the layer, the rank and the text.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.comm.objects import all_gather_objects
from dist_moe.data.corpus import document_names
from dist_moe.data.stream import Rows
from dist_moe.engine.train_state import RunBatch, TrainState
from dist_moe.errors import UserError
from dist_moe.model.inputs import model_inputs
from dist_moe.text import listed

MOST_DOCUMENTS = 8


class NonFiniteError(UserError, ArithmeticError):
    """Too many consecutive steps had a non-finite gradient; the message names the first non-finite value."""


@dataclass(frozen=True)
class Origin:
    """The first non-finite value on one rank.

    Attributes:
        what: The tensor or module, for the message.
        micro_batch: The micro-batch, from 1; 0 for the weights themselves.
        after: The number of modules and gradients computed before it in that micro-batch. Comparable between ranks,
            which matters because the all-to-all spreads a non-finite value from one rank to the others.
    """

    what: str
    micro_batch: int = 0
    after: int = 0


@dataclass(frozen=True)
class NonFiniteFinding:
    """The result of the search on one rank.

    Attributes:
        origin: The first non-finite value; None where all values are finite.
        documents: Names of the documents of its micro-batch.
    """

    origin: Origin | None
    documents: tuple[str, ...] = ()


class NonFiniteMonitor:
    """Counts consecutive skipped steps, equally on all ranks.

    Args:
        limit: The number at which the run is aborted; 0 for no limit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._consecutive = 0
        self._random: list[Tensor] = []

    def before_step(self, device: torch.device) -> None:
        """Keep the random state of a step that may be the last one, so that it can be repeated exactly."""
        if self._limit and self._consecutive == self._limit - 1:
            self._random = _random_state(device)

    def after_step(self, taken: bool) -> bool:
        """Record whether a step was taken; return whether the limit is reached."""
        self._consecutive = 0 if taken else self._consecutive + 1
        return bool(self._limit) and self._consecutive >= self._limit

    def error(
        self, state: TrainState, step: int, rows: Sequence[Rows], scales: tuple[Tensor, Tensor], newest: Path | None
    ) -> NonFiniteError:
        """Repeat the skipped step up to its gradients, and return an error that locates the first non-finite value.

        A collective call.

        Args:
            state: The run's state.
            step: The step, from 1.
            rows: This rank's micro-batches.
            scales: The `StepRecord.scales` of the step.
            newest: The newest complete checkpoint, if any.
        """
        _set_random_state(self._random, state.engine.device)
        try:
            batches = [state.stream.batch(part.first, part.count) for part in rows]
            origin = find_origin(state.task, batches, scales, state.engine.device)
        except Exception as error:  # the run ends anyway; report what is known
            origin = Origin(f"the search ended in {type(error).__name__}: {error}")
        documents = _documents(state, rows[origin.micro_batch - 1]) if origin and origin.micro_batch else ()
        where = _format_findings(_gather_findings(NonFiniteFinding(origin, documents), state.engine.mesh.world_size))
        checkpoint = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is {newest}"
        return NonFiniteError(
            f"{self._consecutive} consecutive steps were skipped, up to step {step}, because a gradient was not finite "
            f"(train.skip_limit={self._limit}); {where}; {checkpoint}; lower train.learning_rate or fix the text, and "
            "resume from a checkpoint (checkpoint.resume); train.skip_limit=0 sets no limit"
        )


def find_origin(
    task: nn.Module, batches: Sequence[RunBatch], scales: tuple[Tensor, Tensor], device: torch.device
) -> Origin | None:
    """Return the first non-finite value on this rank: of the weights, the forward or the backward pass.

    A collective call, with as many batches on every rank, because the all-to-all needs all ranks. No gradient is
    accumulated, and no token is counted.
    """
    broken = [name for name, tensor in task.named_parameters() if not bool(tensor.detach().isfinite().all())]
    found = Origin(f"the weights {listed(broken, last='and', most=3)} themselves") if broken else None
    for number, batch in enumerate(batches, start=1):
        in_batch = _origin_in(task, batch, scales, number, device)
        found = found or in_batch
    return found


def _origin_in(
    task: nn.Module, batch: RunBatch, scales: tuple[Tensor, Tensor], number: int, device: torch.device
) -> Origin | None:
    names, weights = zip(*((n, w) for n, w in task.named_parameters() if w.requires_grad), strict=True)
    with _outputs(task) as finite:
        output = task(model_inputs(batch, device), *(scale.to(device) for scale in scales))
    # `grad`, not `backward`: the engine's hooks would reduce these gradients.
    gradients = torch.autograd.grad(output.loss, weights, allow_unused=True)
    for after, (name, whole) in enumerate(finite):
        if not whole:
            return Origin(f"forward, in {name or 'the loss'}", number, after)
    # Backward runs from the loss to the input: the gradient of the last weight is computed first.
    backwards = list(zip(names, gradients, strict=True))[::-1]
    for after, (name, gradient) in enumerate(backwards, start=len(finite)):
        if gradient is not None and not bool(gradient.isfinite().all()):
            return Origin(f"backward, at {name}", number, after)
    return None


@contextmanager
def _outputs(task: nn.Module) -> Iterator[list[tuple[str, bool]]]:
    """Record, in the context, each module in the order of completion, and whether all of its output is finite."""
    seen: list[tuple[str, bool]] = []
    with ExitStack() as stack:
        for name, module in task.named_modules():

            def record(_: nn.Module, __: object, output: object, name: str = name) -> None:
                tensors = output if isinstance(output, tuple | list) else (output,)
                floats = [each for each in tensors if isinstance(each, Tensor) and each.is_floating_point()]
                seen.append((name, all(bool(tensor.isfinite().all()) for tensor in floats)))

            stack.callback(module.register_forward_hook(record).remove)
        yield seen


def _documents(state: TrainState, rows: Rows) -> tuple[str, ...]:
    indices = state.stream.documents(rows)[:MOST_DOCUMENTS]
    names = document_names(state.data.folder, "train", indices)
    return tuple(names.get(index, f"document {index}") for index in indices)


def _gather_findings(finding: NonFiniteFinding, ranks: int) -> dict[int, NonFiniteFinding]:
    """Return the findings by rank; only this rank's where the process group no longer works."""
    try:
        return dict(enumerate(all_gather_objects(finding, NonFiniteFinding) if ranks > 1 else [finding]))
    except RuntimeError:
        return {dist.get_rank(): finding}


def _format_findings(findings: dict[int, NonFiniteFinding]) -> str:
    """Name the ranks with the earliest non-finite value, and those that it reached later."""
    at = {rank: (one.origin.micro_batch, one.origin.after) for rank, one in findings.items() if one.origin is not None}
    if not at:
        return (
            "when the step was repeated, every micro-batch was finite on every rank, so only the sum over "
            "micro-batches or ranks, or the norm, was not"
        )
    first = min(at.values())
    parts = [_format_finding(rank, findings[rank]) for rank, when in at.items() if when == first]
    later = [str(rank) for rank, when in at.items() if when > first]
    return "; ".join(parts) + (f" (and later on rank {', '.join(later)})" if later else "")


def _format_finding(rank: int, finding: NonFiniteFinding) -> str:
    origin = finding.origin
    assert origin is not None
    where = f" of micro-batch {origin.micro_batch}" if origin.micro_batch else ""
    text = f" with text from {', '.join(finding.documents)}" if finding.documents else ""
    return f"rank {rank}: {origin.what}{where}{text}"


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    for state in states[:1]:
        torch.set_rng_state(state)
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
