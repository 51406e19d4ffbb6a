"""What a connection asks of the system, where it says how far the other end is, and where not."""

import socket
from collections.abc import Iterator

import pytest

from replication import stream as stream_module
from replication.stream import SEND_BUFFER_BYTES, Stream


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        yield near, far


def send_buffer_bytes(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def test_little_is_queued_for_an_end_that_is_near(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "NEAR_S", 10.0)  # a busy machine's loopback may be slow
    before = send_buffer_bytes(pair[0])
    Stream(pair[0]).keep_backlog_short()
    assert send_buffer_bytes(pair[0]) == 2 * SEND_BUFFER_BYTES != before  # Linux doubles it


def test_an_end_that_is_far_has_what_the_system_gives(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "NEAR_S", 0.0)
    before = send_buffer_bytes(pair[0])
    Stream(pair[0]).keep_backlog_short()
    assert send_buffer_bytes(pair[0]) == before


def test_without_the_word_of_the_system_nothing_changes(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = send_buffer_bytes(pair[0])
    monkeypatch.setattr(stream_module, "MIN_RTT_AT", 1000)  # an older kernel says less
    Stream(pair[0]).keep_backlog_short()
    monkeypatch.delattr(socket, "TCP_INFO")
    Stream(pair[0]).keep_backlog_short()
    assert send_buffer_bytes(pair[0]) == before
