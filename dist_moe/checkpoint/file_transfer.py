"""Checkpoints of hosts that share no storage: files go to rank 0's host when they are saved, and to all when opened."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.comm.mesh import Mesh, hosts_of_ranks

CHUNK_BYTES = 1 << 24


class Hosts(NamedTuple):
    """Whose disk is whose. names: the host of each rank."""

    names: tuple[str, ...]

    def is_host_leader(self, rank: int) -> bool:
        """Whether it is the first rank of its host, which does there what is done once."""
        return rank == self.names.index(self.names[rank])

    def is_remote(self, rank: int) -> bool:
        """Whether its host is not rank 0's."""
        return self.names[rank] != self.names[0]


def find_hosts(mesh: Mesh, shared: bool) -> Hosts:
    """The host of each rank, which is one and the same where storage is shared. A collective call, unless it is."""
    apart = not shared and mesh.world_size > 1
    return Hosts(tuple(hosts_of_ranks() if apart else [""] * mesh.world_size))


class FileTransfer(NamedTuple):
    """A file that one rank can read: its path below the folder, its size, and the rank."""

    name: str
    bytes: int
    owner: int


def broadcast_files(
    transfers: Sequence[FileTransfer], mesh: Mesh, device: torch.device, source: Path, target: Path | None
) -> None:
    """Copy files of the owners' folder `source` into `target` of every rank that gives one, chunk by chunk.

    A collective call, with the same parcels on all ranks. Errors: OSError, on this rank alone and after the last file.
    """
    failures = [_broadcast_file(transfer, mesh, device, source, target) for transfer in transfers]
    if failure := next(filter(None, failures), None):
        raise failure


def _broadcast_file(
    transfer: FileTransfer, mesh: Mesh, device: torch.device, source: Path, target: Path | None
) -> OSError | None:
    failure = read = write = None
    with contextlib.ExitStack() as stack:
        try:
            if mesh.rank == transfer.owner:
                read = stack.enter_context((source / transfer.name).open("rb"))
            elif target is not None:
                (target / transfer.name).parent.mkdir(parents=True, exist_ok=True)
                write = stack.enter_context((target / transfer.name).open("wb"))
        except OSError as error:
            failure = error
        for offset in range(0, transfer.bytes, CHUNK_BYTES):
            chunk = torch.zeros(min(CHUNK_BYTES, transfer.bytes - offset), dtype=torch.uint8, device=device)
            failure = _fill(chunk, read) or failure
            dist.broadcast(chunk, src=transfer.owner)
            failure = _put(chunk, write) or failure
    return failure


def _fill(chunk: Tensor, file: BinaryIO | None) -> OSError | None:
    """The next bytes of the file; the others take part whatever becomes of it."""
    try:
        content = file.read(chunk.numel()) if file is not None else b""
    except OSError as error:
        return error
    if content:
        chunk[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return None


def _put(chunk: Tensor, file: BinaryIO | None) -> OSError | None:
    try:
        if file is not None:
            file.write(chunk.cpu().numpy().data)
    except OSError as error:
        return error
    return None
