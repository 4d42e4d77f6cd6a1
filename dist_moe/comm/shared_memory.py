"""Shared memory between the ranks of a group on one host, through which rows are exchanged without the network.

Each rank has two buffers, which it alone writes, alternately: one exchange after the other. It copies the rows for the
others into a buffer, and sends each of them, by an all-to-all of a few numbers, where its rows are. A rank that has
received such a message from all others may read their buffers. When it writes to a buffer again, two exchanges later,
the others have read it: each reads before it sends the message of the exchange between.

A buffer is a memfd of Linux. The others open it through /proc, where a user's files are hidden from other users. It has
no name, and its memory is freed with the last process that maps it. It has to live until all ranks have made a later
collective call. It grows with the largest exchange, and does not shrink.
"""

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import socket
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.errors import reason_of
from dist_moe.text import counted, format_bytes

logger = logging.getLogger(__name__)

NAME = "dist_moe"
"""Of each memfd, as /proc shows it."""
ALIGNMENT = 64
"""Bytes: of a cache line."""
GROWTH = 1.25
"""A buffer that is too small is replaced by one with room for so many times what is needed."""
HEADER = 3
"""Numbers of a message before those of the tensors."""
SPACE = (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid"), Path("/proc/self/ns/net"))
"""What two processes have in common that see each other's files in /proc, and reach each other over no network."""


class Buffer:
    """Memory that this rank writes.

    Args:
        capacity: In bytes.

    Attributes:
        descriptor: Of its memfd.
        bytes_C: uint8 [capacity].

    Raises:
        OSError: There is no memory for it.
    """

    def __init__(self, capacity: int) -> None:
        self.descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
        # What other ranks have mapped stays.
        weakref.finalize(self, os.close, self.descriptor)
        os.posix_fallocate(self.descriptor, 0, capacity)  # without it, a write could end the process
        self.bytes_C = _map(self.descriptor, capacity)


class SharedBuffers:
    """The buffers of the ranks of a group.

    Args:
        rank: This rank in the group.
        pids: The process of each rank.

    Raises:
        OSError: There is no memory for the buffers of this rank.
    """

    def __init__(self, rank: int, pids: Sequence[int]) -> None:
        self._rank, self._pids = rank, pids
        self._buffers = [Buffer(mmap.PAGESIZE), Buffer(mmap.PAGESIZE)]
        self._mapped: dict[tuple[int, int], tuple[list[int], Tensor]] = {}
        self._index, self._in_flight = 0, False
        self._refused: int | None = None  # bytes for which there was no memory

    def write(self, tensors: Sequence[Tensor], send: Sequence[int]) -> Tensor:
        """Copy rows for the other ranks into the next buffer.

        Args:
            tensors: Rows ordered by receiving rank; contiguous.
            send: send[p] rows of each tensor go to rank p.

        Returns:
            int64 [P, 3 + tensors], the message for each rank: number, descriptor and capacity of the buffer, and the
            byte at which its rows of each tensor begin. The capacity is 0 where there is no memory for the rows.

        Raises:
            RuntimeError: The rows of the previous `write` have not been read.
        """
        if self._in_flight:
            raise RuntimeError(
                "a second exchange was started on these buffers before the first was finished; call its finish() first"
            )
        self._index, self._in_flight = 1 - self._index, True
        messages_PM = torch.zeros(len(self._pids), HEADER + len(tensors), dtype=torch.int64)
        blocks = [
            (rank, HEADER + index, rows)
            for index, tensor in enumerate(tensors)
            for rank, rows in enumerate(tensor.split(list(send)))
            if rank != self._rank
        ]
        buffer = self._buffer_with(sum(_aligned(rows.nbytes) for _, _, rows in blocks))
        if buffer is not None:
            messages_PM[:, :HEADER] = torch.tensor([self._index, buffer.descriptor, len(buffer.bytes_C)])
            start = 0
            for rank, column, rows in blocks:
                messages_PM[rank, column] = start
                _rows_at(buffer.bytes_C, start, rows).copy_(rows)
                start += _aligned(rows.nbytes)
        return messages_PM

    def read(
        self,
        messages_PM: Tensor,
        sent: Sequence[Tensor],
        send: Sequence[int],
        receive: Sequence[int],
        received: Sequence[Tensor],
    ) -> bool:
        """Copy rows to `received`, ordered by sending rank; each `write` needs one before the next.

        Args:
            messages_PM: What `write` returned on each rank for this one.
            sent: The tensors of this rank, some of whose rows stay.
            send: As for `write`.
            receive: receive[p] rows of each tensor come from rank p.
            received: Where they go, for each tensor.

        Returns:
            Whether they are there; False where a rank had no memory for its rows.

        Raises:
            RuntimeError: The buffer of another rank cannot be opened, as after its end.
        """
        self._in_flight = False
        if not bool((messages_PM[:, HEADER - 1] > 0).all()):
            return False
        messages = messages_PM.tolist()
        for index, (here, there) in enumerate(zip(sent, received, strict=True)):
            for rank, rows in enumerate(there.split(list(receive))):
                if rank == self._rank:
                    rows.copy_(here.split(list(send))[rank])
                elif rows.numel():
                    buffer_C = self._mapped_buffer(rank, messages[rank][:HEADER])
                    rows.copy_(_rows_at(buffer_C, messages[rank][HEADER + index], rows))
        return True

    def _buffer_with(self, needed: int) -> Buffer | None:
        """Return the next buffer, replaced if it has too little room; None where there is no memory."""
        buffer = self._buffers[self._index]
        if needed <= len(buffer.bytes_C):
            return buffer
        if self._refused is not None and needed >= self._refused:
            return None
        try:
            larger = Buffer(int(needed * GROWTH))
        except OSError as error:
            if self._refused is None:
                logger.warning(
                    "no shared memory for %s of rows (%s): where as much is exchanged, rows take the network, which is "
                    "slower; give the workers more memory, or set parallel.shared_memory=false",
                    format_bytes(needed),
                    reason_of(error),
                )
            self._refused = needed
            return None
        self._buffers[self._index] = larger
        return larger

    def _mapped_buffer(self, rank: int, header: list[int]) -> Tensor:
        """Return a buffer of another rank, mapped once; one that replaces it has more capacity."""
        index, descriptor, capacity = header
        known = self._mapped.get((rank, index))
        if known is None or known[0] != header:
            try:
                known = header, _map_of(self._pids[rank], descriptor, capacity)
            except OSError as error:
                raise RuntimeError(
                    f"the rows of rank {rank} of the group in shared memory cannot be read ({reason_of(error)}); if "
                    "its process has ended, its own error is the cause, otherwise set parallel.shared_memory=false"
                ) from error
            self._mapped[rank, index] = known
        return known[1]


def open_shared_buffers(group: dist.ProcessGroup) -> SharedBuffers | None:
    """Return the buffers of the ranks of a group; None where these cannot share memory. A collective call.

    Args:
        group: A process group for tensors on the CPU.
    """
    own_2 = torch.tensor([os.getpid(), _space()])
    all_P2 = [torch.empty_like(own_2) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_P2, own_2, group=group)
    pids, spaces = torch.stack(all_P2).t().tolist()
    if 0 in spaces or len(set(spaces)) > 1:
        return None
    buffers = None
    messages_PM, ones = torch.zeros(len(pids), HEADER + 1, dtype=torch.int64), [1] * len(pids)
    sent_P1 = torch.full((len(pids), 1), os.getpid())
    with contextlib.suppress(OSError):
        buffers = SharedBuffers(dist.get_rank(group), pids)
        messages_PM = buffers.write([sent_P1], ones)
    arrived_PM, received_P1 = torch.empty_like(messages_PM), torch.zeros_like(sent_P1)
    dist.all_to_all_single(arrived_PM, messages_PM, group=group)
    if buffers is not None:
        with contextlib.suppress(RuntimeError):
            buffers.read(arrived_PM, [sent_P1], ones, ones, [received_P1])
    works = torch.tensor(int(received_P1.squeeze(1).tolist() == pids))
    dist.all_reduce(works, dist.ReduceOp.MIN, group=group)
    logger.info("rows of %s go through %s", counted(len(pids), "rank"), "shared memory" if works else "the network")
    return buffers if works else None


def _space() -> int:
    """Return a number that is equal for processes that can share memory; 0 where no process can."""
    if not hasattr(os, "memfd_create"):
        return 0
    try:
        names = [socket.gethostname(), SPACE[0].read_text(), *(os.readlink(path) for path in SPACE[1:])]
    except OSError:
        return 0
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return int.from_bytes(digest[:7]) | 1


def _map_of(pid: int, descriptor: int, capacity: int) -> Tensor:
    """Map a buffer of another process.

    Raises:
        OSError: It cannot be opened, or is another file: where /proc shows other processes than those of this PID
            namespace, the number may be that of a stranger.
    """
    path = f"/proc/{pid}/fd/{descriptor}"
    if not os.readlink(path).startswith(f"/memfd:{NAME}"):
        raise OSError(errno.ENXIO, "it is not a buffer of dist_moe", path)
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(opened).st_size != capacity:
            raise OSError(errno.ENXIO, f"it has not {capacity} bytes", path)
        return _map(opened, capacity)
    finally:
        os.close(opened)


def _map(descriptor: int, capacity: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, capacity), dtype=torch.uint8)


def _rows_at(bytes_C: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the memory at a byte of a buffer as rows of the shape and dtype of `like`."""
    return bytes_C[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
