"""Products with AMX have the same bits as without it. It is not used where the system does not permit it."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from places import HELPERS
from prepared import Prepared
from quantised_records import quantised

from moetier.runtime.kernels.jit.emitter import BF16
from moetier.runtime.kernels.jit.processor import Processor, this_processor
from moetier.runtime.kernels.products.gemm import product_module
from moetier.runtime.kernels.products.gemm_amx import AmxTile
from moetier.runtime.kernels.products.gemm_tile import PackedVariant
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.testing import in_fork
from moetier.tiers.layout import Bits

VNNI = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni"
AMX = f"{VNNI},+amx-tile,+amx-int8"
FORMS: list[tuple[Bits, int, str]] = [
    (8, 64, "bfloat16"),
    (4, 16, "uint8"),
    (4, 64, "float16_zeros"),
    (3, 32, "bfloat16"),
    (2, 16, "uint8"),
    (2, 128, "uint8"),
]
SLOW = FORMS[1], FORMS[-1]
LEAST, MOST = AmxTile.least, AmxTile.most
ROWS = (LEAST - 1, LEAST, 15, 16, 17, 40, MOST, MOST + LEAST - 1, MOST + LEAST, 2 * MOST + 44)


@pytest.fixture
def amx() -> PackedKernels:
    if not this_processor().has_amx:
        pytest.skip("no AMX here")
    return PackedKernels()


@functools.cache
def without_amx() -> PackedKernels:
    return PackedKernels(Processor(VNNI))


@pytest.mark.parametrize(("features", "multiplies"), [(AMX, True), (VNNI, False), ("+avx2,+amx-tile,+amx-int8", False)])
def test_amx_is_used_beside_avx512(features: str, multiplies: bool) -> None:
    processor = Processor(features)
    code, machine = processor.optimised(product_module(PackedVariant(4, 64, "bfloat16", BF16), processor))
    assert ("tdpbssd" in machine.emit_assembly(code)) == processor.has_amx == multiplies


@pytest.mark.parametrize(
    ("bits", "group", "pairs"), [pytest.param(*form, marks=[pytest.mark.slow] * (form in SLOW)) for form in FORMS]
)
def test_the_bits_are_the_same(amx: PackedKernels, bits: Bits, group: int, pairs: str) -> None:
    layout, record = quantised(bits, 70, 512, group, pairs)
    full = record.clone()  # all codes are as large as they can be
    for section in layout.sections:
        if not section.name.endswith(("pairs", "pair_scales")):
            full[section.offset : section.offset + section.nbytes] = 255
    x = torch.randn(max(ROWS), 512, generator=torch.Generator().manual_seed(1))
    x[0] = 1.0  # all are rounded to 127
    x[1] = -1.0
    for edge in (record, full):
        expected = without_amx().project(x, edge, layout, "up_proj")
        for rows in ROWS:
            y = amx.project(x[:rows], edge, layout, "up_proj")
            assert torch.equal(y.view(torch.int32), expected[:rows].view(torch.int32)), rows


def test_several_records_with_few_and_many_rows(amx: PackedKernels) -> None:
    made = [quantised(4, 200, 256, 64, "bfloat16") for _ in range(4)]
    layout, records = made[0][0], [record.roll(64 * number) for number, (_, record) in enumerate(made)]
    counts = [3, 130, 9, 160]
    x = torch.randn(sum(counts), 256).bfloat16()
    products = [kernels.multiply(x, records, counts, layout, "up_proj") for kernels in (amx, without_amx())]
    assert torch.equal(*products)


def test_torchs_own_products_between_ours_stay_as_they_are(amx: PackedKernels) -> None:
    """oneDNN, which multiplies bf16 matrices for torch, configures the same tile registers in the same thread."""
    layout, record = quantised(4, 64, 512, 64, "bfloat16")
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    ours, theirs = amx.project(x, record, layout, "up_proj"), x @ w
    for rows in (64, 33, 16, 64, 9, 48) * 20:
        assert torch.equal(amx.project(x[:rows], record, layout, "up_proj"), ours[:rows])
        assert torch.equal(x @ w, theirs)
        assert torch.equal(amx.project(x, record, layout, "up_proj"), ours)
        assert (x[:rows] @ w - theirs[:rows]).abs().max() < 1


def test_a_forked_child_multiplies(amx: PackedKernels) -> None:
    layout, record = quantised(4, 128, 256, 64, "bfloat16")
    x = torch.randn(16, 256)
    y = amx.project(x, record, layout, "up_proj")
    assert in_fork(lambda: torch.equal(amx.project(x, record, layout, "up_proj"), y)) == "returned True"


OLDER_THREAD = """
import sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ThreadPoolExecutor
import torch
from quantised_records import quantised
from moetier.runtime.kernels.products.packed import PackedKernels
torch.set_num_threads(1)
with ThreadPoolExecutor(1) as pool:
    pool.submit(int).result()
    layout, record = quantised(4, 128, 256, 64, "bfloat16")
    kernels, x = PackedKernels(), torch.randn(16, 256)
    arguments = x, record, layout, "up_proj"
    print(torch.equal(kernels.project(*arguments), pool.submit(kernels.project, *arguments).result()))
"""


def test_a_thread_that_is_older_than_the_permission_multiplies(scripts: Prepared) -> None:
    result = scripts.run(OLDER_THREAD, HELPERS)
    assert (result.stdout, result.returncode) == ("True\n", 0), result.stderr


REFUSED = """
import ctypes
from moetier.runtime.kernels.jit.processor import Processor
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(1 << 16)
for size in (6144, len(memory)):
    stack = Stack(ctypes.addressof(memory), 0, size)
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
    print(Processor().has_amx)
"""


def test_amx_is_not_used_where_the_system_refuses_it(amx: PackedKernels) -> None:
    """Linux refuses it while a stack for signals is too small for AMX's registers."""
    result = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["False", "True"], result.stderr
