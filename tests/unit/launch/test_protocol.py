"""What goes between a launch and its workers' minders, as bytes."""

import socket

from dist_moe.launch.supervise.protocol import MessageSocket, Rendezvous


def test_a_meeting_is_read_as_it_is_written() -> None:
    rendezvous = Rendezvous("10.0.0.1", 1234, "s-e_cret")
    assert Rendezvous.parse(str(rendezvous)) == rendezvous


def test_messages_come_whole_though_they_travel_in_parts() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()) as sender:
        line = MessageSocket(server.accept()[0])
        sender.sendall(b'{"a": 1}\n{"b"')
        assert line.receive() == [{"a": 1}]
        sender.sendall(b": 2}\n")
        assert line.receive() == [{"b": 2}]
        line.close()
