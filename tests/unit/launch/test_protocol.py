"""The messages between a launch and its workers' agents, as bytes."""

import socket

import psutil
import pytest

from dist_moe.errors import UserError
from dist_moe.launch.supervise.protocol import MessageSocket, Rendezvous


def test_rendezvous_is_parsed_from_its_string() -> None:
    rendezvous = Rendezvous("10.0.0.1", 1234, "s-e_cret")
    assert Rendezvous.parse(str(rendezvous)) == rendezvous


@pytest.mark.parametrize(
    "text", ["tcp://garbage", "", "garbage", "tcp://t@a:", "tcp://t@a:0", "tcp://t@a:65536", "tcp://@a:1", "tcp://t@:1"]
)
def test_what_is_no_rendezvous_is_an_error_with_a_remedy(text: str) -> None:
    with pytest.raises(UserError, match="unset it, or start the job by `dist-moe launch`") as error:
        Rendezvous.parse(text)
    assert "garbage" not in str(error.value), "it may be a secret"


def test_message_socket_joins_messages_that_arrive_in_parts() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()) as sender:
        receiver = MessageSocket(server.accept()[0])
        sender.sendall(b'{"a": 1}\n{"b"')
        assert receiver.receive() == [{"a": 1}]
        sender.sendall(b": 2}\n")
        assert receiver.receive() == [{"b": 2}]
        receiver.close()


@pytest.mark.parametrize("loopback", [True, False])
def test_a_peer_on_this_host_is_not_given_up_while_it_is_suspended(loopback: bool) -> None:
    """TCP_USER_TIMEOUT ends a connection whose peer takes nothing for that time, also where its host answers."""
    address = "127.0.0.1" if loopback else own_address()
    with socket.create_server((address, 0)) as server, socket.create_connection(server.getsockname()) as connection:
        message_socket = MessageSocket(connection)
        limit_ms = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        alive = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert (limit_ms, bool(alive)) == ((0, False) if loopback else (30_000, True))
        message_socket.close()


def own_address() -> str:
    """An address of this host other than the loopback's."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return each.address
    pytest.skip("this host has the loopback alone")
