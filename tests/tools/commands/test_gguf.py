"""Commands that are given a GGUF file in place of a directory."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import stores  # noqa: F401  # starts zarr's thread outside the tests
from daemons import running_daemon
from faults import flip_bit

pytest.importorskip("gguf")

from gguf_files import mostly, tiny_weights, write_gguf

from moetier.runtime.model.load import load
from moetier.runtime.stores.checkpoint_store import table_of
from moetier.runtime.stores.registry import read_manifest
from moetier.tiers.layout import ExpertKey
from moetier.tools.commands.plan import text
from moetier.tools.main import main
from moetier.tools.plan.forecast import plan

PROMPT = "he said"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_K", "Q6_K"))


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["generate", *arguments, PROMPT, "--json", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_it_is_linked_and_every_byte_is_proved(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = hashlib.sha256(path.read_bytes()).digest()
    digest = table_of(path).manifest.digest
    alone = generated(capsys, str(path), "--ram", "1MiB")
    assert main(["link", str(path)]) == 0
    table = path.with_name("model.gguf.moetier-extents.json")
    assert table.exists()
    assert table_of(path).is_linked
    assert table_of(path).manifest.digest == digest
    assert generated(capsys, str(path), "--ram", "1MiB")["text"] == alone["text"]
    assert main(["verify", str(path)]) == 0
    assert "all good" in capsys.readouterr().out
    assert hashlib.sha256(path.read_bytes()).digest() == before
    (extent, *_) = table_of(path).extents(ExpertKey(1, 2))
    stamp = path.stat()
    flip_bit(path, extent.offset)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert main(["verify", str(path)]) == 1
    assert "expert 2: checksum mismatch" in capsys.readouterr().out


def test_it_is_shown_and_examined(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "q4_k" in shown
    assert "q6_k" in shown
    assert "tokenizer        there" in shown
    assert main(["doctor", str(path), "--json"]) in (0, 1)
    lines = json.loads(capsys.readouterr().out)["findings"]
    assert any("without checksums" in json.dumps(line) for line in lines)


@pytest.mark.usefixtures("short_probes")
def test_a_plan_has_it_as_the_one_choice(path: Path) -> None:
    found = plan(str(path), disk=1.0)
    (choice,) = found["choices"]
    assert choice["as_it_is"]
    assert choice["works"]
    assert found["recommended"]["convert"] is None
    assert choice["trunk_bits"] == found["recommended"]["trunk_bits"] == 8
    assert " at 8 bits\n" in text(found), "the trunk, which is in Q8_0"
    assert f"moetier chat {path}" in text(found)


def test_a_daemon_serves_it(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["link", str(path)]) == 0  # else a process of the daemon makes the table
    with running_daemon(path, ram="1MiB", folder=tmp_path / "daemon") as daemon:
        alone = generated(capsys, str(path), "--ram", "1MiB", "--daemon", "none")
        served = generated(capsys, str(path), "--daemon", str(daemon.folder))
        assert served["text"] == alone["text"]
        assert "daemon" in served["tiers"]


def test_it_talks(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("he said\nhello\n"))
    assert main(["chat", str(path), "--json", "--max-new-tokens", "4", "--ram", "1MiB"]) == 0
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["role"] for turn in turns] == ["assistant"] * 2


def test_a_server_answers_from_it(path: Path) -> None:
    pytest.importorskip("starlette", reason='pip install ".[serve]"')
    import httpx2
    from http_servers import serving

    async def ask(app: Any) -> Any:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000", timeout=60) as client:
            return await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2})

    with serving(path, context=100) as (app, _):
        answer = asyncio.run(ask(app))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("bits", ["native", "16", pytest.param("4", marks=pytest.mark.slow)])
def test_it_is_converted(bits: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the file's own form, or with 16 bits, the result computes what the file itself does."""
    target = tmp_path / "converted"
    assert main(["convert", str(path), str(target), "--bits", bits]) == 0
    assert main(["verify", str(target)]) == 0
    exact = generated(capsys, str(path), "--ram", "1MiB", "--exact")
    found = generated(capsys, str(target), "--ram", "4MiB", "--exact")
    if bits != "4":
        assert found["text"] == exact["text"]
    assert read_manifest(target).method == ("native" if bits == "native" else "hqq")
    model, tokenizer = load(target, ram="4MiB")
    with model.tiers:
        assert tokenizer is not None
        assert tokenizer.chat_template == load_template(path)
    assert main(["convert", str(path), str(target), "--bits", bits]) == 0
    assert "is complete" in capsys.readouterr().out


def test_by_default_a_conversion_keeps_its_coding(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Q8_0 alone, of 8 bits, is quantised to 4."""
    assert main(["convert", str(path), str(tmp_path / "kept")]) == 0
    assert "as the checkpoint has them: Q4_K in groups of 32 and Q6_K in groups of 16" in capsys.readouterr().err
    assert read_manifest(tmp_path / "kept").layouts == table_of(path).manifest.layouts
    large = write_gguf(tmp_path / "large.gguf", tiny_weights("qwen3moe"), mostly("Q8_0", "Q8_0"))
    assert main(["convert", str(large), str(tmp_path / "made")]) == 0
    assert read_manifest(tmp_path / "made").bits == 4


def load_template(path: Path) -> Any:
    model, tokenizer = load(path, ram="1MiB")
    model.tiers.close()
    return tokenizer.chat_template if tokenizer else None


def test_a_file_that_is_not_there_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "none.gguf"), PROMPT]) == 1
    assert "none.gguf" in capsys.readouterr().err
