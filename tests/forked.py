"""Runs edgetune's command line and the model builder in processes that have their imports already.

A process of its own spends five to seven seconds on importing torch and transformers. Here one that has done so waits, and forks
for each call: what is run is the same, from `sys.argv` on. `python forked.py SOCKET` is that process; it ends with the tests
that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

IMPORTED = (
    "torch",
    "torch._dynamo",
    "torch.export",
    "transformers",
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.models.llama.modeling_llama",
    "onnx_ir",
    "peft",
    "tokenizers",
)
_SERVER: list[str] = []  # its socket, once it runs


class Forked:
    """A forked process, as `subprocess.Popen` shows one.

    Args:
        job: `argv`, and `cwd` and `env` (what differs) if any.
        files: its standard input, output and error.
    """

    def __init__(self, job: dict[str, Any], files: tuple[int, int, int]) -> None:
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_address())
        socket.send_fds(self._socket, [json.dumps(job).encode() + b"\n"], list(files))
        self._told = self._socket.makefile("r")
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.001)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._socket.settimeout(timeout)
            try:
                self._socket.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0) from None
            finally:
                self._socket.settimeout(None)
            self.returncode = int(self._told.readline())
            self._socket.close()
        return self.returncode

    def kill(self) -> None:
        """Kill it if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> tuple[None, None]:
        """Wait for its end."""
        self.wait()
        return None, None


def run(
    argv: list[str], cwd: Path | None, env: dict[str, str], stdin: str | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """`edgetune ARGV`, to its end."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write((stdin or "").encode())
        given.seek(0)
        job = {"argv": argv, "cwd": str(cwd or Path.cwd()), "env": {**os.environ, **env}}
        child = Forked(job, (given.fileno(), out.fileno(), err.fileno()))
        try:
            code = child.wait(timeout)
        finally:
            child.kill()
        return subprocess.CompletedProcess(argv, code, _text(out), _text(err))


def build(job: dict[str, Any], out: IO[bytes]) -> Any:
    """The model builder, in the place of `edgetune.export.builder.start`."""
    argv = ["--builder", json.dumps(job)]
    with Path(os.devnull).open("rb") as nothing:
        told = {"argv": argv, "cwd": str(Path.cwd()), "env": dict(os.environ)}
        return Forked(told, (nothing.fileno(), out.fileno(), out.fileno()))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode().replace("\r\n", "\n")


def _address() -> str:
    """The socket of the process that forks, which is started for the first call."""
    if address := os.environ.get("EDGETUNE_TESTS_FORK"):
        return address
    if not _SERVER:
        folder = tempfile.TemporaryDirectory(prefix="forked-")
        address = f"{folder.name}/socket"
        server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE)
        atexit.register(lambda: (server.kill(), folder.cleanup()))
        while not Path(address).exists():
            if server.poll() is not None:
                raise RuntimeError("the process that forks ended")
            time.sleep(0.05)
        _SERVER.append(address)
    return _SERVER[0]


def _serve(address: str) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)
    gc.collect()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    gc.freeze()  # else the first collection in a fork copies every page
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:  # closed: whoever started this is no more
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            if _handle(client, address):
                return
            os._exit(0)
        client.close()


def _handle(client: socket.socket, address: str) -> bool:
    """True in the process that is to run what was asked for; the one above it waits, and tells its exit code."""
    message, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += client.recv(1 << 20)
    job = json.loads(message)
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        client.sendall(f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        return False
    client.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for wanted, file in enumerate(files):
        os.dup2(file, wanted)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["env"], EDGETUNE_TESTS_FORK=address)
    os.chdir(job["cwd"])
    sys.argv = ["edgetune", *job["argv"]]
    return True


def _main() -> None:
    if sys.argv[1:2] == ["--builder"]:
        from edgetune.export import _builder

        sys.argv = [sys.argv[0], sys.argv[2]]
        _builder._end_with_parent = lambda: None  # the one who asked kills it
        _builder.main()
        return
    from edgetune.cli import main
    from edgetune.export import builder

    builder.start = build
    main()


def _end(code: Any) -> None:
    """End as the interpreter does, but leave what was imported as it is: taking it apart costs seconds in a fork."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve(sys.argv[1])
    ended: Any = 0
    try:
        _main()
    except SystemExit as exit_:
        ended = exit_.code
    except BaseException:  # noqa: BLE001 - as the interpreter does it
        traceback.print_exc()
        ended = 1
    _end(ended)
