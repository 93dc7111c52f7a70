"""A local server that speaks as much of the Hugging Face hub's protocol as downloads need."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


MODEL = "acme/tiny-moe"

# for a script in a prepared process: the environment's settings were read when huggingface_hub was imported
READ_SETTINGS = "import importlib, huggingface_hub.constants as constants; importlib.reload(constants)\n"


@dataclass(frozen=True)
class Hub:
    """Has one model at first, ``MODEL``."""

    repositories: dict[str, dict[str, bytes]]  # name -> its files
    asked: list[str]  # paths
    sent: dict[str, int]  # bytes of each file
    settings: dict[str, str]  # of a process that is to use it
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # beginnings of paths: status, X-Error-Code
    cut: dict[str, list[int]] = field(default_factory=dict)  # file -> after so many bytes its next answers end
    tampered: set[str] = field(default_factory=set)  # files whose last byte is another on its way
    instead: dict[str, bytes] = field(default_factory=dict)  # what is sent to who wants a file whole, as is listed
    watched: list[Callable[[str], None]] = field(default_factory=list)  # called with weights of which half was sent

    @property
    def files(self) -> dict[str, bytes]:
        return self.repositories[MODEL]

    def downloaded(self, name: str = MODEL) -> set[str]:
        paths = (path.split("/", 5) for path in self.asked if path.startswith(f"/{name}/resolve/"))
        return {parts[5] for parts in paths}


@contextlib.contextmanager
def serve_hub(files: dict[str, bytes], cache: Path) -> Iterator[Hub]:
    """``cache`` is where who uses it keeps what it downloads."""
    hub = Hub({MODEL: files}, [], {}, {})
    repositories, asked, sent = hub.repositories, hub.asked, hub.sent

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
            status, data, content_type = 404, b"{}", "application/json"
            code = "RepoNotFound" if not files else "EntryNotFound"
            whole, etag = b"", f"{name}-1"
            refusal = next((said for start, said in hub.refused.items() if path.startswith(start)), None)
            revision = re.search(r"/(?:revision|tree|resolve)/([^/]+)", path)
            if refusal is not None:
                status, code = refusal
            elif files and revision and revision[1] not in ("main", REVISION):
                code = "RevisionNotFound"
            elif files and path.startswith(f"/api/models/{repository}/tree/"):
                status = 200
                data = json.dumps(
                    [{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in files.items()]
                ).encode()
            elif files and path.startswith(f"/api/models/{repository}"):
                status = 200
                listed = [{"rfilename": n, "size": len(d)} | _lfs(n, hub.instead.get(n, d)) for n, d in files.items()]
                data = json.dumps({"id": repository, "sha": REVISION, "siblings": listed}).encode()
            elif path.startswith(f"/{repository}/resolve/") and name in files:
                status, whole, content_type = 200, files[name], "application/octet-stream"
                etag = _lfs(name, whole).get("lfs", {}).get("sha256", etag)
                data = whole
                if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    status, data = 206, data[int(part[1]) : int(part[2]) + 1 if part[2] else None]
                else:
                    whole = data = hub.instead.get(name, whole)
                sent[name] = sent.get(name, 0) + len(data) * body
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", REVISION)
            if status >= 400:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if body:
                self.send(name, data, is_whole=data is whole)

        def send(self, name: str, data: bytes, is_whole: bool) -> None:
            if is_whole and name in hub.tampered:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if is_whole and hub.cut.get(name):
                self.wfile.write(data[: hub.cut[name].pop(0)])
                self.close_connection = True
                return
            with contextlib.suppress(ConnectionError):  # who asked may be killed
                self.wfile.write(data[: len(data) // 2])
                if is_whole and name.endswith(".safetensors"):
                    self.wfile.flush()
                    for watch in hub.watched:
                        watch(name)
                self.wfile.write(data[len(data) // 2 :])

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
        hub.settings.update(settings)
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _lfs(name: str, data: bytes) -> dict[str, dict[str, object]]:
    """Return the fields that the hub adds for a large file; {} for a small one."""
    if not name.endswith(".safetensors"):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}


def cache_of(original: Path, cache: Path) -> Path:
    """A hub cache that holds ``acme/tiny-moe``; returns the snapshot."""
    home = cache / "models--acme--tiny-moe"
    snapshot = home / "snapshots" / REVISION
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(original.iterdir())):
        shutil.copy(path, home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot
