"""Addresses, interfaces and ports of this host."""

import socket
from pathlib import Path

import pytest

from dist_moe.worker import network
from dist_moe.worker.network import (
    LOOPBACK,
    NetworkError,
    free_port,
    interface_of,
    is_local_address,
    source_address,
)


def test_free_port_is_free_and_not_one_for_outgoing_connections() -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind((LOOPBACK, port))
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port >= 10000
    assert port < ephemeral or ephemeral <= 12000


def test_free_port_skips_ports_in_use_and_fails_where_none_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        used, free = listener.getsockname()[1], free_port()
        monkeypatch.setattr(network.random.SystemRandom, "sample", lambda *_, **__: [used, free])
        assert free_port() == free
        monkeypatch.setattr(network.random.SystemRandom, "sample", lambda *_, **__: [used, used])
        with pytest.raises(NetworkError, match=r"none of 100 ports tried from 10000 to .* is free; end other jobs"):
            free_port()


@pytest.mark.parametrize("name", [LOOPBACK, "localhost"])
def test_source_address_of_this_host_is_its_own(name: str) -> None:
    assert source_address(name) == LOOPBACK


def test_is_local_address() -> None:
    assert is_local_address(LOOPBACK)
    assert not is_local_address("192.0.2.1"), "an address for documentation (RFC 5737)"
    assert not is_local_address("no such host.invalid")


def test_interface_of() -> None:
    assert interface_of(LOOPBACK) == "lo"
    assert interface_of("192.0.2.1") is None


def test_interface_of_a_secondary_address_has_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    labeled = {"eth0:1": network.psutil.net_if_addrs()["lo"]}
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: labeled)
    assert interface_of(LOOPBACK) == "eth0"
