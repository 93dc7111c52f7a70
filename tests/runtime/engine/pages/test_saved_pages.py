"""With pages on disk, answers are the same: after restarts, evictions, faults and in any company."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from faults import flip_bit, mounted, remounted
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_engines import FULL, LONG, Waiting, answer, engine_with, files, written
from threads import wait_until
from toy_runner import ToyRunner, ToyStateRunner, answer_alone

from moetier.runtime.engine import kv_cache
from moetier.runtime.engine.kv_cache import LAST_TOKENS
from moetier.runtime.engine.pages import page_folder
from moetier.runtime.engine.pages.page_file import ALIGNMENT, Payload
from moetier.runtime.engine.pages.page_folder import PageFolder
from moetier.runtime.engine.sequence import Finish, Request
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

PROMPTS = [[*range(1, 100)], [*range(1, 70)], [*range(1, 65)], [7] * 150, [7] * 20, [9]]
CHATTY = [32, 45, *LONG[:88]]  # a prompt with a long answer


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
    monkeypatch.setattr(page_folder, "MAX_BYTES", 2 * ALIGNMENT)
    with engine_with(tmp_path, runner=ToyStateRunner(size=4), pages=60) as engine:
        for number in range(3):
            written(engine, [number, *LONG])
    assert len(files(tmp_path)) >= 3 * (FULL // PAGE_TOKENS)
    assert all(path.stat().st_size == 2 * ALIGNMENT for path in files(tmp_path))
    assert "not kept" not in caplog.text


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
@settings(max_examples=25, deadline=None)
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
