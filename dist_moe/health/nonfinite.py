"""Ends a run that only skips steps, and says where the first value that is not finite comes from.

A step is skipped where a gradient is not finite on some rank. One now and then costs nothing; `train.skip_limit` of
them in a row mean that the run is lost, and that whoever minds it needs to know the layer, the rank and the text.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.comm.reduce import all_gather_objects
from dist_moe.data.corpus import document_names
from dist_moe.data.stream import Batch, Rows
from dist_moe.engine.train_state import TrainState
from dist_moe.errors import UserError

MOST_DOCUMENTS = 8


class NonFiniteError(UserError, ArithmeticError):
    """Too many steps in a row had a gradient that is not finite; the message says where that begins."""


@dataclass(frozen=True)
class Origin:
    """Where on one rank a value is not finite. what: in words.

    micro_batch: from 1; 0 for the weights themselves. after: what was computed before it in that micro-batch, counted
    alike on all ranks: with experts' exchange, what is wrong on one rank is soon wrong on others too.
    """

    what: str
    micro_batch: int = 0
    after: int = 0


@dataclass(frozen=True)
class Finding:
    """What one rank found. documents: the names of those that its micro-batch was made of."""

    origin: Origin | None
    documents: tuple[str, ...] = ()


class NonFiniteMonitor:
    """Counts the steps that were skipped one after the other; all ranks count alike. limit: 0 for none."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self._random: list[Tensor] = []

    def before_step(self, device: torch.device) -> None:
        """Keep the random state of a step that may be the last one, so that it can be made again as it was."""
        if self._limit and self._in_a_row == self._limit - 1:
            self._random = _random_state(device)

    def after_step(self, taken: bool) -> bool:
        """Note whether a step was taken -> whether the limit is reached."""
        self._in_a_row = 0 if taken else self._in_a_row + 1
        return bool(self._limit) and self._in_a_row >= self._limit

    def error(
        self, training: TrainState, step: int, parts: Sequence[Rows], scales: tuple[Tensor, Tensor], good: Path | None
    ) -> NonFiniteError:
        """Make the skipped step again, without its end, and look where it goes wrong. A collective call.

        parts: this rank's micro-batches. scales: of its losses, as in its record. good: the newest checkpoint.
        """
        _set_random_state(self._random, training.engine.device)
        try:
            batches = [part.of(training.stream) for part in parts]
            origin = find_origin(training.task, batches, scales, training.engine.device)
        except Exception as error:  # whatever it is, the run ends with what is known
            origin = Origin(f"the search ended in {type(error).__name__}: {error}")
        documents = _documents(training, parts[origin.micro_batch - 1]) if origin and origin.micro_batch else ()
        told = _told(_gather_findings(Finding(origin, documents), training.engine.mesh.world_size))
        left = "no checkpoint is there yet" if good is None else f"the newest checkpoint, {good}, is as it was"
        return NonFiniteError(
            f"{self._in_a_row} steps in a row were skipped, up to step {step}, because a gradient was not finite "
            f"(train.skip_limit={self._limit}); {told}; {left}; lower train.learning_rate, or mend the text, and go on "
            "from a checkpoint (checkpoint.resume); train.skip_limit=0 skips without end"
        )


def find_origin(
    task: nn.Module, batches: Sequence[Batch], scales: tuple[Tensor, Tensor], device: torch.device
) -> Origin | None:
    """The first value on this rank that is not finite: of the weights, forward, or backward; None for none.

    Every rank calls it with as many batches, since the experts' exchange needs all; no gradient is accumulated and
    nothing is counted.
    """
    broken = [name for name, tensor in task.named_parameters() if not bool(tensor.detach().isfinite().all())]
    found = Origin(f"the weights {_listed(broken)} themselves") if broken else None
    for number, batch in enumerate(batches, start=1):
        in_batch = _origin_in(task, batch, scales, number, device)
        found = found or in_batch
    return found


def _origin_in(
    task: nn.Module, batch: Batch, scales: tuple[Tensor, Tensor], number: int, device: torch.device
) -> Origin | None:
    names, weights = zip(*((n, w) for n, w in task.named_parameters() if w.requires_grad), strict=True)
    mask_BS = batch.documents_BS >= 0
    inputs = (batch.tokens_BS, batch.targets_BS, batch.positions_BS, mask_BS)
    with _outputs(task) as finite:
        output = task(*(tensor.to(device) for tensor in (*inputs, *scales)))
    # Not `backward`: the engine's hooks would reduce these gradients.
    gradients = torch.autograd.grad(output.loss, weights, allow_unused=True)
    for after, (name, whole) in enumerate(finite):
        if not whole:
            return Origin(f"forward, in {name or 'the loss'}", number, after)
    # Gradients travel from the loss towards the text: the last weight is the first to see them.
    backwards = list(zip(names, gradients, strict=True))[::-1]
    for after, (name, gradient) in enumerate(backwards, start=len(finite)):
        if gradient is not None and not bool(gradient.isfinite().all()):
            return Origin(f"backward, at {name}", number, after)
    return None


@contextmanager
def _outputs(task: nn.Module) -> Iterator[list[tuple[str, bool]]]:
    """In the block, each module that has ended, in this order, and whether all of its output is finite."""
    seen: list[tuple[str, bool]] = []
    with ExitStack() as stack:
        for name, module in task.named_modules():

            def look(_: nn.Module, __: object, output: object, name: str = name) -> None:
                tensors = output if isinstance(output, tuple | list) else (output,)
                floats = [one for one in tensors if isinstance(one, Tensor) and one.is_floating_point()]
                seen.append((name, all(bool(tensor.isfinite().all()) for tensor in floats)))

            stack.callback(module.register_forward_hook(look).remove)
        yield seen


def _documents(training: TrainState, rows: Rows) -> tuple[str, ...]:
    indices = training.stream.documents(rows)[:MOST_DOCUMENTS]
    names = document_names(training.prepared, "train", indices)
    return tuple(names.get(index, f"document {index}") for index in indices)


def _gather_findings(finding: Finding, ranks: int) -> dict[int, Finding]:
    """The findings by rank; this rank's alone where the group does not work any more."""
    try:
        return dict(enumerate(all_gather_objects(finding) if ranks > 1 else [finding]))
    except RuntimeError:
        return {dist.get_rank(): finding}


def _told(findings: dict[int, Finding]) -> str:
    """The ranks on which it begins first, and which it reaches later."""
    at = {rank: (one.origin.micro_batch, one.origin.after) for rank, one in findings.items() if one.origin is not None}
    if not at:
        return (
            "made again, every micro-batch is finite on every rank, so only their sum, that over the ranks, or the "
            "norm was not"
        )
    first = min(at.values())
    parts = [_words(rank, findings[rank]) for rank, when in at.items() if when == first]
    later = [str(rank) for rank, when in at.items() if when > first]
    return "; ".join(parts) + (f" (and later on rank {', '.join(later)})" if later else "")


def _words(rank: int, finding: Finding) -> str:
    origin = finding.origin
    assert origin is not None
    where = f" of micro-batch {origin.micro_batch}" if origin.micro_batch else ""
    text = f", whose text is of {', '.join(finding.documents)}" if finding.documents else ""
    return f"rank {rank}: {origin.what}{where}{text}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    for state in states[:1]:
        torch.set_rng_state(state)
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
