"""Answers that fail, in this process."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from http_servers import answering

pytest.importorskip("starlette", reason='pip install ".[serve]"')

import moetier
from moetier.tiers.store.folder import store_folder

PROMPT = "parola-segreta"


def test_a_damaged_record_fails_an_answer_and_says_so_in_the_log(
    tinymix_4bit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from moetier.runtime.engine.sequence import Request
    from moetier.tools.serve.answers import AnswerService, Job
    from moetier.tools.serve.protocols.refusal import FAILED, Refusal

    damaged = tmp_path / "damaged"
    shutil.copytree(tinymix_4bit, damaged)
    for shard in store_folder(damaged).rglob("c/*/*/*"):
        content = bytearray(shard.read_bytes())
        places = slice(100, len(content) - 8192, 4096)  # the index at its end stays whole
        content[places] = bytes(255 - byte for byte in content[places])
        shard.write_bytes(content)
    model, tokenizer = moetier.load(damaged, daemon=None)

    async def answer(service: AnswerService) -> list[Any]:
        ids = tokenizer(PROMPT)["input_ids"]  # type: ignore[misc]
        return [piece async for piece in service.submit(Job(Request(tuple(ids), 4))).events()]

    with model.tiers, answering(model, tokenizer, context=64) as service:
        for _ in range(2):
            with pytest.raises(Refusal, match=re.escape(FAILED)):
                asyncio.run(answer(service))
        counts = service.tally.counts()
        assert [counts[name] for name in ("answered", "cancelled", "failed", "under_way")] == [0, 0, 2, 0]
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("ChecksumError: " in error and PROMPT not in error for error in errors)
