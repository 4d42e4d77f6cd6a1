"""Values that ranks exchange: each arrives as it was, and nothing but a value of the expected type is accepted."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as some

from dist_moe.checkpoint.async_saver import Written
from dist_moe.checkpoint.changes import Change
from dist_moe.checkpoint.format.manifest import FileEntry, Manifest
from dist_moe.checkpoint.resume import AcceptedCheckpoint, Candidates
from dist_moe.checkpoint.training_state import Counters
from dist_moe.comm import objects
from dist_moe.comm.objects import LARGEST_BYTES, ExchangeError, all_gather_objects, check_sizes, decode_all, encode
from dist_moe.doctor.estimates import MemoryNeed
from dist_moe.errors import ABSENT
from dist_moe.health.nonfinite import NonFiniteFinding, Origin
from tests.collectives import counted
from tests.dist.pool import RankPool
from tests.unit.comm.test_rendezvous import Bomb

NAME = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
ENTRY = FileEntry(bytes=2**40, xxh3_128="0" * 32)
COUNTERS = Counters(
    step=7,
    taken=6,
    controller=(0.1, -0.0, 1e-300, 2.0),
    corpus=NAME,
    workers=2,
    expert_parallel=2,
    zero_stage=1,
    bf16=True,
)
VALUES: dict[str, tuple[Any, Any]] = {
    "none": (None, NoneType),
    "bool": (True, bool),
    "text": ("", str),
    "a name that is not UTF-8": (NAME, str),
    "surrogates that are not a pair": ("\ud83d\ude00 \U0001f600 \0\n", str),
    "integers": ((2**63 - 1, -(2**63), 2**200), tuple[int, int, int]),
    "floats": ((math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1), tuple[float, ...]),
    "bytes": (bytes(range(256)), bytes),
    "bytes inside": ({NAME: (b"\x80", None)}, dict[str, tuple[bytes, bytes | None]]),
    "versions": ({"torch": "2.0", NAME: None}, dict[str, str | None]),
    "memory": ([MemoryNeed(NAME, 2**60, 0), MemoryNeed("", 0, 1)], list[MemoryNeed]),
    "finding": (NonFiniteFinding(Origin("forward", 1, 2), (NAME, "b")), NonFiniteFinding),
    "no finding": (NonFiniteFinding(None), NonFiniteFinding),
    "digests": (({NAME: -(2**63)}, {}), tuple[dict[str, int], dict[str, int]]),
    "written": ((Written({NAME: ENTRY}, math.inf), 0.5), tuple[Written, float]),
    "manifest": (Manifest(format=2, step=3, files={NAME: ENTRY}), Manifest | None),
    "candidates": (Candidates("auto", [Path("/", NAME)], [NAME]), Candidates | None),
    "accepted": (
        AcceptedCheckpoint(COUNTERS, [Change("data", ABSENT, [1, "absent", None])]),
        AcceptedCheckpoint | str | None,
    ),
    "refused": (NAME, AcceptedCheckpoint | str | None),
    "a failure": ((NAME, None), tuple[str, None] | tuple[None, int]),
    "a result": ((None, 3), tuple[str, None] | tuple[None, int]),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_arrives_as_it_was(name: str) -> None:
    value, kind = VALUES[name]
    (arrived,) = decode_all([encode(value)], kind)
    assert (repr(arrived), type(arrived)) == (repr(value), type(value))  # NaN differs from itself


@given(
    some.dictionaries(
        some.text(some.characters(categories=None)),
        some.tuples(some.integers(), some.floats(), some.text(some.characters(categories=None)), some.binary()),
    )
)
def test_any_text_number_and_bytes_arrive_as_they_were(value: dict[str, tuple[int, float, str, bytes]]) -> None:
    (arrived,) = decode_all([encode(value)], dict[str, tuple[int, float, str, bytes]])
    assert repr(arrived) == repr(value)


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b'"5"', int, "not of type int (it changes when it is converted)"),
        (b"1", bool, "not of type bool (it changes when it is converted)"),
        (b"1.0", int, "not of type int (it changes when it is converted)"),
        (b"5", str, "not of type str (Input should be a valid string)"),
        (b"null", str, "not of type str (Input should be a valid string)"),
        (b"[1]", tuple[str, int], "not of type tuple[str, int] (0: Input should be a valid string)"),
        (b'["a", 1, 2]', tuple[str, int], "Tuple should have at most 2 items"),
        (b'{"origin": null}', NonFiniteFinding, "not of type NonFiniteFinding (it changes when it is converted)"),
        (b'{"origin": {"what": 1}, "documents": []}', NonFiniteFinding, "origin.what: Input should be a valid string"),
        (b'{"a": 1, "a": 1}', dict[str, int], "it changes when it is converted"),
        (b"[null, null]", tuple[str, None] | tuple[None, int], "Input should be a valid"),
        (b"", str, "it is not JSON"),
        (b"\xff", str, "it is not JSON"),
        (b"[" * 100_000, str, "it is not JSON"),
        (b"1" * 5000, int, "it is not JSON"),
        (b'"a" ', str, "it changes when it is converted"),
    ],
)
def test_a_value_of_another_shape_is_refused(content: bytes, kind: Any, reason: str) -> None:
    with pytest.raises(ExchangeError) as caught:
        decode_all([encode(VALUES["finding"][0]) if kind is NonFiniteFinding else content, content], kind)
    message = str(caught.value)
    assert reason in message and "run the same dist-moe on every host" in message
    assert f"rank {int(kind is NonFiniteFinding)} sent" in message and message.isprintable()


def test_what_cannot_be_sent_is_refused_where_it_is() -> None:
    with pytest.raises(TypeError, match="a set cannot be sent to other ranks"):
        encode({1})


@pytest.mark.parametrize("size", [LARGEST_BYTES + 1, 2**62, 0, -1])
def test_an_announced_size_is_bounded(size: int) -> None:
    check_sizes([1, LARGEST_BYTES])
    with pytest.raises(ExchangeError, match=rf"rank 1 announced a value of {size:,} bytes, and ranks accept 1 to"):
        check_sizes([1, size])


def exchanged(rank: int, world_size: int) -> tuple[list[list[Any]], int]:
    """Every value, from both ranks, and the number of collectives; the lengths differ between ranks."""
    with counted("all_gather") as calls:
        found = [all_gather_objects(value, kind) for value, kind in VALUES.values()]
        found.append(all_gather_objects("x" * (10_000 * rank), str))
    return found, len(calls)


def test_ranks_exchange_each_value_in_two_collectives(ranks: RankPool) -> None:
    expected = [[value, value] for value, _ in VALUES.values()] + [["", "x" * 10_000]]
    for found, collectives in ranks.run(exchanged, 2):
        assert repr(found) == repr(expected)
        assert collectives == 2 * len(expected)


def with_a_peer_s(rank: int, world_size: int, content: Callable[[], bytes]) -> tuple[str, int]:
    """What a rank reports, and after how many collectives, where the last one sends other bytes."""
    send = objects._all_gather_bytes
    sent = content() if rank == world_size - 1 else encode("own")
    with (
        patch.object(objects, "_all_gather_bytes", lambda own, *place: send(sent, *place)),
        counted("all_gather") as calls,
        pytest.raises(ExchangeError) as caught,
    ):
        all_gather_objects("own", str)
    return str(caught.value), len(calls)


class Pickled:
    """Gives a pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> bytes:
        return pickle.dumps(Bomb(self.path))


def too_large() -> bytes:
    """More than ranks accept."""
    return b" " * (LARGEST_BYTES + 1)


def test_a_pickle_of_a_peer_is_refused_on_every_rank_and_does_not_run(ranks: RankPool, tmp_path: Path) -> None:
    for message, collectives in ranks.run(with_a_peer_s, 2, Pickled(tmp_path / "struck")):
        assert message.startswith("rank 1 sent a value that is not of type str (it is not JSON") and collectives == 2
    assert not (tmp_path / "struck").exists()
    pickle.loads(Pickled(tmp_path / "struck")())
    assert (tmp_path / "struck").exists()


def test_a_value_that_is_too_large_is_refused_before_it_is_received(ranks: RankPool) -> None:
    for message, collectives in ranks.run(with_a_peer_s, 2, too_large):
        assert message.startswith("rank 1 announced a value of 16,777,217 bytes") and collectives == 1
