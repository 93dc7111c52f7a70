"""Tests of ``engines.py`` on small models."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from engines import PeerError, Run, accelerate_decode, llama_logits, llama_quantize, llama_run
from gguf_export import export_gguf

from moetier.tiers.errors import ConfigError
from moetier.tools.bench.sandbox import forget, memory_group
from moetier.tools.synthetic.checkpoint import GEOMETRIES, read_tokens
from moetier.tools.synthetic.tensors import make_synthetic

HAS_LLAMA = all(importlib.util.find_spec(name) is not None for name in ("gguf", "llama_cpp"))
needs_llama = pytest.mark.skipif(not HAS_LLAMA, reason="gguf or llama-cpp-python is not installed")
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
MIB = 1 << 20


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(GEOMETRIES, "mixtral-4L", GEOMETRIES["mixtral-4L"] | SMALL)
    make_synthetic(tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def gguf(checkpoint: Path) -> Path:
    target = checkpoint.with_name("model.gguf")
    export_gguf(checkpoint, target)
    return target


@pytest.fixture(scope="module")
def limits() -> None:
    try:
        with memory_group(1 << 30):
            pass
    except ConfigError as error:
        pytest.skip(error.cause)


@needs_llama
@pytest.mark.parametrize("repack", [False, True])
def test_llama_is_timed_behind_its_warmup(gguf: Path, checkpoint: Path, repack: bool) -> None:
    ids = read_tokens(checkpoint)[:20]
    for run in (
        llama_run(gguf, ids, threads=1, repack=repack, warmup=4),
        llama_run(gguf, ids, together=True, threads=1, repack=repack, warmup=4),
    ):
        assert run.tokens == 16
        assert run.tokens_per_s == 16 / run.seconds > 0
        assert run.peak_bytes > gguf.stat().st_size


@needs_llama
@pytest.mark.usefixtures("limits")
def test_the_limit_is_the_processs(gguf: Path, checkpoint: Path) -> None:
    ids = read_tokens(checkpoint)[:8]
    assert llama_run(gguf, ids, threads=1, limit=192 * MIB).peak_bytes <= 192 * MIB
    with pytest.raises(PeerError, match="killed for memory"):
        llama_run(gguf, ids, threads=1, limit=8 * MIB)


@needs_llama
def test_a_file_that_is_none_is_reported(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(PeerError, match=r"llama\.cpp ended with status 1: .*can't be loaded"):
        llama_logits(tmp_path / "no.gguf", [1])


@needs_llama
def test_its_quantiser_makes_what_the_export_makes(checkpoint: Path, tmp_path: Path) -> None:
    """Every matrix in Q4_0, in a file of the same size; rounding may differ in ties."""
    from gguf import GGMLQuantizationType, GGUFReader

    half, made, wanted = (tmp_path / f"{name}.gguf" for name in ("half", "made", "wanted"))
    export_gguf(checkpoint, half, ggml_type="F16")
    export_gguf(checkpoint, wanted)
    seconds, peak = llama_quantize(half, made, threads=1)
    assert seconds > 0
    assert peak > 0
    quantised, expected = ({t.name: t for t in GGUFReader(path).tensors} for path in (made, wanted))
    assert quantised.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (quantised[name].tensor_type, list(quantised[name].shape)) == (tensor.tensor_type, list(tensor.shape)), (
            name
        )
        assert (quantised[name].data == tensor.data).mean() > 0.99, name
    assert GGMLQuantizationType.Q4_0 in {tensor.tensor_type for tensor in quantised.values()}
    with pytest.raises(PeerError, match="can't be quantised"):
        llama_quantize(tmp_path / "none.gguf", tmp_path / "out.gguf", threads=1)


def test_what_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(PeerError, match=r"not installed .*'llama_cpp'") as raised:
        llama_logits(tmp_path / "model.gguf", [1])
    assert ".[peers]" in raised.value.fix


@pytest.mark.slow
def test_accelerate_computes_with_weights_from_the_disk(checkpoint: Path, tmp_path: Path) -> None:
    ids = read_tokens(checkpoint)[:6]
    (tmp_path / "scratch").mkdir()
    run = accelerate_decode(checkpoint, ids, threads=1, resident=8 * MIB, warmup=2, scratch=tmp_path / "scratch")
    assert run.tokens == 4
    assert run.seconds > 0
    assert not list((tmp_path / "scratch").iterdir())


def test_a_run_is_tokens_by_seconds() -> None:
    assert Run(tokens=10, seconds=4.0, peak_bytes=1).tokens_per_s == 2.5


@pytest.mark.usefixtures("limits")
def test_what_is_forgotten_is_charged_to_the_next_reader(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "file"
    file.write_bytes(bytes(32 * MIB))
    with file.open() as stream:
        os.fsync(stream.fileno())
    peaks = []
    for path in (None, file, file.parent):
        file.read_bytes()
        if path is not None:
            forget(path)
        with memory_group(256 * MIB) as group:
            assert group.run(["cat", str(file)]).returncode == 0
            peaks.append(group.peak)
    assert peaks[0] < 16 * MIB
    assert min(peaks[1:]) > 30 * MIB
