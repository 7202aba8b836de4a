"""Listening: addresses, ports in use, and what the person is told."""

from __future__ import annotations

import socket

import pytest

from edgetune.errors import InputError
from edgetune.serve.server import _warn_if_open, bind, url


def test_a_free_port() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert listener.getsockname()[1] > 0


def test_port_in_use() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(InputError, match=r"in use(.|\n)*--port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_a_port_is_free_again_at_once() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = first.accept()
        accepted.close()  # the side that closes first leaves the port in TIME_WAIT
        client.close()
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "x" * 80])
def test_wrong_address(host: str) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1"):
        bind(host, 0)


def test_open_to_others(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("0.0.0.0", 0) as listener:
        _warn_if_open(listener)
        assert url(listener).startswith("http://127.0.0.1:")
    assert "no authentication" in capsys.readouterr().err
    with bind("127.0.0.2", 0) as listener:
        _warn_if_open(listener)
    assert capsys.readouterr().err == ""
