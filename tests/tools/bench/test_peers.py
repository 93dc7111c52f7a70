"""``moetier bench peers`` on tinymix, with the engines that are installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from moetier.tools.bench import sandbox
from moetier.tools.bench.gguf_export import export_gguf
from moetier.tools.main import main

HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "DROP_CACHES", Path("/nonexistent/drop"))  # others use this machine's, too


@pytest.mark.skipif(not HAS_LLAMA, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("prefill", [False, True])
def test_llama_cpp_beside_moetier(tinymix: Path, tinymix_4bit: Path, tmp_path: Path, prefill: bool) -> None:
    export_gguf(tinymix, tmp_path / "model.gguf")
    words = [str(tinymix_4bit), "--gguf", str(tmp_path / "model.gguf"), "--tokens", "4", "--warm", "2", "--rounds", "1"]
    words += ["--threads", "1", "--json", str(tmp_path / "found.json"), *["--prefill"] * prefill]
    assert main(["bench", "peers", *words]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    results = {result["engine"]: result for result in found["results"]}
    assert [*results] == ["moetier", "llama.cpp, mapped", "llama.cpp, repacked"]
    assert results["moetier"]["ratio"] == 1.0
    for result in results.values():
        expected = results["moetier"]["tokens_per_s"]["median"] / result["tokens_per_s"]["median"]
        assert result["ratio"] == pytest.approx(expected)
        assert result["peak_bytes"] > 0


def test_without_a_peer_there_is_nothing_to_measure(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", str(tinymix_4bit)]) == 2
    assert "--gguf" in capsys.readouterr().err
    assert main(["bench", "peers", str(tinymix_4bit), "--checkpoint", "x", "--prefill"]) == 2
