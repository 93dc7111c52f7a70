"""What clients can't take of a server: a small application behind the server's own listener, at real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

from readers import PATIENCE
from starlette.applications import Starlette
from threads import wait_until

from moetier.tiers.errors import ConfigError
from moetier.tools.serve.keys import Key, Keys, RateLimits, digest_of
from moetier.tools.serve.listen import LingeringTransport, Server, bind, is_wildcard, url_of
from moetier.tools.serve.middleware import MAX_BYTES, AccessControl, RequestLimits

MOST, CONNECTIONS = 3, 8
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


class Application:
    """Answers with the length of the body, when it may; "long" has an answer of 64 MB."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()
        self.bodies: list[int] = []
        self.ended = threading.Event()
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        length = 0
        if scope["method"] == "POST":
            message = await receive()
            assert not message["more_body"]
            length = len(message["body"])
            self.bodies.append(length)
        while not self.may.is_set():
            await asyncio.sleep(0.01)
        kind = dict(scope["headers"])[b"content-type"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-kind", kind)]})
        try:
            for _ in range(1000 if dict(scope["headers"]).get(b"x-answer") == b"long" else 0):
                await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
                await asyncio.sleep(0)  # sending waits no more once the connection is lost
            await send({"type": "http.response.body", "body": str(length).encode()})
        finally:
            self.ended.set()


def test_a_wildcard_address_is_named_as_clients_can_use_it() -> None:
    with bind("0.0.0.0", 0) as bound:
        port = bound.getsockname()[1]
        assert is_wildcard(bound)
        assert url_of(bound) == f"http://127.0.0.1:{port}"
        assert url_of(bound, "big") == f"http://big:{port}"
    with bind("127.0.0.1", 0) as bound:
        assert not is_wildcard(bound)


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def address(application: Application) -> Iterator[tuple[str, int]]:
    """Of a server whose times are over for no test."""
    with serving(application) as found:
        yield found


@contextlib.contextmanager
def serving(
    application: Application, body_seconds: float = PATIENCE, keys: Keys | None = None, **seconds: float
) -> Iterator[tuple[str, int]]:
    ready = threading.Event()
    app = AccessControl(
        RequestLimits(application, MOST, MAX_BYTES, body_seconds=body_seconds),
        keys,
        RateLimits(lambda _: 0),
    )
    seconds = {"header_seconds": PATIENCE, "answer_seconds": PATIENCE} | seconds
    with bind("127.0.0.1", 0) as bound:
        server = Server(app, connections=CONNECTIONS, ready=ready.set, ending=lambda: None, **seconds)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            assert ready.wait(PATIENCE)
            yield bound.getsockname()
        finally:
            application.may.set()
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@contextlib.contextmanager
def connection(address: tuple[str, int], sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(address, PATIENCE) as found:
        found.sendall(sent)
        yield found


def answer(found: socket.socket) -> tuple[int, str, dict[str, str]]:
    """(status, body, headers) of one answer with a Content-Length; (0, "", {}) where the connection was closed."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in received and (piece := found.recv(1 << 16)):
            received += piece
    if not received:
        return 0, "", {}
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        while not body.endswith(b"0\r\n\r\n"):
            body += found.recv(1 << 16)
        body = body.split(b"\r\n")[1]
    while len(body) < int(headers.get("content-length", 0)):
        body += found.recv(1 << 16)
    return int(first.split()[1]), body.decode(), headers


def error_of(body: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_of_two_servers_that_start_together_one_says_that_it_cannot_listen(application: Application) -> None:
    """Both are bound, as neither listens yet."""
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        server = Server(application, connections=CONNECTIONS, ready=lambda: None, ending=lambda: None)
        with pytest.raises(ConfigError, match=f"can't listen on {url_of(second)}: Address already in use"):
            server.run([second])


def test_the_bytes_that_arrive_are_counted(address: tuple[str, int], application: Application) -> None:
    """Of 40 MiB in chunks the application sees nothing, whatever Content-Length says; the server reads on nowhere."""
    piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with connection(address, POST + CHUNKED + b"Content-Length: 5\r\n\r\n") as found:
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                found.sendall(piece)
            found.sendall(b"0\r\n\r\n")
        status, body, headers = answer(found)
    assert (status, headers["connection"]) == (413, "close")
    assert f"{MAX_BYTES:,} bytes" in error_of(body)["message"]
    with connection(address, POST + b"Content-Length: 16777217\r\n\r\n") as found:
        assert answer(found)[0] == 413
    assert not application.bodies


def test_a_body_in_chunks_needs_no_length_and_no_type(address: tuple[str, int]) -> None:
    with connection(address, POST + CHUNKED + b"\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") as found:
        status, body, headers = answer(found)
        assert (status, body, headers["x-kind"]) == (200, "5", "application/json")
        found.sendall(POST + b"Content-Length: 4\r\nContent-Type: text/plain\r\n\r\nabcd")
        status, body, headers = answer(found)
        assert (status, body, headers["x-kind"]) == (200, "4", "text/plain")


def test_a_web_page_needs_a_type(address: tuple[str, int]) -> None:
    """Without one a browser would send its request to this server without asking it."""
    origin = b"Origin: https://evil.example\r\nContent-Length: 2\r\n"
    with connection(address, POST + origin + b"\r\n{}") as found:
        status, body, _ = answer(found)
        assert (status, error_of(body)["type"]) == (400, "invalid_request_error")
        found.sendall(POST + origin + b"Content-Type: application/json\r\n\r\n{}")
        assert answer(found)[0] == 200


@pytest.mark.parametrize("sent", [b"", b"GET", GET[:-2], GET[:-2] + b"X-A: " + b"a" * 100])
def test_headers_have_their_time(application: Application, sent: bytes) -> None:
    with serving(application, header_seconds=0.3) as address, connection(address, sent) as found:
        assert answer(found)[0] == 0


@pytest.mark.parametrize("size", [17 << 10, 70_000, 200_000, 2_000_000])
@pytest.mark.parametrize("is_whole", [True, False])
def test_headers_have_their_size(address: tuple[str, int], application: Application, size: int, is_whole: bool) -> None:
    """A client that sends on and on gets the answer, too, and not a reset in its place."""
    request = GET[:-2] + b"X-A: " + b"a" * size + (b"\r\n\r\n" if is_whole else b"")
    with connection(address, request) as found:
        status, body, headers = answer(found)
        assert (status, headers["connection"]) == (431, "close")
        assert error_of(body)["message"] == "The headers have more than 16,384 bytes."
        assert found.recv(1) == b""
    with connection(address, GET[:-2] + b"X-A: " + b"a" * (15 << 10) + b"\r\n\r\n") as found:
        assert answer(found)[0] == 200
    assert application.asked == 1


@pytest.mark.parametrize("sent", [b"\0" * 100, b"GET /\r\n\r\n", POST + CHUNKED + b"\r\nnonsense\r\n" + bytes(500_000)])
def test_what_is_no_http_is_refused(address: tuple[str, int], application: Application, sent: bytes) -> None:
    with connection(address, sent) as found:
        status, body, headers = answer(found)
        assert (status, headers["connection"]) == (400, "close")
        assert error_of(body)["type"] == "invalid_request_error"
        assert found.recv(1) == b""
    assert not application.asked


def test_a_client_that_sends_on_gets_its_refusal(address: tuple[str, int]) -> None:
    """Its body is too large, and it reads only after it has sent all of it."""
    with connection(address, POST + b"Content-Length: 20000000\r\n\r\n" + bytes(20_000_000)) as found:
        assert answer(found)[0] == 413
        assert found.recv(1) == b""


def test_a_client_that_sends_for_ever_is_left(address: tuple[str, int]) -> None:
    with connection(address, POST + b"Content-Length: 20000000000\r\n\r\n") as found:

        def send() -> None:
            while True:
                found.sendall(bytes(1 << 16))

        with pytest.raises(ConnectionError):
            send()


def test_a_client_that_resets_when_it_is_refused_is_left() -> None:
    """The server does not read at that moment, so only the end of its own side tells it."""

    async def refuse() -> None:
        loop = asyncio.get_running_loop()
        made, lost = loop.create_future(), asyncio.Event()

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.set_result(transport)

            def connection_lost(self, _: Exception | None) -> None:
                lost.set()

        async with await loop.create_server(Connection, "127.0.0.1", 0) as server:
            client = socket.create_connection(server.sockets[0].getsockname())
            transport = await made
            transport.pause_reading()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            LingeringTransport(transport, lambda: True).close()
            await asyncio.wait_for(lost.wait(), PATIENCE)

    asyncio.run(refuse())


def test_headers_that_trickle_have_no_more_time(application: Application) -> None:
    """Nor have those of a second request."""
    with serving(application, header_seconds=1.0) as address, connection(address, GET) as found:
        assert answer(found)[0] == 200
        while answer_is_missing(found):
            found.sendall(b"G")


def answer_is_missing(found: socket.socket) -> bool:
    """For a twentieth of a second; False once the connection is closed."""
    found.settimeout(0.05)
    try:
        return found.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def test_a_request_under_way_has_all_the_time(application: Application) -> None:
    with serving(application, header_seconds=1.0) as address:
        application.may.clear()
        with connection(address, POST + b"Content-Length: 2\r\n\r\n{}") as found:
            with connection(address) as other:
                assert answer(other)[0] == 0  # whose time began later is over
            application.may.set()
            assert answer(found)[:2] == (200, "2")


@pytest.mark.parametrize("head", [CHUNKED + b"\r\n1\r\na\r\n", b"Content-Length: 100\r\n\r\na"])
def test_a_body_has_its_time(application: Application, head: bytes) -> None:
    with serving(application, body_seconds=0.3) as address:
        with connection(address, POST + head) as found:
            status, body, headers = answer(found)
            assert (status, headers["connection"]) == (408, "close")
            assert "0.3 s" in error_of(body)["message"]
            assert answer(found)[0] == 0
        assert not application.bodies


def test_keys_are_checked_before_a_body_comes(application: Application) -> None:
    """And so are their limits. These bodies never come."""
    keys = Keys({"anna": Key("anna", digest_of(b"a-key"), requests=1)})
    with serving(application, keys=keys) as address:
        with connection(address, POST + b"x-api-key: a-key\r\nContent-Length: 2\r\n\r\n{}") as found:
            assert answer(found)[0] == 200
        for key, status, code in (b"b-key", 401, "invalid_api_key"), (b"a-key", 429, "rate_limit_exceeded"):
            with connection(address, POST + b"x-api-key: " + key + b"\r\nContent-Length: 100\r\n\r\n") as found:
                said, body, _ = answer(found)
                assert (said, error_of(body)["code"]) == (status, code)
    assert application.asked == 1


@pytest.mark.parametrize("head", [GET[:-2], POST], ids=["GET", "POST"])
def test_an_answer_that_is_not_taken_ends(application: Application, head: bytes) -> None:
    """And its connection makes room for another."""
    request = head + b"X-Answer: long\r\nContent-Length: 2\r\n\r\n{}"
    with serving(application, answer_seconds=0.3) as address, contextlib.ExitStack() as several:
        for _ in range(CONNECTIONS):
            several.enter_context(connection(address, request))
            assert application.ended.wait(PATIENCE)
            application.ended.clear()
        with connection(address, GET) as found:
            assert answer(found)[0] == 200


def test_refusals_that_are_not_taken_keep_no_connection(application: Application) -> None:
    """A client without the key asks again and again, and reads nothing."""
    with serving(application, answer_seconds=0.3, keys=Keys.only("s3cret")) as address, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(PATIENCE)
        deaf.connect(address)

        def ask() -> None:
            while True:
                deaf.sendall(100 * GET)

        with pytest.raises(ConnectionError):
            ask()


def test_more_requests_than_there_is_room_for_are_told_to_come_back(
    address: tuple[str, int], application: Application
) -> None:
    application.may.clear()
    with contextlib.ExitStack() as several:
        request = POST + b"Content-Length: 2\r\n\r\n{}"
        served = [several.enter_context(connection(address, request)) for _ in range(MOST - 1)]
        slow = several.enter_context(connection(address, POST + b"Content-Length: 2\r\n\r\n"))
        wait_until(lambda: len(application.bodies) == MOST - 1)
        further = several.enter_context(connection(address, request))
        status, body, headers = answer(further)
        assert (status, headers["retry-after"]) == (429, "5")
        assert (error_of(body)["type"], error_of(body)["code"]) == ("invalid_request_error", "queue_full")
        slow.sendall(b"{}")
        wait_until(lambda: len(application.bodies) == MOST)
        application.may.set()
        assert [answer(each)[0] for each in (*served, slow)] == [200] * MOST
        further.sendall(request)
        assert answer(further)[0] == 200


def test_idle_connections_make_room(address: tuple[str, int], application: Application) -> None:
    """Those that have been idle for longest; a request under way does not."""
    application.may.clear()
    with contextlib.ExitStack() as several:
        busy = several.enter_context(connection(address, POST + b"Content-Length: 2\r\n\r\n{}"))
        wait_until(lambda: bool(application.bodies))
        idle = [several.enter_context(connection(address, b"GET /")) for _ in range(5 * CONNECTIONS)]
        for each in idle[: 4 * CONNECTIONS]:
            assert answer(each)[0] == 0
        application.may.set()
        assert answer(busy)[0] == 200
        last = idle[-1]
        last.sendall(GET.removeprefix(b"GET /"))
        assert answer(last)[0] == 200


def test_an_end_that_does_not_wait_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """As of a second Ctrl-C."""
    with bind("127.0.0.1", 0) as bound:
        server = Server(Starlette(), connections=1, ready=lambda: None, ending=lambda: None)
        server.should_exit = server.force_exit = True
        server.run([bound])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_connections_that_are_all_busy_let_no_other_in(address: tuple[str, int], application: Application) -> None:
    application.may.clear()
    with contextlib.ExitStack() as several:
        busy = [several.enter_context(connection(address, GET)) for _ in range(CONNECTIONS)]
        wait_until(lambda: application.asked == CONNECTIONS)
        with connection(address) as further:
            status, _, headers = answer(further)
            assert (status, headers["retry-after"]) == (503, "5")
        application.may.set()
        assert [answer(each)[0] for each in busy] == [200] * CONNECTIONS
        with connection(address, GET) as found:
            assert answer(found)[0] == 200
