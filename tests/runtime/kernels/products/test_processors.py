"""Code for processors that this machine may lack."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from coded_records import blocks, projection
from places import HELPERS

from moetier.runtime.kernels.jit.emitter import BF16, FP32
from moetier.runtime.kernels.jit.processor import Dot, Processor
from moetier.runtime.kernels.products.gemm import product_module, variant_of
from moetier.runtime.kernels.products.gemm_tile import PackedVariant

AVX_VNNI = "+avx2,+fma,+avxvnni"


@pytest.mark.parametrize(
    ("features", "dot"),
    [
        ("+avx2,+avxvnni,+avx512bw,+avx512vnni", Dot.AVX512_VNNI),
        ("+avx2,+avxvnni,+avx512f", Dot.AVX_VNNI),
        ("+avx2,+avx512bw", Dot.AVX2),
        ("+sse4.2", Dot.PLAIN),
    ],
)
def test_the_fastest_instructions_are_chosen(features: str, dot: Dot) -> None:
    assert Processor(features).dot is dot


def test_avx_vnni_multiplies_in_registers_of_256_bits() -> None:
    processor = Processor(AVX_VNNI)
    code, machine = processor.optimised(product_module(PackedVariant(8, 64, "bfloat16", BF16), processor))
    assembly = machine.emit_assembly(code)
    assert re.search(r"\{vex\}\s+vpdpbusd\s.*%ymm", assembly)
    assert "zmm" not in assembly
    assert "vpmaddubsw" not in assembly  # its sums of 16 bits saturate


def test_avx512_multiplies_rows_of_a_checkpoint_in_registers_of_512_bits() -> None:
    processor = Processor("+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni")
    coded = [projection(coding, 64, 96, group=32, scales="e8m0") for coding in ("e2m1", "e4m3")]
    for p in (*coded, *blocks("q8_0", 64, 96)[0].projections):
        code, machine = processor.optimised(product_module(variant_of(p, FP32), processor), unroll=False)
        assembly = machine.emit_assembly(code)
        product = r"vmulps\s.*%zmm" if p.coding == "e4m3" else r"vpdpbusd\s.*%zmm"
        for instruction in (product, r"vpshufb\s.*%zmm") if p.coding == "e2m1" else (product,):
            assert re.search(instruction, assembly)


COMPARE = """
import ctypes, sys
from pathlib import Path
library, features, folder = sys.argv[1:]
sys.path.insert(0, folder)
import torch
from coded_records import blocks, coded, projection
from quantised_records import quantised
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.runtime.kernels.jit.processor import Processor
from moetier.tiers.layout import GGUF_BLOCKS
emulator = ctypes.CDLL(library)
emulator.install()
torch.set_num_threads(1)
here, there = PackedKernels(), PackedKernels(Processor(features))
made = {bits: quantised(bits, 70, 256, 64, "bfloat16") for bits in (8, 4, 3, 2)}
for coding, scales in (("e2m1", "e8m0"), ("int4", "bfloat16"), ("e4m3", "float32")):
    made[coding] = coded(projection(coding, 70, 256, group=32, scales=scales))
made |= {coding: blocks(coding, 70, 256) for coding in GGUF_BLOCKS}
for form, (layout, record) in made.items():
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))
    x[1] = 1.0  # all are rounded to 127
    full = record.clone()  # all codes are as large as they can be
    for section in layout.sections:
        if not section.name.endswith(("pairs", "pair_scales", "scales")):
            full[section.offset : section.offset + section.nbytes] = {"e2m1": 0x77, "q8_0": 0x80}.get(form, 255)
    for edge in (record, full):
        for rows in (x, x[:1]):
            ours, theirs = (kernels.project(rows, edge, layout, "up_proj") for kernels in (here, there))
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), form
print(emulator.emulated(), "avx_vnni" in Path("/proc/cpuinfo").read_text())
"""


@pytest.mark.slow
def test_avx_vnni_makes_the_same_bits(tmp_path: Path) -> None:
    """On other processors each instruction that is missing is computed by a handler of its fault."""
    if not (compiler := shutil.which("gcc")):
        pytest.skip("no gcc to compile the emulator of AVX-VNNI with")
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("only AVX-VNNI is emulated, not AVX2")
    library = tmp_path / "emulated_vnni.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", HELPERS / "emulated_vnni.c", "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, library, AVX_VNNI, HELPERS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    emulated, native = done.stdout.split()
    assert native == "True" or int(emulated) > 0
