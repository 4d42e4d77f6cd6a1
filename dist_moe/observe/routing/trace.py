"""The trace: the routing of sampled steps in Parquet files, and how to read it. docs/observing.md has its columns.

Shapes: B sequences of a micro-batch, S positions, T = B * S tokens, E routed experts of a layer, K columns of experts.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_moe.balancing.counts import count_values
from dist_moe.comm.mesh import Mesh
from dist_moe.config.checks.packages import ARROW_EXTRA, has_pyarrow
from dist_moe.errors import UserError, reason_of
from dist_moe.moe.records import RouterRecord

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

FOLDER, REPLACED = "trace", "replaced"
TABLES = ("loads", "tokens")
VERSION = b"1"
_FILE = re.compile(r"step-(\d{8})-rank-(\d{5})\.parquet")
_VERSION_KEY = b"dist_moe.trace"


class Trace(NamedTuple):
    """The routing of the recorded steps of a run.

    Attributes:
        loads: A row for each step, layer and sequence: step, layer, rank, group (the expert-parallel group of the rank,
            whose ranks compute together), micro_batch, sequence (its number in the stream of the run), tokens (without
            padding), load (E counts of assignments).
        tokens: A row for each step, layer and sampled token: step, layer, rank, group, micro_batch, sequence, position
            (in the sequence), token (its id), domain, experts and weights (the experts that it took and their gate
            weights, in the order of the router).
    """

    loads: "pa.Table"
    tokens: "pa.Table"


class TokensOfBatch(NamedTuple):
    """The tokens of a micro-batch, on the CPU.

    Attributes:
        tokens_BS: int64, token ids.
        present_BS: bool, false at padding.
        domains_BS: int64, indices of domains; None for a text without domains.
    """

    tokens_BS: Tensor
    present_BS: Tensor
    domains_BS: Tensor | None


def schemas() -> dict[str, "pa.Schema"]:
    """Return the columns of both tables."""
    import pyarrow as pa

    place = [("step", pa.int64()), ("layer", pa.int32()), ("rank", pa.int32()), ("group", pa.int32())]
    place += [("micro_batch", pa.int32()), ("sequence", pa.int64())]
    of_load = [("tokens", pa.int32()), ("load", pa.list_(pa.int32()))]
    of_token = [("position", pa.int32()), ("token", pa.int32()), ("domain", pa.string())]
    of_token += [("experts", pa.list_(pa.int32())), ("weights", pa.list_(pa.float32()))]
    return {
        "loads": pa.schema([*place, *of_load], {_VERSION_KEY: VERSION}),
        "tokens": pa.schema([*place, *of_token], {_VERSION_KEY: VERSION}),
    }


class TraceRecorder:
    """Records the routing of sampled steps of this rank, into files of its own. Every rank has one.

    A resumed run records some steps again: when it starts, files of later steps than its checkpoint are moved into the
    folder `replaced`. Files that cannot be written are lost, with a warning in the log.

    Args:
        folder: run.dir.
        mesh: The layout of the ranks.
        interval: Optimizer steps between recorded steps.
        tokens: Tokens of each sequence whose experts are recorded; the same ones for any layout.
        domains: Names of the domains, by their index.
        steps_done: Optimizer steps before this process.
    """

    def __init__(
        self, folder: Path, mesh: Mesh, interval: int, tokens: int, domains: Sequence[str], steps_done: int = 0
    ) -> None:
        self.folder = folder / FOLDER
        self._mesh, self._interval, self._tokens, self._domains = mesh, interval, tokens, domains
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._step = self._micro_batch = 0
        self._failed = False
        try:
            self._move_repeated_steps(steps_done)
        except OSError as error:
            self._warn(error)

    def is_due(self, step: int) -> bool:
        """Return whether a step is recorded; the first one of a run is."""
        return step == 1 or step % self._interval == 0

    def begin(self, step: int) -> None:
        """Begin to record a step."""
        self._step, self._micro_batch = step, 0
        self._rows = {table: [] for table in TABLES}

    def finish(self, step: int, taken: bool) -> None:
        """Write the files of a step, unless it was skipped."""
        rows, self._rows = self._rows, {}
        if not taken:
            return
        try:
            for table, of_table in rows.items():
                self._write(table, step, of_table)
        except OSError as error:
            self._warn(error)
            return
        self._failed = False

    def add(self, batch: TokensOfBatch, sequences: Sequence[int], records: Sequence[RouterRecord]) -> None:
        """Record the next micro-batch of the step.

        Args:
            batch: Its tokens.
            sequences: B numbers of its sequences in the stream of the run.
            records: Of the router of each layer.
        """
        place = {"step": self._step, "micro_batch": self._micro_batch}
        place |= {"rank": self._mesh.rank, "group": self._mesh.edp_rank}
        self._micro_batch += 1
        tokens_B = batch.present_BS.sum(dim=1).tolist()
        sampled = [self._positions(batch, row, sequence) for row, sequence in enumerate(sequences)]
        for layer, record in enumerate(records):
            load_BE = count_sequences(record.ids_TK, len(sequences), record.logits_TE.shape[1]).cpu().numpy()
            at = {**place, "layer": layer}
            of_sequences = {"sequence": np.asarray(sequences), "tokens": tokens_B, "load": load_BE}
            self._rows["loads"].append({**at, **of_sequences})
            if sum(map(len, sampled)):
                self._rows["tokens"].append({**at, **self._of_tokens(batch, sequences, sampled, record)})

    def _of_tokens(
        self, batch: TokensOfBatch, sequences: Sequence[int], sampled: Sequence[np.ndarray], record: RouterRecord
    ) -> dict[str, Any]:
        rows = np.repeat(np.arange(len(sequences)), [len(positions) for positions in sampled])
        positions = np.concatenate(sampled)
        index = torch.from_numpy(rows * batch.tokens_BS.shape[1] + positions)
        ids_TK = record.ids_TK[index.to(record.ids_TK.device)].cpu().numpy()
        weights_TK = record.weights_TK.detach()[index.to(record.ids_TK.device)].float().cpu().numpy()
        domains = [-1] * len(index) if batch.domains_BS is None else batch.domains_BS.reshape(-1)[index].tolist()
        return {
            "sequence": np.asarray(sequences)[rows],
            "position": positions,
            "token": batch.tokens_BS.reshape(-1)[index].numpy(),
            "domain": [None if domain < 0 else self._domains[domain] for domain in domains],
            "experts": [row[row >= 0] for row in ids_TK],
            "weights": [weights[row >= 0] for row, weights in zip(ids_TK, weights_TK, strict=True)],
        }

    def _positions(self, batch: TokensOfBatch, row: int, sequence: int) -> np.ndarray:
        """Return the positions of a sequence that are recorded: random ones, chosen by its number in the stream."""
        present = np.flatnonzero(batch.present_BS[row].numpy())
        count = min(self._tokens, len(present))
        return np.sort(np.random.default_rng(sequence).choice(present, count, replace=False))

    def _write(self, table: str, step: int, rows: Sequence[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = schemas()[table]
        path = self.folder / table / f"step-{step:08d}-rank-{self._mesh.rank:05d}.parquet"
        parts = [_arrow_table(part, schema) for part in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            pq.write_table(pa.concat_tables(parts) if parts else schema.empty_table(), temporary, compression="zstd")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _move_repeated_steps(self, steps_done: int) -> None:
        """Move the files of later steps away, those of this rank, and of ranks that no longer exist."""
        for table in TABLES:
            for path, step, rank in _files(self.folder / table):
                if step > steps_done and rank % self._mesh.world_size == self._mesh.rank:
                    aside = self.folder / REPLACED / table
                    aside.mkdir(parents=True, exist_ok=True)
                    path.replace(aside / path.name)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            logger.warning(
                "cannot write %s (%s); training continues, and its trace has a gap", self.folder, reason_of(error)
            )
        self._failed = True


def count_sequences(ids_TK: Tensor, sequences: int, experts: int) -> Tensor:
    """Count the assignments of each sequence of a micro-batch -> [B, E] int64.

    Args:
        ids_TK: int64, the sequences one after the other; -1 is an empty slot.
        sequences: B.
        experts: E.
    """
    ids_BN = ids_TK.reshape(sequences, -1) + 1
    first_B1 = torch.arange(sequences, device=ids_TK.device).unsqueeze(1) * (experts + 1)
    return count_values((ids_BN + first_B1).reshape(-1), sequences * (experts + 1)).view(sequences, -1)[:, 1:]


def read_trace(path: str | Path) -> Trace:
    """Read the trace of a run, all its recorded steps.

    Args:
        path: run.dir.

    Raises:
        UserError: There is no trace, a file of it is damaged or of another version, or pyarrow is not installed.
    """
    folder = Path(path) / FOLDER
    if not has_pyarrow():
        raise UserError(f"{folder} is in Parquet files, for which pyarrow is not installed; {ARROW_EXTRA}")
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {}
    for table, schema in schemas().items():
        parts = []
        for file, _, _ in _files(folder / table):
            try:
                part = pq.read_table(file)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{file} cannot be read ({reason_of(error)}); move it away to read the rest") from None
            if part.schema != schema or (part.schema.metadata or {}).get(_VERSION_KEY) != VERSION:
                raise UserError(f"{file} is not a trace of version {VERSION.decode()}; move it away to read the rest")
            parts.append(part)
        if not parts:
            raise UserError(f"{folder / table} has no file; train with observe.trace_interval above 0")
        tables[table] = pa.concat_tables(parts)
    return Trace(**tables)


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """Return the files of a table with their step and rank, in order."""
    matches = [(path, _FILE.fullmatch(path.name)) for path in folder.glob("step-*.parquet")]
    return sorted((path, int(match[1]), int(match[2])) for path, match in matches if match is not None)


def _arrow_table(columns: dict[str, Any], schema: "pa.Schema") -> "pa.Table":
    """Return a table; a column that has one value for all rows is repeated."""
    import pyarrow as pa

    rows = len(columns["sequence"])

    def values(name: str) -> Any:
        value = columns[name]
        return [value] * rows if isinstance(value, int) else list(value)

    return pa.table([pa.array(values(field.name), field.type) for field in schema], schema)
