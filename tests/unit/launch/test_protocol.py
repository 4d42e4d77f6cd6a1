"""The messages between a launch and its workers' agents, as bytes."""

import socket

from dist_moe.launch.supervise.protocol import MessageSocket, Rendezvous


def test_rendezvous_is_parsed_from_its_string() -> None:
    rendezvous = Rendezvous("10.0.0.1", 1234, "s-e_cret")
    assert Rendezvous.parse(str(rendezvous)) == rendezvous


def test_message_socket_joins_messages_that_arrive_in_parts() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()) as sender:
        receiver = MessageSocket(server.accept()[0])
        sender.sendall(b'{"a": 1}\n{"b"')
        assert receiver.receive() == [{"a": 1}]
        sender.sendall(b": 2}\n")
        assert receiver.receive() == [{"b": 2}]
        receiver.close()
