"""With pages on disk, answers are the same: after restarts, evictions, faults and in any company."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from faults import flip_bit, mounted, remounted
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import NO_ORDER
from readers import PATIENCE
from threads import wait_until
from toy_runner import ToyRunner, ToyStateRunner, answer_alone

from moetier.runtime.client.miss_order import MissOrder
from moetier.runtime.engine import kv_cache, page_fetch, page_folder, page_writer, saved_pages
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.kv_cache import LAST_TOKENS
from moetier.runtime.engine.page_file import ALIGNMENT, Payload
from moetier.runtime.engine.page_folder import PageFolder, PageOptions, entries
from moetier.runtime.engine.saved_pages import SavedPages
from moetier.runtime.engine.sequence import Finish, Request
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.tiers.disk_order import DiskOrder

PROMPTS = [[*range(1, 100)], [*range(1, 70)], [*range(1, 65)], [7] * 150, [7] * 20, [9]]
LONG = [at % 49 + 1 for at in range(400)]
CHATTY = [32, 45, *LONG[:88]]  # a prompt with a long answer
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


def test_a_turn_after_a_restart_computes_only_what_is_new(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        tokens, cached = answer(engine, LONG)
        assert not cached
    pages = len(files(tmp_path))
    assert pages == -(-(len(LONG) + len(tokens) - 1) // PAGE_TOKENS) == 7
    runner = ToyRunner()
    with engine_with(tmp_path, runner=runner) as engine:
        _, cached = answer(engine, [*LONG, *tokens, 5, 6], 1)
        assert cached == len(LONG) + len(tokens) - 1, "the last token was sampled, but not computed"
        assert runner.computed == 3
        traffic = engine.saved.traffic()  # type: ignore[union-attr]
        assert traffic.pages == pages
        assert traffic.read_bytes == 32 * cached


# -- states besides keys and values ------------------------------------------------------------------------------------


def test_a_turn_after_a_restart_continues_from_the_last_state(tmp_path: Path) -> None:
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        tokens = written(engine, LONG)
        short = written(engine, LONG[:100])
    ends = len(LONG) + len(tokens) - 1, 100
    for ids, kept in (([*LONG, *tokens, 5], ends[0]), ([*LONG[:100], *short, 5, 6], ends[1])):
        runner = ToyStateRunner()
        with engine_with(tmp_path, runner=runner, pages=60) as engine:
            assert answer(engine, ids, 1)[1] >= kept - PAGE_TOKENS
            assert runner.computed <= len(ids) - kept + PAGE_TOKENS


def test_a_long_prompt_has_states_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "SNAPSHOT_TOKENS", 3 * PAGE_TOKENS)
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        written(engine, LONG)
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        assert answer(engine, [*LONG[: 4 * PAGE_TOKENS + 30], 3], 1)[1] == 3 * PAGE_TOKENS


def test_what_many_prompts_begin_with_is_kept(tmp_path: Path) -> None:
    """A snapshot is taken where the second one leaves the first, and the third one continues there."""
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        for number in (1, 2):
            written(engine, [*LONG, *[number] * 90])
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        assert answer(engine, [*LONG, *[3] * 90])[1] == FULL


@pytest.mark.parametrize("turn", [90, 400])
def test_a_prompt_that_leaves_out_thoughts_continues_after_a_restart(tmp_path: Path, turn: int) -> None:
    """The chat template leaves out the end of the first prompt, and the first tokens of its answer."""
    first = LONG[:turn]
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        tokens = written(engine, first)
    for ids in (first, [*first[:-4], *tokens[5:], 5, 6]):
        with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
            assert answer(engine, ids, 1)[1] == turn - LAST_TOKENS


def test_a_prompt_keeps_its_state_though_its_answer_has_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "SNAPSHOT_TOKENS", 3 * PAGE_TOKENS)
    first = CHATTY
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        tokens = written(engine, first, 180)
    assert len(first) + len(tokens) > 4 * PAGE_TOKENS, "the answer has states in its middle and behind it"
    for ids, kept in ((first, len(first) - LAST_TOKENS), ([*first, *tokens[:120], 5], 3 * PAGE_TOKENS)):
        with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
            assert answer(engine, ids, 1)[1] == kept


def test_a_prompt_with_a_part_of_a_long_answer_continues_behind_the_prompt(tmp_path: Path) -> None:
    first = CHATTY
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        tokens = written(engine, first, 300)
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        assert answer(engine, [*first, *tokens[:200], 5], 1)[1] == len(first) - LAST_TOKENS


def test_a_state_is_not_written_without_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, part = PageFolder.write, 90 - LAST_TOKENS - PAGE_TOKENS

    def write_others(folder: PageFolder, name: bytes, depth: int, payload: Payload, *rest: Any) -> int:
        return 0 if len(payload.data) == 32 * part else write(folder, name, depth, payload, *rest)

    monkeypatch.setattr(PageFolder, "write", write_others)
    with engine_with(tmp_path, runner=ToyStateRunner(), pages=60) as engine:
        written(engine, LONG[:90])
    assert len(files(tmp_path)) == 2, "the pages of the turn"


def test_a_damaged_state_is_computed_again(tmp_path: Path) -> None:
    with engine_with(tmp_path, runner=ToyStateRunner(size=4), pages=60) as engine:
        tokens = written(engine, LONG)
    (state,) = [path for path in files(tmp_path) if path.stat().st_size > 2 * ALIGNMENT]
    flip_bit(state, 5000)
    for damaged, kept in ((1, 0), (0, len(LONG))):
        with engine_with(tmp_path, runner=ToyStateRunner(size=4), pages=60) as engine:
            ids = [*LONG, *tokens, 5]
            assert kept - PAGE_TOKENS <= answer(engine, ids)[1] <= kept + len(tokens)
            assert engine.saved.traffic().damaged == damaged  # type: ignore[union-attr]
            wait_until(lambda: not engine.saved.writer.is_writing)  # type: ignore[union-attr]


def test_a_state_that_is_too_large_stops_no_other_turn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_folder, "MOST_BYTES", 2 * ALIGNMENT)
    with engine_with(tmp_path, runner=ToyStateRunner(size=4), pages=60) as engine:
        for number in range(3):
            written(engine, [number, *LONG])
    assert len(files(tmp_path)) >= 3 * (FULL // PAGE_TOKENS)
    assert all(path.stat().st_size == 2 * ALIGNMENT for path in files(tmp_path))
    assert "not kept" not in caplog.text


def test_a_state_that_has_left_memory_is_read_for_pages_that_are_there(tmp_path: Path) -> None:
    runner = ToyStateRunner(size=8)
    with engine_with(tmp_path, runner=runner, pages=30, most=1) as engine:
        tokens = written(engine, LONG)
        for number in range(1, 4):
            written(engine, [number] * 200)
        before = runner.computed
        assert answer(engine, [*LONG, *tokens, 5], 1)[1] >= len(LONG) - LAST_TOKENS
        assert runner.computed - before < 2 * PAGE_TOKENS


def test_a_state_that_has_no_room_is_not_read(tmp_path: Path) -> None:
    with engine_with(tmp_path, runner=ToyStateRunner(size=8), pages=60) as engine:
        tokens = written(engine, LONG)
    with engine_with(tmp_path, runner=ToyStateRunner(size=8), pages=9) as engine:
        assert answer(engine, [*LONG, *tokens, 5], 1)[1] == 0
        answer(engine, [3] * (9 * PAGE_TOKENS - 5), 3)  # no page is lost


# ----------------------------------------------------------------------------------------------------------------------


def test_memory_that_holds_one_conversation_serves_many(tmp_path: Path) -> None:
    with engine_with(tmp_path, pages=8, most=1) as engine:
        prompts = [[number, *LONG] for number in range(1, 7)]
        answers = [written(engine, ids) for ids in prompts]
        for ids, tokens in zip(prompts, answers, strict=True):
            _, cached = answer(engine, [*ids, *tokens, 5, 6], 1)
            assert cached == len(ids) + len(tokens) - 1


def test_keys_share_nothing_and_are_known_by_their_digests(tmp_path: Path) -> None:
    """A name that another key has got finds nothing; the same key under another name does."""
    with engine_with(tmp_path, keys={"anna": b"1", "ben": b"2"}) as engine:
        answer(engine, LONG, user="anna")
    with engine_with(tmp_path, keys={"anna": b"2", "carl": b"1"}) as engine:
        assert answer(engine, LONG, user="anna")[1] == 0
        assert answer(engine, LONG, user="carl")[1] == FULL
        assert answer(engine, LONG, user="")[1] == 0


def test_pages_of_another_model_are_not_found(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    with engine_with(tmp_path, binding=b"c" * 32) as engine:
        assert answer(engine, LONG)[1] == 0


def test_what_is_cut_short_by_a_damaged_page_is_computed(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    by_time = sorted(files(tmp_path), key=lambda path: -path.stat().st_mtime_ns)  # the first page is the latest
    flip_bit(by_time[3], 5000)
    with engine_with(tmp_path) as engine:
        assert answer(engine, LONG)[1] == 3 * PAGE_TOKENS
        assert engine.saved.traffic().damaged == 1  # type: ignore[union-attr]
    with engine_with(tmp_path) as engine:
        assert answer(engine, LONG)[1] == FULL, "it was written again"


def test_only_turns_that_have_got_an_answer_are_written(tmp_path: Path) -> None:
    with engine_with(tmp_path, runner=ToyRunner(fails_after=200)) as engine:
        stream = engine.stream(Request(tuple(LONG), 5))
        with pytest.raises(OSError, match="a disk failed"):
            next(iter(stream))
        assert stream.sequence.finish is Finish.FAILED
    assert not files(tmp_path)


def test_scores_of_a_prompt_are_computed_though_pages_are_there(tmp_path: Path) -> None:
    for _ in range(2):
        with engine_with(tmp_path) as engine:
            assert answer(engine, LONG[:100], 1, logprobs=0, scores_prompt=True)[1] == 0


@given(
    runs=st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(1, 90), st.booleans()), min_size=1, max_size=5),
            st.integers(4, 9),
            st.integers(0, 10_000),
        ),
        min_size=2,
        max_size=4,
    ),
    has_states=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_no_restart_and_no_fault_changes_an_answer(
    runs: list[tuple[list[tuple[list[int], int, bool]], int, int]], has_states: bool
) -> None:
    """In each run, requests that are computed together, some of them cancelled; after it, a file is damaged."""
    place = Path(tempfile.mkdtemp())
    try:
        for requests, pages, damage in runs:
            runner = ToyStateRunner(size=1) if has_states else ToyRunner()
            with engine_with(place, pages=pages, size=12 * 8192, runner=runner) as engine:
                streams = [engine.stream(Request(tuple(ids), most)) for ids, most, _ in requests]
                for stream, (ids, most, is_cancelled) in zip(streams, requests, strict=True):
                    if is_cancelled:
                        stream.sequence.cancel()
                    expected = answer_alone(ids, most, engine.context)
                    tokens = [*stream]
                    assert tokens == (expected[: len(tokens)] if is_cancelled else expected)
                assert not engine.sequences
                answer(engine, [3] * (PAGE_TOKENS * pages - 5), 3)  # no page is lost: it needs all of them
            if there := files(place):
                path = there[damage % len(there)]
                flip_bit(path, damage % path.stat().st_size)
    finally:
        shutil.rmtree(place)


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


def test_others_are_computed_while_pages_are_read(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    order = Waiting()
    order.may_write.set()
    with engine_with(tmp_path, order=order) as engine:
        first = iter(engine.stream(Request((5, 6, 7), 900)))
        next(first)
        slow = engine.stream(Request(tuple(LONG), 3))
        assert order.asked.wait(PATIENCE)
        begun = [next(first) for _ in range(20)]
        assert slow.sequence.began is None
        order.may_read.set()
        assert [*slow] == answer_alone(LONG, 3, 1000)
        assert slow.sequence.cached == FULL
        assert [*begun, *first] == answer_alone([5, 6, 7], 900, 1000)[1:]


def test_a_disk_that_hangs_stops_neither_requests_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    monkeypatch.setattr(page_fetch, "READ_SECONDS", 0.2)
    monkeypatch.setattr(saved_pages, "CLOSING", 0.2)
    order = Waiting()
    order.may_write.set()
    try:
        begin = time.monotonic()
        with engine_with(tmp_path, order=order) as engine:
            assert answer(engine, LONG)[1] == 0
        assert time.monotonic() - begin < PATIENCE / 2, "each read waits for twice as long"
    finally:
        order.may_read.set()


def test_reads_that_can_not_begin_keep_no_page(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    with engine_with(tmp_path, pages=8) as engine:
        assert answer(engine, LONG[:100])[1]
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(engine.saved.reader, "read", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                answer(engine, LONG)
        answer(engine, [3] * (8 * PAGE_TOKENS - 5), 3)  # it needs all pages


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "cancelled"])
def test_reading_ends_if_nothing_wants_it(tmp_path: Path, is_closed: bool) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)
    order = Waiting()
    order.may_write.set()
    with engine_with(tmp_path, order=order) as engine:
        ended = threading.Event()
        sequence = engine.submit(Request(tuple(LONG), 3), lambda _: None, lambda _: ended.set())
        assert order.asked.wait(PATIENCE)
        if is_closed:
            threading.Timer(0.2, order.may_read.set).start()
        else:
            sequence.cancel()
            assert ended.wait(PATIENCE)
            order.may_read.set()
            assert answer(engine, LONG)[1] == FULL
    assert sequence.finish is Finish.CANCELLED


def test_a_page_that_is_evicted_before_it_is_written_is_lost(tmp_path: Path) -> None:
    order = Waiting()
    order.may_read.set()
    with engine_with(tmp_path, pages=8, order=order, most=1) as engine:
        for number in range(1, 5):
            answer(engine, [number, *LONG])
        order.may_write.set()
    with engine_with(tmp_path) as engine:
        found = [answer(engine, [number, *LONG])[1] for number in range(1, 5)]
        assert found[3] == FULL, "the last one was still there"
        assert found[1] < PAGE_TOKENS


def test_pages_are_written_at_a_limited_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_writer, "RATE", 7 * 8192)
    with engine_with(tmp_path) as engine:
        begin = time.monotonic()
        answer(engine, LONG)
        wait_until(lambda: len(files(tmp_path)) == 7)
        assert time.monotonic() - begin > 0.8, "they take a second, but for the pause after the last one"


def test_pages_are_written_though_reads_never_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_writer, "MOST_WAIT", 0.05)
    order = MissOrder()
    with engine_with(tmp_path, order=order) as engine, order.waiting_for_records():
        answer(engine, LONG)
        wait_until(lambda: len([path for path in files(tmp_path) if path.suffix == ".page"]) == 7)


def test_pages_that_are_too_old_are_removed_though_the_server_is_never_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_writer, "SWEEP_SECONDS", 0.05)
    with engine_with(tmp_path) as engine:
        written(engine, [8, *LONG])
        for path in (old := files(tmp_path)):
            os.utime(path, (0, 0))
        while any(path.exists() for path in old):
            answer(engine, LONG, 2)


def test_pages_that_are_too_old_are_removed_while_a_turn_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_writer, "SWEEP_SECONDS", 0.0)
    order, before = Waiting(), list[list[Path]]()
    order.may_read.set()

    def wait_to_write(_: object) -> None:
        before.append([path for path in files(tmp_path) if path.suffix == ".page"])
        if len(before) == 2:
            os.utime(before[1][0], (0, 0))

    monkeypatch.setattr(order, "wait_to_write", wait_to_write)
    with engine_with(tmp_path, order=order) as engine:
        written(engine, LONG)
    assert [len(paths) for paths in before[:3]] == [0, 1, 1]
    assert before[2] != before[1]


def test_a_failed_sweep_is_logged_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: PageFolder) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(PageFolder, "sweep", fail)
    with engine_with(tmp_path):
        wait_until(lambda: bool(caplog.messages))
    assert caplog.messages == [f"Old keys and values are not removed in {tmp_path}: Input/output error."]


def test_a_process_ends_though_a_disk_hangs() -> None:
    """Threads that Python waits for would keep it."""
    script = """
