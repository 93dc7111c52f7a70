"""Engines with pages on disk, and toy models in place of real ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from orders import NO_ORDER
from readers import PATIENCE
from threads import wait_until
from toy_runner import ToyRunner, answer_alone

from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.pages.page_folder import PageFolder, PageOptions, entries
from moetier.runtime.engine.pages.saved_pages import SavedPages
from moetier.runtime.engine.sequence import Request
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.tiers.disk_order import DiskOrder

LONG = [at % 49 + 1 for at in range(400)]
FULL = len(LONG) // PAGE_TOKENS * PAGE_TOKENS  # tokens in full pages: the last one has tokens of the answer, too


@contextlib.contextmanager
def engine_with(
    place: Path,
    *,
    pages: int = 20,
    binding: bytes = b"b" * 32,
    size: int = 1 << 30,
    keys: dict[str, bytes] | None = None,
    order: DiskOrder = NO_ORDER,
    runner: ToyRunner | None = None,
    most: int = 3,
) -> Iterator[Engine]:
    runner = runner or ToyRunner()
    folder = PageFolder(PageOptions(place, size, 1000.0), "toy", binding)
    saved = SavedPages(folder, runner, order, keys, has_states=runner.state_memory is not None)
    with Engine(runner, pages=pages, max_sequences=most, chunk=64, context=1000, saved=saved) as engine:
        yield engine


def answer(engine: Engine, ids: Sequence[int], most: int = 20, **options: object) -> tuple[list[int], int]:
    """The new tokens, and how many tokens of the prompt were there."""
    stream = engine.stream(Request(tuple(ids), most, **options))  # type: ignore[arg-type]
    tokens = [*stream]
    assert tokens == answer_alone([*ids], most, engine.context)
    return tokens, stream.sequence.cached


def written(engine: Engine, ids: Sequence[int], most: int = 20) -> list[int]:
    """The new tokens, once all pages are on the disk."""
    tokens, _ = answer(engine, ids, most)
    wait_until(lambda: not engine.saved.writer.is_writing)  # type: ignore[union-attr]
    return tokens


def files(place: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in entries(place))


class Waiting:
    """An order in which no page is read before ``may_read`` is set, and none written before ``may_write``."""

    def __init__(self) -> None:
        self.may_read, self.may_write, self.asked = threading.Event(), threading.Event(), threading.Event()

    @contextlib.contextmanager
    def reading_page(self) -> Iterator[None]:
        self.asked.set()
        assert self.may_read.wait(PATIENCE)
        yield

    def wait_to_write(self, is_urgent: Callable[[], bool]) -> None:
        assert self.may_write.wait(PATIENCE)
