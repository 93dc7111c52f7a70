"""The application on Ray clusters of one and two nodes, with the unmodified openai client."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason='pip install ".[ray]"')
pytest.importorskip("openai", reason='pip install ".[serve]"')

import httpx2
import openai
from ray_clusters import KEY, RayCluster, arena_bytes, cpu_seconds, ray_cluster
from readers import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "La mattina seguente, don Rodrigo"
OPTIONS = ("--threads", "1", "--context", "512", "--ram", "100%")


@pytest.fixture(scope="module")
def one(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """One node with room for two replicas, of which one runs."""
    with ray_cluster([2], tmp_path_factory.mktemp("one")) as cluster:
        cluster.deploy_file(tinymix_4bit, 1, threads=1, context=512, ram="100%")
        yield cluster


@pytest.fixture(scope="module")
def two(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Two nodes, with a replica each."""
    with ray_cluster([1, 1], tmp_path_factory.mktemp("two")) as cluster:
        cluster.deploy(tinymix_4bit, *OPTIONS, "--min-replicas", "2")
        yield cluster


def text_of(cluster: RayCluster, prompt: str = PROMPT, **asked: Any) -> str:
    with cluster.client() as client:
        given = {"model": "small", "prompt": prompt, "max_tokens": 16, "temperature": 0} | asked
        return client.completions.create(**given).choices[0].text


def test_errors_of_daemons_and_replicas_are_told(tinymix_4bit: Path, tmp_path: Path) -> None:
    with ray_cluster([1], tmp_path) as cluster:
        found = cluster.deploy(tinymix_4bit, *OPTIONS, "--threads", "2", status=1)
        assert "no node of the cluster has more than 1." in found
        with pytest.MonkeyPatch.context() as change:
            change.setitem(cluster.environment, "MOETIER_API_KEY", "")
            found = cluster.deploy(tinymix_4bit, *OPTIONS, "--host", "0.0.0.0", status=1)
            assert f"can reach Ray Serve at 0.0.0.0:{cluster.port}, and there is no API key" in found
        found = cluster.deploy(tinymix_4bit, "--threads", "1", "--ram", "1KiB", status=1)
        assert "--ram of 1 KiB is too small" in found
        folder = shutil.copytree(tinymix_4bit, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
        assert f"{folder} has no tokenizer. Copy" in cluster.deploy(folder, *OPTIONS, status=1)


def test_a_node_without_the_memory_is_told(tinymix_4bit: Path, tmp_path: Path) -> None:
    with ray_cluster([1], tmp_path, memory=1 << 20) as cluster:
        found = cluster.deploy(tinymix_4bit, "--threads", "1", "--ram", "64GiB", status=1)
        assert "Ray offers its actors less memory on this node than the " in found


def test_answers_are_those_of_generate(one: RayCluster, tinymix_4bit: Path) -> None:
    import moetier

    model, tokenizer = moetier.load(tinymix_4bit, daemon=None)
    assert tokenizer is not None
    with model.tiers:
        ids = tokenizer(PROMPT, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text_of(one) == expected
    with one.client() as client:
        assert [model.id for model in client.models.list()] == ["small"]
        pieces = list(
            client.completions.create(model="small", prompt=PROMPT, max_tokens=16, temperature=0, stream=True)
        )
        assert "".join(piece.choices[0].text for piece in pieces) == expected
        assert len(pieces) > 8
        chat = client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "Chi era don Abbondio?"}], max_tokens=8
        )
        assert chat.usage is not None
        assert chat.usage.completion_tokens <= 8
    with one.client(api_key="another") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_share_of_memory_is_reserved(one: RayCluster) -> None:
    """Ray promises no memory of the daemon to others."""
    code = (
        "import ray; ray.init('auto', logging_level='ERROR'); "
        "print(int(ray.cluster_resources()['memory'] - ray.available_resources()['memory']))"
    )
    (daemon,) = one.daemons
    reserved = int(one.run("-c", code))
    assert reserved > 0
    assert one.ram_of(daemon) == reserved


def test_a_client_that_goes_away_ends_its_answer(one: RayCluster) -> None:
    def metric(outcome: str) -> float:
        text = httpx2.get(
            f"http://127.0.0.1:{one.port}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE
        ).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if outcome in line and "requests" in line)

    before = metric("cancelled")
    with one.client() as client:
        stream = client.completions.create(model="small", prompt=PROMPT, max_tokens=400, temperature=0, stream=True)
        next(iter(stream))
        stream.close()
    _wait(lambda: metric("cancelled") == before + 1)


def test_another_replica_reads_no_expert(one: RayCluster, tinymix_4bit: Path) -> None:
    text_of(one, max_tokens=200)
    text_of(one, "Renzo e Lucia", max_tokens=200)
    (daemon,) = one.daemons
    (replica,) = one.replicas
    before = one.stats(daemon)["host"]
    one.deploy_file(tinymix_4bit, 2, threads=1, context=512, ram="100%")
    assert replica in one.replicas, "the first one did not restart"
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: text_of(one, f"{PROMPT}{' ' * (i % 4)}"), range(32)))
    assert len(set(texts)) <= 4
    assert one.daemons == [daemon]
    assert one.stats(daemon)["host"]["bytes_in"] == before["bytes_in"]
    shares = [arena_bytes(pid, "Pss") for pid in (daemon, *one.replicas)]
    assert all(shares)
    assert sum(shares) <= 1.02 * arena_bytes(daemon, "Size")


