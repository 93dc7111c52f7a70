"""Products with the projections of records, on one device. ``choice.py`` chooses, once for each device."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.tiers.errors import BudgetError, ConfigError
from moetier.tiers.layout import ROW_TILE, Projection, RecordLayout
from moetier.tiers.quant.codec import decode, sections

from . import gemm as product
from . import jit as native
from . import rounding
from .form import Form, Number

_NUMBERS = {torch.float32: Number.F32, torch.bfloat16: Number.BF16}  # others go through fp32


def moved_error(where: torch.device, device: torch.device) -> ConfigError:
    return ConfigError(
        f"The model was moved to {where}; its experts are on {device}.", "Load it on the device where it is to run."
    )


class Kernels:
    """y = x @ W.T for W in records, as torch does it. Any number of threads may call it: each keeps scratch memory of
    its own. The result is bit for bit what the ordinary module gives whose weights are the decoded ones in the type of
    x."""

    # (record [record bytes] uint8 on the device, layout) -> None: what is to be done with each record, once, in place,
    # before it is multiplied with
    arrange: Callable[[Tensor, RecordLayout], None] | None = None

    # takes memory of the device from its tier; returns how many bytes. The caller holds no lease
    make_room: Callable[[], int] = staticmethod(lambda: 0)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._local = threading.local()

    def packs(self, layout: RecordLayout) -> bool:
        """Whether all projections of a layout are multiplied where they lie."""
        return False

    def project(self, x: Tensor, record: Tensor, layout: RecordLayout, name: str, bias: Tensor | None = None) -> Tensor:
        """x [T, K], record uint8 [record bytes], bias [N] -> [T, N] in the type of x. None of the experts' biases is
        given here: their modules add them afterwards.

        16-bit weights of that type are multiplied where they lie; all others are decoded first.
        """
        p = projection_of(layout, name)
        stored = sections(record, layout).get(name)
        if stored is None or stored.dtype != x.dtype:
            stored = decode(record, layout, name, self._scratch(p.shape, x.dtype))
        if p.transposed:
            assert bias is None, "no module of this kind has one"
            return x @ stored
        return F.linear(x, stored, bias)

    def with_room(self, work: Callable[[], Tensor]) -> Tensor:
        """``work()``; where the device runs out of memory, once more with less memory for its tier. Raises BudgetError
        where that does not help."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            said = str(error)
        # not before: until the error is gone, its frames hold what was allocated
        freed = self.make_room()
        if freed:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                said = str(error)
        numbers = said.partition(" If reserved but")[0].partition("\n")[0]  # torch's advice on its allocator follows
        given = f"after its tier gave back {freed:,} bytes" if freed else "and its tier can't be smaller"
        raise BudgetError(
            f"The device ran out of memory, {given}: {numbers}",
            "Give its tier less (`device_memory`), compute fewer tokens at a time (moetier generate --prefill-chunk), "
            "or free memory of the device.",
        )

    def _scratch(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A tensor over this thread's scratch memory: the largest projection that it has decoded."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory: Tensor | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < nbytes:
            memory = self._local.memory = None  # the old memory goes before the new one comes
            with torch.inference_mode(False):  # one made in inference mode could not be written outside of it
                memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self._local.memory = memory
        return memory[:nbytes].view(dtype).view(shape)


class PackedKernels(Kernels):
    """Of a CPU: quantised weights are multiplied where they lie (``product.py``)."""

    def __init__(self, processor: native.Processor | None = None) -> None:
        super().__init__()
        self._processor = processor or native.here()
        self._code = _Code(self._processor) if processor else _code_here()
        self._plans: dict[tuple[int, str, torch.dtype], _Plan] = {}

    def packs(self, layout: RecordLayout) -> bool:
        return all(p.bits != 16 for p in layout.projections)

    def project(self, x: Tensor, record: Tensor, layout: RecordLayout, name: str, bias: Tensor | None = None) -> Tensor:
        """As ``Kernels`` says, but for the bits; a row of the result depends on that row of x alone."""
        if projection_of(layout, name).bits == 16:
            return super().project(x, record, layout, name, bias)
        y = self.multiply(x, (record,), (len(x),), layout, name)
        return y if bias is None else y.add_(bias)

    def multiply(
        self, x: Tensor, records: Sequence[Tensor], rows: Sequence[int], layout: RecordLayout, name: str
    ) -> Tensor:
        """[R, N]: the first ``rows[0]`` rows of x [R, K] through the quantised projection of the first record, the next
        through that of the next, and so on; of an x [1, K] the one row through all, where each of ``rows`` is 1."""
        plan = self._plans.get((id(layout), name, x.dtype))
        if plan is None:
            if x.dtype not in _NUMBERS:
                return self.multiply(x.float(), records, rows, layout, name).to(x.dtype)
            plan = self._plan(layout, name, x.dtype)
        own, columns = x.shape
        total = len(rows) if own == 1 else sum(rows)
        assert columns == plan.columns, f"{name} takes {plan.columns} numbers, not {columns}"
        assert own in (total, 1), f"{own} rows of x for {total} rows"
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((total, plan.rows), dtype=x.dtype)
        jobs: list[int] = []
        first = 0
        for record, count in zip(records, rows, strict=True):
            jobs += (record.data_ptr(), first, count)
            first += count
        numbers = self._numbers(own * plan.row_bytes)
        scales = numbers + own * columns
        sums = scales + own * plan.groups * 8
        plan.round(x.data_ptr(), numbers, scales, sums, own, columns)
        table = array("q", jobs)
        items = (0, len(records) * plan.tiles, plan.tiles, table.buffer_info()[0])
        places = (numbers, scales, sums, y.data_ptr())
        context = array("q", (*items, *places, *plan.shape, int(own == total), *plan.offsets))
        threads = native.threads_for(plan.rows * columns * total)
        native.run(plan.work, plan.alone, context.buffer_info()[0], threads)
        return y

    def _plan(self, layout: RecordLayout, name: str, dtype: torch.dtype) -> _Plan:
        plan = _Plan(layout, name, self._code.of(Form.of(projection_of(layout, name), _NUMBERS[dtype])))
        self._plans[id(layout), name, dtype] = plan
        return plan

    def _numbers(self, nbytes: int) -> int:
        """The address of so many bytes of this thread."""
        known: tuple[int, int, Tensor] = getattr(self._local, "numbers", _NOTHING)
        if known[1] < nbytes:
            memory = torch.empty(nbytes, dtype=torch.uint8)
            known = self._local.numbers = (memory.data_ptr(), nbytes, memory)
        return known[0]


_NOTHING = (0, 0, torch.empty(0))


class _Plan:
    """What is known of a projection before its numbers come."""

    __slots__ = (
        "alone",
        "columns",
        "groups",
        "layout",
        "offsets",
        "round",
        "row_bytes",
        "rows",
        "shape",
        "tiles",
        "work",
    )

    def __init__(self, layout: RecordLayout, name: str, code: Compiled) -> None:
        p = projection_of(layout, name)
        self.layout = layout  # kept: it is known by its address
        self.work, self.alone, self.round = code
        self.rows, self.columns, self.groups = p.rows, p.columns, p.columns // p.group
        self.tiles = p.padded_rows // ROW_TILE
        self.row_bytes = p.columns + 12 * self.groups  # of a row of x, rounded
        self.shape = (p.columns, p.rows, p.padded_rows)
        self.offsets = _offsets(layout, name)


# the address of ``WORK``, the same as a function, and ``ROUND``
Compiled = tuple[int, Callable[[int], None], Callable[..., None]]


class _Code:
    """What has been compiled for one processor. Thread-safe."""

    def __init__(self, processor: native.Processor) -> None:
        self._processor = processor
        self._known: dict[Form, Compiled] = {}
        self._rounding: dict[tuple[int, Number], Any] = {}

    def of(self, form: Form) -> Compiled:
        with native.compiling:
            if form not in self._known:
                work = self._processor.compile(product.product(form, self._processor), product.WORK)
                kind = (form.group, form.out)
                if kind not in self._rounding:
                    address = self._processor.compile(rounding.rounding(*kind), rounding.ROUND)
                    shape = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2)
                    self._rounding[kind] = shape(address)
                alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
                self._known[form] = (work, alone, self._rounding[kind])
            return self._known[form]


@functools.cache
def _code_here() -> _Code:
    return _Code(native.here())


def projection_of(layout: RecordLayout, name: str) -> Projection:
    return next(p for p in layout.projections if p.name == name)


def _offsets(layout: RecordLayout, name: str) -> tuple[int, int, int, int]:
    """Of a quantised projection's codes, its second plane, its pairs and their scales, in bytes; 0 for what it has
    not."""
    places = {section.name: section.offset for section in layout.sections}
    kinds = (("codes", "high"), ("plane", "low"), ("pairs",), ("pair_scales",))
    found = [next((places[f"{name}.{kind}"] for kind in group if f"{name}.{kind}" in places), 0) for group in kinds]
    return found[0], found[1], found[2], found[3]
