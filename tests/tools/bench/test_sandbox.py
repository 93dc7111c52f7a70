"""Work in processes and control groups of its own: what goes wrong there."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import pytest
from cgroups import memory_limit
from checkpoints import edit_json
from prepared import as_python

from moetier.tiers.errors import BudgetError, ConfigError, MoetierError
from moetier.tools.bench import sandbox
from moetier.tools.bench.sandbox import drop_page_cache, fresh
from moetier.tools.bench.token_ids import fixed_ids, read_ids
from moetier.tools.rates.hardware import Machine

MIB = 1 << 20


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "DROP_CACHES", Path("/nonexistent/drop"))  # others use this machine's, too


def test_a_group_that_cannot_be_made_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "VERSION_1", tmp_path / "nothing")
    monkeypatch.setattr(sandbox, "VERSION_2", tmp_path / "nothing")
    with pytest.raises(ConfigError) as caught:
        fresh({"work": "idle"}, limit=MIB)
    assert "nothing" in caught.value.cause
    assert "root" in caught.value.fix


def test_a_process_that_was_killed_for_memory_is_named() -> None:
    with memory_limit(MIB):
        pass
    with pytest.raises(BudgetError, match=r"ran out of memory.*24 MiB"):
        fresh({"work": "idle"}, limit=24 * MIB)


def test_a_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ConfigError, match=r"did not end within 0 s"):
        fresh({"work": "idle"}, seconds=0.01)


def test_an_error_of_the_child_is_the_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(as_python(tmp_path)))
    work = {"work": "model", "directory": str(tmp_path), "ids": [[1]], "pieces": [1], "measured": 1}
    with pytest.raises(MoetierError, match=r"has no experts\.zarr"):
        fresh(work)
    with pytest.raises(ConfigError, match="KeyError: 'nothing'"):
        fresh({"work": "nothing"})


def test_what_is_dropped_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    (tmp_path / "drop").write_text("")
    assert drop_page_cache([tmp_path / "file"], whole=True).endswith("is not permitted")
    monkeypatch.setattr(sandbox, "DROP_CACHES", tmp_path / "drop")
    assert drop_page_cache([], whole=False) == "dropped for the model's files"
    assert (tmp_path / "drop").read_text() == ""
    assert drop_page_cache([], whole=True) == "dropped"
    assert (tmp_path / "drop").read_text() == "1"


def test_ids_of_a_list_and_of_an_object(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    for text in ("[3, 4]", '{"seed": 0, "token_ids": [3, 4]}'):
        path.write_text(text)
        assert read_ids(path) == [3, 4]
    for text in ("[]", "[3, -1]", "[true]", '{"ids": [3]}', "3", "[[3]]", "["):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"tokens\.json"):
            read_ids(path)


def test_ids_of_a_text_are_repeated(tinymix_4bit: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (text := tmp_path / "text.txt").write_text("Quel ramo del lago di Como")
    arguments = argparse.Namespace(directory=tinymix_4bit, prompt_file=text, tokens_file=None)
    ids = AutoTokenizer.from_pretrained(tinymix_4bit)(text.read_text()).input_ids
    several, source = fixed_ids(arguments, sequences=2, length=len(ids))
    assert (several, source) == ([ids, ids], str(text))


def test_a_vocabulary_of_unknown_size_has_no_random_ids(tinymix_4bit: Path, tmp_path: Path) -> None:
    shutil.copy(tinymix_4bit / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", vocab_size=None)
    arguments = argparse.Namespace(directory=tmp_path, prompt_file=None, tokens_file=None)
    with pytest.raises(ConfigError, match="gives no vocabulary size"):
        fixed_ids(arguments, sequences=1, length=1)


def test_a_machine_says_what_it_is(tmp_path: Path) -> None:
    machine = Machine.here(threads=2, place=tmp_path, fio="3.39")
    assert machine.versions.keys() >= {"python", "moetier", "torch", "transformers", "fio"}
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert f"{machine.cores} cores, 2 threads" in machine.text()
    assert machine.disk
