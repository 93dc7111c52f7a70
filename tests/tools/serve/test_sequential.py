"""Answers that fail, in this process."""

from __future__ import annotations

import asyncio
import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("fastapi", reason='pip install ".[serve]"')

import moetier
from moetier.tiers.store.folder import store_folder

PROMPT = "parola-segreta"


def test_a_damaged_record_fails_an_answer_and_says_so_in_the_log(
    tinymix_4bit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from moetier.tools.serve.params import FAILED, Wanted
    from moetier.tools.serve.sequential import OneByOne

    damaged = tmp_path / "damaged"
    shutil.copytree(tinymix_4bit, damaged)
    for shard in store_folder(damaged).rglob("c/*/*/*"):
        content = bytearray(shard.read_bytes())
        places = slice(100, len(content) - 8192, 4096)  # the index at its end stays whole
        content[places] = bytes(255 - byte for byte in content[places])
        shard.write_bytes(content)
    model, tokenizer = moetier.load(damaged, daemon=None)

    async def answer(manager: Any) -> list[Any]:
        config = copy.deepcopy(model.generation_config)
        config.max_new_tokens = 4
        inputs = {"input_ids": tokenizer(PROMPT)["input_ids"]}  # type: ignore[misc]
        queue, _ = manager.generate_streaming(model, tokenizer, inputs, Wanted(config), "1")
        return [await queue.get()]

    with model.tiers:
        manager = OneByOne(model, 64, 16)
        try:
            for _ in range(2):
                (found,) = asyncio.run(answer(manager))
                assert found.msg == FAILED
        finally:
            manager.stop()
        tallied = manager.tally.tallied()
        assert (tallied.requests, tallied.under_way) == ({"answered": 0, "cancelled": 0, "failed": 2}, 0)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("ChecksumError: " in error and PROMPT not in error for error in errors)
