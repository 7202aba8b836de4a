"""From an artifact to a listening service, and down again within a second or two."""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from edgetune.errors import InputError
from edgetune.progress import say

_DRAIN_S = 1  # for answers that are under way when the service stops; they have been cancelled by then
_THREAD_S = 1.0  # for the model's thread after that
_BACKLOG = 128


def serve(
    path: Path,
    *,
    host: str,
    port: int,
    name: str | None,
    queue: int,
    system: str | None = None,
    prompt_cache: bool = False,
    threads: int | None,
    use_profile: bool = True,
    ready: Callable[[str, str], None],
) -> None:
    """Serve an artifact until Ctrl-C or SIGTERM. Blocks; to be called in the main thread.

    Args:
        path: the artifact's folder.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        name: the model's name for clients; the artifact's own when None.
        queue: how many requests may wait while one is answered.
        system: the system prompt of conversations that bring none; it is read before requests are taken.
        prompt_cache: keep on disk what conversations begin with, and take it up from there.
        threads: CPU threads for the model; the device profile's, or all cores, when None.
        use_profile: run it with the settings that `edgetune tune` measured on this machine, where it did.
        ready: called with the service's URL and the model's name once requests are taken.

    Raises:
        InputError: the port is in use, the address is not this machine's, the artifact is damaged.
    """
    from edgetune.leases import lease
    from edgetune.runtime.artifact import open_artifact
    from edgetune.runtime.session import Session
    from edgetune.serve.app import create_app

    with bind(host, port) as listener:
        _warn_if_open(listener)
        artifact = open_artifact(path)
        with lease(artifact.path, "edgetune serve"):
            session = Session(artifact, threads, use_profile=use_profile, prompt_cache=prompt_cache)
            model = name or artifact.name
            app = create_app(session, model, queue, system)
            Server(app, listener, lambda: ready(url(listener), model)).run_until_signal()
            ended = app.state.worker.close(timeout=_THREAD_S)
    say("stopped")
    if ended:
        session.close()
        return
    # The model is inside a call that was not interrupted in time. Port and lease are free, and there is nothing to
    # save: better to end here than to wait for it, or to free the model under it.
    os._exit(0)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`:`port` (0: a free port). Raises InputError with the cure."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(
            f"unknown address ({error})", where=host, fix="give this machine's address, or 127.0.0.1"
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere this would let two services share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            fix = "stop the other program, or choose another port (--port 0 picks a free one)"
            raise InputError("the port is in use", where=where, fix=fix) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            fix = "choose a port from 1024 up (--port 0 picks a free one)"
            raise InputError("no permission to use this port", where=where, fix=fix) from None
        if error.errno == errno.EADDRNOTAVAIL:
            fix = "give an address of this machine, or 127.0.0.1"
            raise InputError("this machine does not have this address", where=host, fix=fix) from None
        raise
    return listener


def url(listener: socket.socket) -> str:
    """The address for programs on this machine: `http://127.0.0.1:8080`."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


def _warn_if_open(listener: socket.socket) -> None:
    host = listener.getsockname()[0]
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        say(f"warning: listening on {host}: who reaches this machine can use the model (no authentication)")


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready, and gives up the running answers before it goes down."""

    def __init__(self, app: FastAPI, listener: socket.socket, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_DRAIN_S,
            )
        )
        self._app, self._listener, self._ready = app, listener, ready

    def run_until_signal(self) -> None:
        """Answer requests until SIGINT, SIGTERM or `should_exit`."""
        # uvicorn raises the signal once more when it is down; by then it has done its work.
        signals = [signal.SIGINT, signal.SIGTERM] if _in_main_thread() else []
        before = {number: signal.signal(number, lambda *_: None) for number in signals}
        try:
            self.run(sockets=[self._listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cancel what runs and waits, then shut down."""
        self._app.state.worker.stop()
        await super().shutdown(sockets)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
