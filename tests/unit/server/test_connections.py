"""The socket."""

import socket

import pytest

from moemerge.errors import Busy, InvalidRecipe
from moemerge.server.connections import open_socket, url_of


def test_port_zero_takes_a_free_one():
    with open_socket("127.0.0.1", 0, 5.0) as first, open_socket("localhost", 0, 5.0) as second:
        assert first.getsockname()[1] != second.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{first.getsockname()[1]}"


def test_addresses_of_version_six_are_written_in_brackets():
    try:
        listener = open_socket("::1", 0, 5.0)
    except InvalidRecipe:
        pytest.skip("no IPv6 here")
    with listener:
        assert url_of(listener).startswith("http://[::1]:")


def test_taken_ports_and_foreign_addresses_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(Busy, match="--port"):
        open_socket("127.0.0.1", other.getsockname()[1], 5.0)
    with pytest.raises(InvalidRecipe, match="cannot listen"):
        open_socket("192.0.2.1", 0, 5.0)
    with pytest.raises(InvalidRecipe, match="no such address"):
        open_socket("a" * 300, 0, 5.0)
