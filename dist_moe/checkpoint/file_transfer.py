"""Copies checkpoint files between hosts without shared storage: to rank 0's host on save, to all hosts on resume."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.manifest import is_safe_path
from dist_moe.comm.mesh import Mesh, hosts_of_ranks
from dist_moe.files import open_no_link

CHUNK_BYTES = 1 << 24


class Hosts(NamedTuple):
    """Which ranks share a disk.

    Attributes:
        names: The host of each rank; all are equal with shared storage.
    """

    names: tuple[str, ...]

    def is_host_leader(self, rank: int) -> bool:
        """Whether this is the first rank of its host, which does what is done once per host."""
        return rank == self.names.index(self.names[rank])

    def is_remote(self, rank: int) -> bool:
        """Whether the rank is on another host than rank 0."""
        return self.names[rank] != self.names[0]


def find_hosts(mesh: Mesh, shared: bool) -> Hosts:
    """The host of each rank. A collective call, unless storage is `shared`: then all ranks count as one host."""
    separate = not shared and mesh.world_size > 1
    return Hosts(tuple(hosts_of_ranks() if separate else [""] * mesh.world_size))


class FileTransfer(NamedTuple):
    """A file to copy: its path below the folder, its size, and the rank that can read it."""

    name: str
    bytes: int
    owner: int


def broadcast_files(
    transfers: Sequence[FileTransfer], mesh: Mesh, device: torch.device, source: Path, target: Path | None
) -> None:
    """Copy files of the owners' folder `source` into `target`, chunk by chunk. A collective call.

    Args:
        transfers: The same on every rank.
        mesh: The ranks.
        device: Of the collectives.
        source: The folder that the owners read.
        target: The folder that this rank writes; None where it needs no copy.

    Raises:
        CheckpointError: On every rank, if a name leads out of the folder. Names come from other ranks.
        OSError: On the rank that could not read or write, after the last file.
    """
    if outside := [transfer.name for transfer in transfers if not is_safe_path(transfer.name)]:
        raise CheckpointError(
            f"a rank names files outside of the checkpoint's folder: {outside}; do not trust its host"
        )
    failures = [_broadcast_file(transfer, mesh, device, source, target) for transfer in transfers]
    if failure := next(filter(None, failures), None):
        raise failure


def _broadcast_file(
    transfer: FileTransfer, mesh: Mesh, device: torch.device, source: Path, target: Path | None
) -> OSError | None:
    """Broadcast one file; a rank that fails still takes part in every collective."""
    failure = reader = writer = None
    with contextlib.ExitStack() as stack:
        try:
            if mesh.rank == transfer.owner:
                reader = stack.enter_context((source / transfer.name).open("rb"))
            elif target is not None:
                (target / transfer.name).parent.mkdir(parents=True, exist_ok=True)
                writer = stack.enter_context(open(target / transfer.name, "wb", opener=open_no_link))
        except OSError as error:
            failure = error
        for offset in range(0, transfer.bytes, CHUNK_BYTES):
            chunk = torch.zeros(min(CHUNK_BYTES, transfer.bytes - offset), dtype=torch.uint8, device=device)
            failure = _read_chunk(chunk, reader) or failure
            dist.broadcast(chunk, src=transfer.owner)
            failure = _write_chunk(chunk, writer) or failure
    return failure


def _read_chunk(chunk: Tensor, file: BinaryIO | None) -> OSError | None:
    """Fill `chunk` with the next bytes of the file; zeros remain where the file ends early or cannot be read."""
    try:
        content = file.read(chunk.numel()) if file is not None else b""
    except OSError as error:
        return error
    if content:
        chunk[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return None


def _write_chunk(chunk: Tensor, file: BinaryIO | None) -> OSError | None:
    try:
        if file is not None:
            file.write(chunk.cpu().numpy().data)
    except OSError as error:
        return error
    return None