def test_a_daemon_ends_when_no_replica_is_left(one: RayCluster) -> None:
    one.shut_down()
    _wait(lambda: not one.daemons, seconds=3 * PATIENCE)


def test_a_replica_starts_as_requests_wait(tinymix_4bit: Path, tmp_path: Path) -> None:
    with ray_cluster([2], tmp_path) as cluster:
        cluster.deploy(tinymix_4bit, *OPTIONS, "--max-replicas", "2", "--parallel", "2")
        (first,) = cluster.replicas
        with load(cluster, threads=4):
            cluster.wait_for(2)
        assert first in cluster.replicas
        assert len(cluster.daemons) == 1


def test_each_node_has_one_arena(two: RayCluster) -> None:
    assert len(two.replicas) == len(two.daemons) == 2
    with ThreadPoolExecutor(8) as pool:  # both answer, and so map experts
        list(pool.map(lambda i: text_of(two, f"{i}, {PROMPT}"), range(32)))
    shares = [arena_bytes(pid, "Pss") for pid in (*two.daemons, *two.replicas)]
    assert all(shares)
    assert sum(shares) <= 1.02 * sum(arena_bytes(pid, "Size") for pid in two.daemons)


def test_a_conversation_returns_to_its_replica(two: RayCluster) -> None:
    """Each turn finds keys and values of the one before at its replica."""
    before = {pid: cpu_seconds(pid) for pid in two.replicas}
    with two.client() as client:
        for number in range(12):
            messages: list[Any] = [{"role": "user", "content": f"{number}. Chi era don Abbondio?"}]
            for turn in range(3):
                done = client.chat.completions.create(model="small", messages=messages, max_tokens=4, temperature=0)
                assert done.usage is not None
                kept = done.usage.prompt_tokens_details
                assert not turn or (kept is not None and kept.cached_tokens)
                said = done.choices[0].message.content
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "E poi?"}]
    assert all(cpu_seconds(pid) > seconds + 0.2 for pid, seconds in before.items()), "one replica answered all"


@pytest.mark.parametrize("victim", ["daemon", "actor"])
def test_a_killed_daemon_costs_no_request_and_starts_warm(two: RayCluster, victim: str) -> None:
    """An actor's death ends its daemon."""
    for number in range(8):
        text_of(two, f"{number}, {PROMPT}", max_tokens=4)
    killed, other = two.daemons
    filled = two.stats(killed)["host"]["ready"]
    with load(two) as more:
        more(4)
        os.kill(killed if victim == "daemon" else two.parent_of(killed), signal.SIGKILL)
        more(4)
        _wait(lambda: len(two.daemons) == 2 and killed not in two.daemons)
        more(20)
    (new,) = {*two.daemons} - {other}
    found = two.stats(new)
    assert found["recovered"] >= filled > 0
    assert found["clients"] == 1


def test_a_killed_replica_leaves_requests_to_the_other(two: RayCluster) -> None:
    killed, other = two.replicas
    os.kill(killed, signal.SIGKILL)
    taken = list[float]()
    for number in range(8):
        began = time.monotonic()
        text_of(two, f"{number}. {PROMPT}", max_tokens=4)
        taken.append(time.monotonic() - began)
    assert sorted(taken)[-2] < 5, "all but one, as the machine may have other work"
    _wait(lambda: len(two.replicas) == 2, seconds=2 * PATIENCE)
    assert other in two.replicas


def test_an_update_fails_no_request(two: RayCluster, tinymix_4bit: Path) -> None:
    before, daemons = {*two.replicas}, two.daemons
    with load(two) as more:
        more(4)
        two.deploy(tinymix_4bit, *OPTIONS, "--min-replicas", "2", "--queue", "32")
        more(4)
    _wait(lambda: not before & {*two.replicas})
    assert two.daemons == daemons, "their options are the same"


@contextlib.contextmanager
def load(cluster: RayCluster, threads: int = 3) -> Iterator[Callable[[int], None]]:
    """Threads that send requests while the block runs. Yields a function that waits until so many more are answered.
    Raises what a request has raised; answers to one prompt must be the same."""
    stopping, done = threading.Event(), [0] * threads

    def ask(number: int) -> None:
        expected = text_of(cluster, f"{number}. {PROMPT}", max_tokens=24)
        while not stopping.is_set():
            assert text_of(cluster, f"{number}. {PROMPT}", max_tokens=24) == expected
            done[number] += 1

    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(ask, number) for number in range(threads)]

        def more(count: int) -> None:
            goal = sum(done) + count
            _wait(lambda: sum(done) >= goal or any(task.done() for task in tasks))

        try:
            yield more
        finally:
            stopping.set()
        for task in tasks:
            task.result()


def _wait(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)
