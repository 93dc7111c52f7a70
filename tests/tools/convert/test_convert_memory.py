"""What a conversion takes: a few experts, whatever the size of a block or of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cgroups import memory_limit

from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.options import Options
from moetier.tools.synthetic.checkpoint import COMMON, GEOMETRIES
from moetier.tools.synthetic.tensors import make_synthetic

pytestmark = pytest.mark.slow

GIB = 1 << 30
ALLOCATOR_BYTES = 64 << 20  # glibc's arenas, one for each thread, and what they keep
COMMAND = [sys.executable, "-m", "moetier.tools.main"]


def run(*arguments: str | Path) -> dict[str, Any]:
    command = [*COMMAND, *map(str, arguments), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def fast(bits: int) -> list[str]:
    """The solver takes time, and no memory that rounding does not take."""
    return ["--bits", str(bits)] + (["--fast"] if bits != 16 else [])


def weights_of(source: Path) -> tuple[int, int]:
    """(of one expert, of one block)."""
    plan = Conversion.plan(open_safetensors(source), source / "x", Options(bits=16)).target.manifest
    return plan.layout(0).weights, plan.layout(0).weights * plan.blocks[0].experts


@pytest.mark.parametrize("bits", [16, 4])
def test_the_peak_is_what_was_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: Any) -> None:
    """A block of 288 MiB, of 96 experts, beside one of 6 MiB: what the interpreter takes is the machine's."""
    wide = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 96}
    source, small = tmp_path / "src", tmp_path / "small"
    for folder, experts in ((small, 16), (source, 96)):
        few = {"hidden_size": 128} if folder is small else {}
        monkeypatch.setitem(GEOMETRIES, "qwen3-8L", GEOMETRIES["qwen3-8L"] | wide | few | {"num_experts": experts})
        make_synthetic(folder, geometry="qwen3-8L", blocks=1)
    said = Conversion.plan(open_safetensors(source), tmp_path / "dst", Options(bits, workers=2)).encoder.peak_bytes
    _, block = weights_of(source)
    idle, peak = (
        run("convert", folder, tmp_path / f"dst-{folder.name}", *fast(bits), "--workers", 2)["peak_bytes"]
        for folder in (small, source)
    )
    print(f"{bits} bits: {(peak - idle) >> 20} MiB more; said before: {said >> 20} MiB; a block: {2 * block >> 20} MiB")
    assert peak - idle < said + ALLOCATOR_BYTES < 2 * block / 2


@pytest.mark.parametrize(("geometry", "bits"), [("qwen3-8L", 4), ("qwen3-8L", 16), ("mixtral-4L", 16)])
def test_the_peak_is_two_experts_in_fp32_and_one_gib(tmp_path: Path, geometry: str, bits: int) -> None:
    """One block is 1.1 GiB (128 experts) or 2.6 GiB (8 experts) in bf16."""
    make_synthetic(tmp_path / "src", geometry=geometry, blocks=1)
    expert, block = weights_of(tmp_path / "src")
    report = run("convert", tmp_path / "src", tmp_path / "dst", *fast(bits))
    print(f"{geometry}, {bits} bits: peak {report['peak_bytes'] / GIB:.2f} GiB; a block is {2 * block / GIB:.2f} GiB")
    assert report["peak_bytes"] < 2 * 4 * expert + GIB


@pytest.mark.timeout(3600)
def test_six_billion_parameters_in_two_gib(tmp_path: Path) -> None:
    """mixtral-4L is converted, and generates, in a control group of 2 GiB; one of its blocks is 2.6 GiB."""
    assert COMMON["dtype"] == "bfloat16"
    source, target = tmp_path / "src", tmp_path / "dst"
    make_synthetic(source)
    with memory_limit(2 * GIB) as group:
        result = group.run([*COMMAND, "convert", str(source), str(target), "--json"])
        assert result.returncode == 0, result.stderr
        peak = json.loads(result.stdout)["peak_bytes"]
        print(f"convert: peak {peak / GIB:.2f} GiB, with files {group.peak / GIB:.2f} GiB")
    with memory_limit(2 * GIB) as group:
        result = group.run([*COMMAND, "generate", str(target), "To be", "--max-new-tokens", "8", "--json"])
        assert result.returncode == 0, result.stderr
        print(f"generate: peak with files {group.peak / GIB:.2f} GiB")
