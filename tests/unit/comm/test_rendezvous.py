"""The rendezvous of several hosts against a stranger who reaches its store, and where it listens."""

import pickle
from base64 import b64encode
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousStateError

from dist_moe.comm.rendezvous import AuthenticatedBackend, create_rendezvous
from dist_moe.worker.contract import BACKEND, SECRET_VARIABLE
from dist_moe.worker.network import free_port


class Bomb:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_rendezvous_of_several_hosts_never_unpickles_what_a_stranger_puts_there(tmp_path: Path) -> None:

    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    mine, other = (AuthenticatedBackend(store, "job", b"secret") for _ in range(2))
    assert mine.get_state() is None
    state = mine.set_state(b"state")
    assert state is not None and state[2]
    found = other.get_state()
    assert found is not None and found[0] == b"state"
    thief = AuthenticatedBackend(store, "job", b"another")
    with pytest.raises(RendezvousStateError):
        thief.get_state()

    store.set("torch.rendezvous.job", b64encode(pickle.dumps(Bomb(tmp_path / "struck"))).decode())
    with pytest.raises(RendezvousStateError, match="close its port to others"):
        mine.get_state()
    with pytest.raises(RendezvousStateError):
        mine.set_state(b"new", found[1])
    assert not (tmp_path / "struck").exists()


def test_the_rendezvous_of_several_hosts_listens_on_one_address(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv(SECRET_VARIABLE, "00" * 32)
    port = free_port()
    before = listening()
    parameters = RendezvousParameters(BACKEND, f"127.0.0.1:{port}", "job", 1, 1, "127.0.0.1", is_host="1")
    handler = create_rendezvous(parameters)
    assert listening() - before == {("127.0.0.1", port)}
    assert handler.get_backend() == BACKEND


def listening() -> set[tuple[str, int]]:
    """Where this process listens."""
    own = psutil.Process().net_connections("inet")
    return {(each.laddr.ip, each.laddr.port) for each in own if each.status == psutil.CONN_LISTEN}
