"""Answers that fail, in this process."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

import moetier
from moetier.tiers.store.folder import store_folder

PROMPT = "parola-segreta"


def test_a_damaged_record_fails_an_answer_and_says_so_in_the_log(
    tinymix_4bit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from moetier.tools.serve.engine import Job
    from moetier.tools.serve.refusal import FAILED, Refusal
    from moetier.tools.serve.sequential import OneByOne

    damaged = tmp_path / "damaged"
    shutil.copytree(tinymix_4bit, damaged)
    for shard in store_folder(damaged).rglob("c/*/*/*"):
        content = bytearray(shard.read_bytes())
        places = slice(100, len(content) - 8192, 4096)  # the index at its end stays whole
        content[places] = bytes(255 - byte for byte in content[places])
        shard.write_bytes(content)
    model, tokenizer = moetier.load(damaged, daemon=None)

    async def answer(engine: OneByOne) -> list[Any]:
        ids = tokenizer(PROMPT)["input_ids"]  # type: ignore[misc]
        return [piece async for piece in engine.submit(Job(ids, 4)).pieces()]

    with model.tiers:
        engine = OneByOne(model, tokenizer, 64, 16)
        with engine.running():
            for _ in range(2):
                with pytest.raises(Refusal, match=re.escape(FAILED)):
                    asyncio.run(answer(engine))
        counts = engine.tally.counts()
        assert [counts[name] for name in ("answered", "cancelled", "failed", "under_way")] == [0, 0, 2, 0]
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("ChecksumError: " in error and PROMPT not in error for error in errors)
