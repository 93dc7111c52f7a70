"""Tests of ``peers.py`` and ``quantiser.py`` on tinymix, with the engines that are installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import peers
import pytest
import quantiser
from gguf_export import export_gguf

from moetier.tools.bench import convert, sandbox
from moetier.tools.synthetic.checkpoint import shapes_of

HAS_LLAMA = all(importlib.util.find_spec(name) is not None for name in ("gguf", "llama_cpp"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "DROP_CACHES", Path("/nonexistent/drop"))  # others use this machine's, too


@pytest.mark.skipif(not HAS_LLAMA, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("prefill", [False, True])
def test_llama_cpp_beside_moetier(tinymix: Path, tinymix_4bit: Path, tmp_path: Path, prefill: bool) -> None:
    export_gguf(tinymix, tmp_path / "model.gguf")
    words = [str(tinymix_4bit), "--gguf", str(tmp_path / "model.gguf"), "--tokens", "4", "--warm", "2", "--rounds", "1"]
    words += ["--threads", "1", "--json", str(tmp_path / "found.json"), *["--prefill"] * prefill]
    assert peers.main(words) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    results = {result["engine"]: result for result in found["results"]}
    assert [*results] == ["moetier", "llama.cpp, mapped", "llama.cpp, repacked"]
    assert results["moetier"]["ratio"] == 1.0
    for result in results.values():
        expected = results["moetier"]["tokens_per_s"]["median"] / result["tokens_per_s"]["median"]
        assert result["ratio"] == pytest.approx(expected)
        assert result["peak_bytes"] > 0


def test_without_a_peer_there_is_nothing_to_measure(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main([str(tinymix_4bit)]) == 2
    assert "--gguf" in capsys.readouterr().err
    assert peers.main([str(tinymix_4bit), "--checkpoint", "x", "--prefill"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LLAMA, reason="gguf or llama-cpp-python is not installed")
def test_convert_beside_llama_cpp(tinymix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It quantises every matrix but the gates."""
    monkeypatch.setattr(convert, "DISK_SECONDS", 0.1)
    into = tmp_path / "into"
    into.mkdir()
    written = tmp_path / "found.json"
    assert quantiser.main([str(tinymix), "--rounds", "1", "--into", str(into), "--json", str(written)]) == 0
    _, fast, llama = json.loads(written.read_text())["results"]
    assert llama["way"] == "llama.cpp Q4_0"
    assert llama.keys() == fast.keys()
    shapes = shapes_of(json.loads((tinymix / "config.json").read_text()) | {"head_dim": 32})
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and not name.endswith(".gate.weight")]
    assert llama["weights"] == sum(rows * columns for rows, columns in matrices)
    assert 2 * llama["weights"] < llama["source_bytes"] < 2.1 * llama["weights"]
    assert llama["fast_times_as_fast"] == fast["weights_per_s"]["median"] / llama["weights_per_s"]["median"]
    assert not any(into.iterdir())


def test_its_weights_have_four_bits(tinymix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantiser.main([str(tinymix), "--bits", "3"]) == 1
    assert "--bits is 3" in capsys.readouterr().err
