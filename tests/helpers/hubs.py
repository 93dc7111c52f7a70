"""A local server that speaks as much of the Hugging Face hub's protocol as downloads need."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


MODEL = "acme/tiny-moe"


@dataclass(frozen=True)
class Hub:
    """Has one model at first, ``MODEL``."""

    repositories: dict[str, dict[str, bytes]]  # name -> its files
    asked: list[str]  # paths
    sent: dict[str, int]  # bytes of each file
    settings: dict[str, str]  # of a process that is to use it

    @property
    def files(self) -> dict[str, bytes]:
        return self.repositories[MODEL]

    def downloaded(self, name: str = MODEL) -> set[str]:
        paths = (path.split("/", 5) for path in self.asked if path.startswith(f"/{name}/resolve/"))
        return {parts[5] for parts in paths}


@contextlib.contextmanager
def serve_hub(files: dict[str, bytes], cache: Path) -> Iterator[Hub]:
    """``cache`` is where who uses it keeps what it downloads."""
    repositories = {MODEL: files}
    asked: list[str] = []
    sent: dict[str, int] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            name = "/".join(path.split("/")[5:])
            repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
            files = repositories.get(repository, {})
            status, data, kind = 404, b"{}", "application/json"
            if files and path.startswith(f"/api/models/{repository}/tree/"):
                status = 200
                data = json.dumps(
                    [{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in files.items()]
                ).encode()
            elif files and path.startswith(f"/api/models/{repository}"):
                status = 200
                listed = [{"rfilename": n, "size": len(d)} for n, d in files.items()]
                data = json.dumps({"id": repository, "sha": REVISION, "siblings": listed}).encode()
            elif path.startswith(f"/{repository}/resolve/") and name in files:
                status, data, kind = 200, files[name], "application/octet-stream"
                if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    status, data = 206, data[int(part[1]) : int(part[2]) + 1 if part[2] else None]
                sent[name] = sent.get(name, 0) + len(data) * body
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{name}-1"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    try:
        yield Hub(repositories, asked, sent, settings)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
