import socket

import pytest

from chaos.ports import PORTS, PROBES, free_ports


def test_the_ports_are_different_and_can_be_listened_on() -> None:
    ports = free_ports(20, "127.0.0.1")
    assert len(set(ports)) == 20
    assert all(port in PORTS for port in ports)
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports[0]))
        server.listen()


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(OSError, match="no 501 free ports between 20000 and 32767"):
        free_ports(PROBES + 1)
