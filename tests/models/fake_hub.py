"""A model hub on a loopback port, as far as downloads need one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server serves; change it while it runs."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.url = ""
        self.fetched: list[str] = []  # files whose content was asked for
        self.asked = 0  # requests of any kind
        self.cut: str | None = None  # a file whose download breaks off in the middle


@contextmanager
def hub(folder: Path, **extra: bytes) -> Iterator[Hub]:
    """Serve the files of `folder` and `extra` as the model `org/tiny`; `org/gated` is gated."""
    state = Hub({path.name: path.read_bytes() for path in folder.iterdir()} | extra)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send_json(self, value: Any) -> None:
            self.send(200, json.dumps(value).encode(), Content_Type="application/json")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            state.asked += 1
            if "org/gated" in path:
                self.send(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="ask for access")
            elif "org/tiny" not in path:
                self.send(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            elif path.startswith("/api/models/org/tiny/tree/"):
                self.send_json(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(data),
                            "oid": hashlib.sha1(data).hexdigest(),
                        }
                        for name, data in state.files.items()
                    ]
                )
            elif path.startswith("/api/models/org/tiny"):
                revision = path.partition("/revision/")[2] or "main"
                if revision not in ("main", COMMIT):
                    self.send(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev")
                    return
                siblings = [{"rfilename": name, "size": len(data)} for name, data in state.files.items()]
                card = {"license": "apache-2.0"}
                self.send_json({"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "cardData": card})
            else:
                self.send_file(path.rsplit("/", 1)[-1])

        def send_file(self, name: str) -> None:
            data = state.files[name]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": COMMIT}
            if self.command == "GET":
                state.fetched.append(name)
            if self.command == "GET" and state.cut == name:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                self.connection.close()
                return
            self.send(200, data, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
