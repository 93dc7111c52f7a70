"""Compare `moetier ray` on a cluster of one node with `moetier serve` on the same processors.

    python tests/measurements/ray_serve.py DIR --ram 100% [--rounds 10] [--tokens 128]

Both servers run with the same daemon, of the actor's. They answer the same request by turns; the other one is idle
meanwhile. Before the cluster starts, `moetier serve` answers alone. Prints tokens/s, with streaming and without, how
many times as fast `moetier ray` is (the geometric mean of the ratios, with its 95 % interval over the rounds), and the
time of processors per token, of the server and of all of Ray's processes. Also prints how long the session id of a
request takes to compute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from ray_clusters import KEY, cpu_seconds, free_port, ray_cluster
from speculation import student

from moetier.tools.ray.session_ids import session_of

PROMPT = "La mattina seguente, don Rodrigo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=lambda text: Path(text).absolute())
    parser.add_argument("--ram", default="100%")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    for size in 1, 100, 10_000:
        body = json.dumps({"messages": [{"role": "user", "content": "abc"}] * size}).encode()
        print(f"session id of a request of {len(body):,} bytes: {1e6 * timed(lambda b=body: session_of(b)):.0f} us")
    common = ["--threads", str(arguments.threads), "--context", "1024", "--name", "m"]
    with tempfile.TemporaryDirectory() as place:
        alone = ["--ram", arguments.ram, "--daemon", "none"]
        with server(arguments.directory, [*common, *alone], Path(place)) as (client, _):
            for stream in True, False:
                rates = [rate(client, arguments.tokens, stream) for _ in range(4)][1:]
                print(f"serve alone, {name_of(stream)}: {statistics.median(rates):.2f} tokens/s")
        with ray_cluster([arguments.threads], Path(place)) as cluster:
            cluster.deploy(arguments.directory, *common[:-2], "--ram", arguments.ram)
            (daemon,) = cluster.daemons
            folder = cluster.folder_of(daemon)
            with (
                server(arguments.directory, [*common, "--daemon", folder], Path(place)) as (serve, pid),
                cluster.client(timeout=600) as ray,
            ):
                for client in serve, ray:
                    rate(client, arguments.tokens, True)
                ways = {"serve": (serve, [pid]), "ray": (ray, cluster.processes(""))}
                for stream in True, False:
                    compare(ways, arguments, stream)


def compare(ways: dict[str, tuple[OpenAI, list[int]]], arguments: argparse.Namespace, stream: bool) -> None:
    """``ways``: for each server, a client and the processes whose time is counted."""
    pairs, seconds = [], dict.fromkeys(ways, 0.0)
    for number in range(arguments.rounds):
        rates = {}
        for name in sorted(ways, reverse=bool(number % 2)):
            client, pids = ways[name]
            before = sum(map(cpu_seconds, pids))
            rates[name] = rate(client, arguments.tokens, stream)
            seconds[name] += sum(map(cpu_seconds, pids)) - before
        pairs.append((rates["serve"], rates["ray"]))
    logs = [math.log(ours / theirs) for theirs, ours in pairs]
    mean, spread = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs)) * student(len(logs) - 1)
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    best = [max(side) for side in zip(*pairs, strict=True)]
    print(
        f"{name_of(stream)}: serve {medians[0]:.2f} (at best {best[0]:.2f}), ray {medians[1]:.2f} (at best "
        f"{best[1]:.2f}) tokens/s; ray to serve {math.exp(mean):.3f} "
        f"({math.exp(mean - spread):.3f} to {math.exp(mean + spread):.3f}); time of processors "
        + ", ".join(f"{1e3 * sum_ / arguments.rounds / arguments.tokens:.2f}" for sum_ in seconds.values())
        + " ms a token",
        flush=True,
    )


def rate(client: OpenAI, tokens: int, stream: bool) -> float:
    """Tokens per second of one answer. A stream is counted from its first piece on."""
    asked = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "model": client.models.list().data[0].id}
    began = time.perf_counter()
    if not stream:
        usage = client.completions.create(**asked).usage
        return usage.completion_tokens / (time.perf_counter() - began)
    pieces = iter(client.completions.create(**asked, stream=True))
    next(pieces)
    began = time.perf_counter()
    *_, last = pieces
    return (last.usage.completion_tokens - 1) / (time.perf_counter() - began)


def name_of(stream: bool) -> str:
    return "streamed" if stream else "whole"


def timed(function) -> float:  # type: ignore[no-untyped-def]
    """Least seconds of five calls."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@contextlib.contextmanager
def server(directory: Path, options: list[str], place: Path) -> Iterator[tuple[OpenAI, int]]:
    """`moetier serve`: a client, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "moetier", "serve", str(directory), "--port", str(port), *options]
    environment = os.environ | {"MOETIER_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=place, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "it did not start"
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=600) as client:
            yield client, process.pid
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
