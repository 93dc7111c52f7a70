"""`moetier serve` with two models as a real process: in memory for one of them, and with a daemon that is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

from cgroups import memory_limit
from daemons import running_daemon
from http_servers import ServerProcess
from readers import PATIENCE
from threads import wait_until

from moetier.tools.convert.api import convert

# joins the control group whose file is the first argument, and becomes the command behind it
JOIN = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
LIMIT = 640 << 20  # bytes, of which Python with its libraries takes about half
SHARES = ["--ram", "70%", "--kv-cache", "70%", "--context", "512"]  # so that two models don't fit


@pytest.fixture
def pair(tinymix_4bit: Path, tmp_path: Path) -> list[Path]:
    places = [tmp_path / name for name in "ab"]
    for place in places:
        shutil.copytree(tinymix_4bit, place, copy_function=os.link)
    return places


@contextlib.contextmanager
def server(places: list[Path], place: Path, *options: str, under: tuple[str, ...] = ()) -> Iterator[ServerProcess]:
    """A server of the first model, and of the others by further arguments."""
    found = ServerProcess(places[0], place, [*map(str, places[1:]), *options], under=under)
    try:
        yield found
    finally:
        found.end()


def ask(found: ServerProcess, model: str, tokens: int = 4) -> str:
    with found.client(timeout=5 * PATIENCE) as client:
        done = client.completions.create(model=model, prompt="La mattina seguente", max_tokens=tokens, temperature=0)
    return done.choices[0].text


def loaded(found: ServerProcess) -> list[str]:
    with found.client() as client:
        return [model.id for model in client.models.list() if model.loaded]  # type: ignore[attr-defined]


def anonymous(folder: Path) -> int:
    """Bytes of a control group that are no cache of files: of the heap, and of arenas."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(stat.get("rss", stat.get("anon", 0))) + int(stat.get("shmem", 0))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_hundred_requests_by_turns_where_one_model_fits(pair: list[Path], tmp_path: Path) -> None:
    with memory_limit(LIMIT) as group:
        join = ("-c", JOIN, str(group.folder / "cgroup.procs"))
        with server(pair, tmp_path, *SHARES, "--daemon", "none", under=join) as found:
            expected = ask(found, "a")
            assert [ask(found, "ab"[number % 2]) for number in range(1, 200)] == [expected] * 199
            assert len(loaded(found)) == 1
            with ThreadPoolExecutor(4) as threads:
                assert {*threads.map(lambda name: ask(found, name), "abab" * 5)} == {expected}
            assert group.peak <= LIMIT
            assert found.stop() == 0


@pytest.mark.slow  # tools/serve/test_models.py looks at arenas of this process
def test_an_unload_returns_memory(pair: list[Path], tmp_path: Path) -> None:
    with memory_limit(LIMIT) as group:
        join = ("-c", JOIN, str(group.folder / "cgroup.procs"))
        options = (*SHARES, "--daemon", "none", "--keep-alive", "1s")
        with server(pair, tmp_path, *options, under=join) as found:
            unloads = Counter[str]()

            def bytes_held(name: str) -> int:
                """Return what the group holds while a model is loaded, which is unloaded afterwards."""
                held = 0
                while not held:
                    ask(found, name, 40)
                    held = anonymous(group.folder)
                    if loaded(found) != [name]:  # it may have been unloaded before its memory was read
                        held = 0
                    unloads[name] += 1
                    wait_until(lambda: found.log.count(f"{name} is unloaded") == unloads[name])
                return held

            for name in "aba":  # the kernels that b needs are compiled once, and kept
                bytes_held(name)
            before = anonymous(group.folder)
            held = bytes_held("b")
            assert held - before > 12 << 20, "its arena at least"
            wait_until(lambda: anonymous(group.folder) < before + (held - before) // 4)


def test_a_daemon_that_is_killed_touches_the_answers_of_its_model_only(
    tinymix: Path, tinymix_4bit: Path, tmp_path: Path, runtime: Path
) -> None:
    other = tmp_path / "other"
    convert(tinymix, other, bits=2)
    folders = [runtime / "moetier" / name for name in "ab"]
    places = [tinymix_4bit, other]
    with (
        running_daemon(tinymix_4bit, folder=folders[0]) as killed,
        running_daemon(other, folder=folders[1]),
        server(places, tmp_path, "--context", "1024") as found,
        ThreadPoolExecutor(2) as threads,
    ):
        names = [tinymix_4bit.name, "other"]
        first = [ask(found, name, 200) for name in names]
        under_way = [threads.submit(ask, found, name, 200) for name in names]
        killed.kill()
        assert under_way[1].result() == first[1]
        assert ask(found, "other", 200) == first[1]
        with contextlib.suppress(Exception):
            under_way[0].result()
        assert ask(found, names[0], 200) == first[0], "the next request has the experts from the disk"
