"""Many random requests leave no more memory, descriptors and pages in use than a few."""

from __future__ import annotations

import gc
import random
import re
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chunks import published_widths
from comparison import convert_tiny

import moetier
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.packed_runner import PackedRunner
from moetier.runtime.engine.sequence import Request
from moetier.runtime.engine.stream import Stream
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

PAGES, CONTEXT = 30, 2000
WARM = 200  # requests before memory is counted, as allocators and caches of libraries grow at first
KIB_A_REQUEST = 0.5
NOISE_KIB = 4096  # of memory, which allocators give back late


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with published_widths():
        folder = tmp_path_factory.mktemp("many")
        _, directory = convert_tiny("qwen3_moe", torch.bfloat16, folder, bits=4, max_position_embeddings=CONTEXT)
    model, _ = moetier.load(directory, daemon=None, ram="50%")
    with model.tiers:
        yield model


@pytest.mark.parametrize("count", [40, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_many_requests_leave_nothing(model: Any, count: int) -> None:
    """Prompts begin alike in part; one of five is cancelled; there are pages for a few at a time."""
    random_ = random.Random(0)
    with Engine(
        PackedRunner(model, PAGES, later_chunk=64, pass_tokens=100),
        pages=PAGES,
        max_sequences=6,
        chunk=64,
        context=CONTEXT,
    ) as engine:
        ask(engine, random_, WARM)
        before = in_use()
        ask(engine, random_, count)
        after = in_use()
        assert after[:2] == before[:2], "descriptors and threads"
        assert after[2] - before[2] < NOISE_KIB + KIB_A_REQUEST * count, "KiB of memory"
        # all pages can be had again
        assert len([*engine.stream(Request((3,) * (PAGES * PAGE_TOKENS - 5), 5, {"do_sample": False}))]) == 5


def ask(engine: Engine, random_: random.Random, count: int) -> None:
    """Send requests, some of which wait for others, and read all answers."""
    text = [random_.randrange(2, 250) for _ in range(200)]
    streams = deque[Stream]()
    for number in range(count):
        ids = text[: random_.randrange(0, 120)] + [random_.randrange(2, 250) for _ in range(random_.randrange(1, 30))]
        decoding = {"do_sample": random_.random() < 0.5}
        streams.append(engine.stream(Request(tuple(ids), random_.randrange(1, 8), decoding, seed=number)))
        if random_.random() < 0.2:
            streams[-1].sequence.cancel()
        if len(streams) > 20:
            tuple(streams.popleft())
    for stream in streams:
        tuple(stream)
    assert not engine.sequences


def in_use() -> tuple[int, int, int]:
    """Return the number of open descriptors and threads, and the KiB of memory that is no file's."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match is not None
    return len([*Path("/proc/self/fd").iterdir()]), threading.active_count(), int(match[1])
