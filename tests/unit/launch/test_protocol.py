"""The messages between a launch and its workers' agents, as bytes."""

import socket

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