import sys, threading
from moetier.runtime.engine.page_reader import Readers
begun, readers = threading.Event(), Readers()
for _ in range(5):
    last = readers.submit(lambda: begun.set() or threading.Event().wait())
assert begun.wait(20)
assert not readers.close(0.1)
assert last.cancelled()
assert readers.submit(print).cancelled()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)


def test_closing_ends_in_time_though_many_turns_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_pages, "CLOSING", 0.5)
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:  # a busy machine may need longer by itself
        order = Waiting()
        order.may_read.set()
        with engine_with(folder, pages=200, order=order) as engine:
            for number in range(1, 21):
                answer(engine, [number, *LONG], 2)
            monkeypatch.setattr(order, "wait_to_write", lambda _: time.sleep(0.4))  # a slow disk
            order.may_write.set()
            begin = time.monotonic()
        if time.monotonic() - begin < 4 and files(folder):
            return
    pytest.fail("a page of each turn takes 8 seconds")


def test_pages_that_do_not_fit_are_computed_and_written_again(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        answer(engine, LONG)

    class Other(ToyRunner):
        def restore_page(self, *_: object) -> bool:
            return False

    order = Waiting()
    order.may_read.set()
    with engine_with(tmp_path, runner=Other(), order=order) as engine:
        assert answer(engine, LONG)[1] == 0
        assert len(files(tmp_path)) == 6, "the first page was removed"
        order.may_write.set()
    assert len(files(tmp_path)) == 7


def test_a_full_disk_changes_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mounted("tmpfs", tmp_path / "disk", "mode=700,size=40k") as disk:
        for _ in range(2):
            with engine_with(disk / "pages") as engine:
                answer(engine, LONG)
        assert "No space left" in caplog.text
        assert not [path for path in files(disk) if path.suffix != ".page"]


def test_a_read_only_disk_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mounted("tmpfs", tmp_path / "disk", "mode=700") as disk:
        with engine_with(disk / "pages") as engine:
            answer(engine, LONG)
        with remounted(disk, "ro"), engine_with(disk / "pages") as engine:
            assert answer(engine, LONG)[1] == FULL
            answer(engine, [3, *LONG])
        assert "Read-only" in caplog.text


def test_two_engines_share_a_folder(tmp_path: Path) -> None:
    with engine_with(tmp_path) as one, engine_with(tmp_path) as other:
        for number, engine in enumerate((one, other, one, other)):
            tokens = written(engine, [number % 2 + 1, *LONG])
        assert answer(one, [2, *LONG, *tokens, 5])[1] == len(LONG) + len(tokens)
        assert answer(other, [1, *LONG])[1] == FULL


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path) -> None:
    with engine_with(tmp_path / "pages") as engine:
        written(engine, LONG)
        for path in files(tmp_path / "pages"):
            path.unlink()
        answer(engine, [*LONG, 5])
    assert len(files(tmp_path / "pages")) == 7


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(3):
        with engine_with(tmp_path) as engine:
            answer(engine, LONG)
    assert len([*Path("/proc/self/fd").iterdir()]) <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moetier-page")]
