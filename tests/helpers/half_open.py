"""Calls of which only the headers are sent: HTTP/2 written by hand, as an attacker does."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from readers import PATIENCE

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 1, 3, 4, 6, 7
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4


def connect(target: str | Path, *, tls: bool = False) -> socket.socket:
    """A TCP connection to HOST:PORT (with TLS, without a look at the certificate), or one to a Unix socket."""
    if isinstance(target, Path):
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(PATIENCE)
        end.connect(str(target))
        return end
    host, _, port = target.rpartition(":")
    end = socket.create_connection((host, int(port)), PATIENCE)
    if not tls:
        return end
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(end)


class HalfOpen:
    """One HTTP/2 connection and its half-open calls; ``ended`` has the numbers of streams that the server has ended."""

    def __init__(self, target: str | Path, *, tls: bool = False, token: str | None = None) -> None:
        self._end = connect(target, tls=tls)
        self._headers = [
            (":method", "POST"),
            (":scheme", "https" if tls else "http"),
            (":authority", "daemon"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *([("authorization", f"Bearer {token}")] if token is not None else []),
        ]
        self._numbers = itertools.count(1, 2)
        self._received = b""
        self.ended: set[int] = set()
        self._end.sendall(_PREFACE + _frame(_SETTINGS, 0, 0))

    def open(self, method: str, count: int) -> list[int]:
        """Sends the headers of ``count`` calls, and nothing else of them; their streams' numbers."""
        block = _literal(":path", method) + b"".join(_literal(*header) for header in self._headers)
        numbers = list(itertools.islice(self._numbers, count))
        self._end.sendall(b"".join(_frame(_HEADERS, _END_HEADERS, number, block) for number in numbers))
        return numbers

    def wait(self, numbers: Sequence[int]) -> None:
        """Until the server has ended all of these streams."""
        while not self.ended.issuperset(numbers):
            frame_type, flags, stream, payload = self._read()
            if frame_type == _RST_STREAM or (frame_type == _HEADERS and flags & _END_STREAM):
                self.ended.add(stream)
            elif frame_type in (_SETTINGS, _PING) and not flags & _ACK:
                self._end.sendall(_frame(frame_type, _ACK, 0, payload if frame_type == _PING else b""))
            assert frame_type != _GOAWAY, payload

    def close(self) -> None:
        self._end.close()

    def _read(self) -> tuple[int, int, int, bytes]:
        head = self._take(9)
        payload = self._take(int.from_bytes(head[:3], "big"))
        return head[3], head[4], int.from_bytes(head[5:], "big"), payload

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            received = self._end.recv(1 << 16)
            assert received, "the server has closed the connection"
            self._received += received
        taken, self._received = self._received[:size], self._received[size:]
        return taken


@contextlib.contextmanager
def half_open(
    connections: int, target: str | Path, *, tls: bool = False, token: str | None = None
) -> Iterator[list[HalfOpen]]:
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(connections):
            connection = HalfOpen(target, tls=tls, token=token)
            stack.callback(connection.close)
            opened.append(connection)
        yield opened


def _frame(frame_type: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", frame_type, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header field in HPACK, literal and without indexing (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(_length(len(text)) + text.encode() for text in (name, value))


def _length(size: int) -> bytes:
    """A length in HPACK's form, with a prefix of 7 bits (RFC 7541, 5.1)."""
    if size < 127:
        return bytes([size])
    rest, coded = size - 127, bytearray([127])
    while rest >= 128:
        coded.append(rest % 128 + 128)
        rest //= 128
    return bytes([*coded, rest])
