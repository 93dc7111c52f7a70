"""Serve 200 connections at once: half of them slow, 40 of clients that leave, and ask for `/health` meanwhile.

    python tests/measurements/crowd.py DIR --seconds 600

Each client asks again as soon as it has its answer: in all APIs, streamed and whole, some without the key. Prints the
outcomes, times of `/health`, and the server's memory, descriptors and threads over time. Exits with 1 if an answer was
not complete, late or refused otherwise than with 429, or if memory, descriptors or threads grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

KEY = "a-key-of-the-crowd"
PATIENCE = 300.0  # seconds within which an answer must be there
PIECES = 10  # in which a slow client sends its body
PAUSE = 0.1  # seconds between what a slow client sends, and what it reads
SAMPLES = 10  # of memory, descriptors and threads
MAX_GROWN = 64 << 20  # bytes of memory between the middle and the end
WORDS = ["la", "mattina", "seguente", "don", "Rodrigo", "signore", "sposi", "curato", "Lucia", "pane", "Milano"]


class Crowd:
    """Clients of one server."""

    def __init__(self, port: int, seconds: float) -> None:
        self.outcomes = Counter[str]()
        self.health: list[float] = []  # seconds
        self._port = port
        self._end = time.monotonic() + seconds

    async def run(self, connections: int) -> None:
        """Run all clients until the end."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            for number in range(connections):
                group.create_task(self._client(number, is_slow=number % 2 == 0, leaves=number % 5 == 0))

    async def _client(self, number: int, *, is_slow: bool, leaves: bool) -> None:
        random_ = random.Random(number)
        while time.monotonic() < self._end:
            has_key = random_.random() > 0.05
            asked = self._ask(random_, is_slow=is_slow, has_key=has_key)
            try:
                outcome = await asyncio.wait_for(asked, random_.uniform(0.05, 5) if leaves else PATIENCE)
            except TimeoutError:
                outcome = "left" if leaves else "late"
            except OSError as error:
                outcome = f"connection: {error!r}"
            self.outcomes[outcome] += 1
            if outcome == "429":
                await asyncio.sleep(random_.uniform(0.5, 2))

    async def _ask(self, random_: random.Random, *, is_slow: bool, has_key: bool) -> str:
        """Send a request, read its whole answer, and return the outcome."""
        text, stream = " ".join(random_.choices(WORDS, k=random_.randrange(5, 40))), random_.random() < 0.5
        body: dict[str, Any] = {"max_tokens": random_.randrange(1, 24), "stream": stream}
        path = random_.choice(["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
        if path == "/v1/responses":
            body = {"max_output_tokens": body["max_tokens"], "stream": stream, "input": text}
        else:
            is_text = path == "/v1/completions"
            body |= {"prompt": text} if is_text else {"messages": [{"role": "user", "content": text}]}
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            content = json.dumps(body).encode()
            key = f"Authorization: Bearer {KEY}\r\n" if has_key else ""
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{key}"
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode())
            size = -(-len(content) // PIECES) if is_slow else len(content)
            for at in range(0, len(content), size):
                writer.write(content[at : at + size])
                await writer.drain()
                if is_slow:
                    await asyncio.sleep(PAUSE)
            answer = b""
            while piece := await reader.read(512 if is_slow else 65536):
                answer += piece
                if is_slow:
                    await asyncio.sleep(PAUSE)
            return outcome_of(answer, has_key=has_key, stream=stream)
        finally:
            writer.close()

    async def _watch(self) -> None:
        """Ask for `/health` ten times a second."""
        while time.monotonic() < self._end:
            began = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            self.health.append(time.monotonic() - began)
            writer.close()
            if not answer.startswith(b"HTTP/1.1 200"):
                self.outcomes[f"/health: {answer!r}"] += 1
            await asyncio.sleep(0.1)


def outcome_of(answer: bytes, *, has_key: bool, stream: bool) -> str:
    """Return the status of an answer; with a reason if it is not what it should be."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head[9:12].decode()
    if status == "200" and has_key:
        last = (b"[DONE]", b"response.completed", b"response.incomplete", b"message_stop")
        is_whole = any(mark in body for mark in last) if stream else body.rstrip().endswith(b"}")
        return "200" if is_whole else f"cut: {body[-100:]!r}"
    if status in ("429", "200" if has_key else "401"):
        return status
    return f"unexpected: {answer[:200]!r}"


def usage_of(pid: int) -> tuple[int, int, int]:
    """Return bytes of memory, descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (re.search(rf"{name}:\s+(\d+)", status) for name in ("RssAnon", "Threads"))
    assert memory is not None
    assert threads is not None
    return int(memory[1]) << 10, len([*Path(f"/proc/{pid}/fd").iterdir()]), int(threads[1])


async def watched(crowd: Crowd, connections: int, pid: int, seconds: float) -> list[tuple[int, int, int]]:
    """Run a crowd, and return the server's usage over time; the last one after all clients have gone."""
    usages = [usage_of(pid)]

    async def sample() -> None:
        for _ in range(SAMPLES):
            await asyncio.sleep(seconds / SAMPLES)
            usages.append(usage_of(pid))
            say(usages[-1])

    await asyncio.gather(crowd.run(connections), sample())
    deadline = time.monotonic() + 30
    while usage_of(pid)[1] > usages[0][1] and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    return [*usages, usage_of(pid)]


def say(usage: tuple[int, int, int]) -> None:
    memory, descriptors, threads = usage
    print(f"{memory / 2**20:7.1f} MiB, {descriptors} descriptors, {threads} threads", flush=True)


def main() -> None:
    """Run the crowd, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--connections", type=int, default=200)
    options = parser.parse_args()
    words = ["--port", "0", "--daemon", "none", "--context", "512", "--queue", str(options.connections // 2)]
    command = [sys.executable, "-m", "moetier.tools.main", "serve", options.directory, *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"MOETIER_API_KEY": KEY}
    ) as server:
        try:
            assert server.stdout is not None
            port = next(
                int(found[1]) for line in server.stdout if (found := re.search(r"http://127.0.0.1:(\d+)", line))
            )
            asyncio.run(Crowd(port, 5).run(options.connections))  # all threads are there then
            crowd = Crowd(port, options.seconds)
            say(usage_of(server.pid))
            usages = asyncio.run(watched(crowd, options.connections, server.pid, options.seconds))
        finally:
            server.terminate()
    say(usages[-1])
    print(*(f"{count:,} {outcome}" for outcome, count in crowd.outcomes.most_common()), sep="\n")
    times = sorted(crowd.health)
    late = times[len(times) * 99 // 100]
    print(f"/health: median {1e3 * times[len(times) // 2]:.1f} ms, 99 % within {1e3 * late:.1f} ms")
    faults = [outcome for outcome in crowd.outcomes if outcome not in ("200", "401", "429", "left")]
    before, *half = usages[: len(usages) // 2 + 1]
    after = usages[-1]
    grown = after[0] - half[-1][0] > MAX_GROWN or after[1] > before[1] or after[2] > max(usage[2] for usage in half)
    if faults or grown:
        sys.exit("an answer was lost" if faults else "the server has grown")


if __name__ == "__main__":
    main()
