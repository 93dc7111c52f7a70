"""Load matrices in the codings of checkpoints: numbers of 4 or 8 bits, with scales in a section of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moetier.runtime.kernels.jit.emitter import F32, I32, LANES, Value, vector
from moetier.tiers.layout import ITEM_BYTES, SCALE_TYPES, Projection

from .block_codings import BLOCK_CODINGS
from .row_emitter import BIASED_E2M1, UNIT, Coding, ColumnGroup, RowEmitter

MAX_COLUMNS = 128  # most columns of groups that are loaded together, unless a single group has more
FLOAT_COLUMNS = 64  # columns whose products with fp32 numbers are added up before they are scaled
# What x is multiplied by if it is not rounded. FP8 numbers are read as fp32 numbers that are 2^120 times smaller. So
# neither is near the limits of fp32.
FLOAT_SCALE = 2.0**60


class _Scaled(Coding):
    """Coding whose scales are in a section of their own."""

    def __init__(self, p: Projection) -> None:
        super().__init__(p)
        self._p = p
        self._item = ITEM_BYTES[SCALE_TYPES[p.scales]]

    def _scales(self, emit: RowEmitter, offsets: Sequence[Value], first: Value, count: int) -> list[Value]:
        """Load ``count`` scales of each row, 4 bytes at most, from scale ``first`` on: fp32 [lanes] for each."""
        at = emit.at
        skipped = at.mul(first, emit.number(self._item))
        words = emit.words(emit.scales, [at.add(offset, skipped) for offset in offsets], count * self._item)
        return [self._to_float(emit, words, number) for number in range(count)]

    def _to_float(self, emit: RowEmitter, words: Value, number: int) -> Value:
        """Convert scale ``number`` of each row, which the row's i32 word holds beside others, to fp32 [lanes]."""
        at, bits, lanes = emit.at, 8 * self._item, emit.lanes
        if left := 32 - bits * (number + 1):
            words = at.shl(words, emit.all(I32, left, lanes))
        match self._p.scales:
            case "e8m0":
                return emit.powers(at.and_(at.lshr(words, emit.all(I32, 1, lanes)), emit.all(I32, 0xFF << 23, lanes)))
            case "e4m3":
                return emit.small_floats(words, 8, 4)
            case "float16":
                return emit.small_floats(words, 16, 5)
        return at.bitcast(at.and_(words, emit.all(I32, -1 << (32 - bits), lanes)), vector(F32, lanes))


class _Nibbles(_Scaled):
    """Codes of 4 bits, two in a byte, the low half first."""

    is_interleaved = True
    table: Sequence[int] | None = None  # for each stored code the code c; None if they are equal

    def __init__(self, p: Projection) -> None:
        super().__init__(p)
        self.chunk = max(1, min(4 // self._item, MAX_COLUMNS // p.group))

    @staticmethod
    def can_load(p: Projection) -> bool:
        """Return whether the coding can load a projection."""
        return p.columns % p.group == 0 and p.group % 16 == 0

    def groups(
        self, emit: RowEmitter, row: Value, offsets: Sequence[Value], first: Value, columns: int
    ) -> Iterator[ColumnGroup]:
        """Load columns as ``Coding.groups`` says."""
        at, n, p = emit.at, emit.number, self._p
        scales = iter(self._scales(emit, offsets, first, columns // p.group))
        start = at.add(at.mul(row, n(p.row_bytes)), at.mul(first, n(p.group // 2)))
        codes: list[Value] = []
        for skipped in range(0, columns // 2, UNIT):
            place = at.add(start, n(skipped))
            for four in emit.transposed(emit.codes, place, p.row_bytes, min(UNIT, columns // 2 - skipped)):
                halves = emit.halves(four)
                codes += halves if self.table is None else (emit.lookup(half, self.table) for half in halves)
                if len(codes) == p.group // 4:
                    yield ColumnGroup(codes, next(scales))
                    codes = []


class _Int4(_Nibbles):
    centre, largest = 8, 15


class _E2m1(_Nibbles):
    """FP4 numbers, which doubled are integers from -12 to 12."""

    centre, largest, unit = 12, 24, 0.5
    table = BIASED_E2M1


class _E4m3(_Scaled):
    """FP8 numbers, converted to fp32."""

    is_exact = True
    unit = 2.0**120 / FLOAT_SCALE

    def __init__(self, p: Projection) -> None:
        super().__init__(p)
        if p.group > FLOAT_COLUMNS:
            self.group = FLOAT_COLUMNS

    @staticmethod
    def can_load(p: Projection) -> bool:
        """Return whether the coding can load a projection."""
        whole = p.group % FLOAT_COLUMNS == 0 or p.group >= p.columns
        return p.columns % UNIT == 0 and (whole or p.group in (16, 32, 48))

    def groups(
        self, emit: RowEmitter, row: Value, offsets: Sequence[Value], first: Value, columns: int
    ) -> Iterator[ColumnGroup]:
        """Load one group as ``Coding.groups`` says."""
        at, n, p = emit.at, emit.number, self._p
        column = at.mul(first, n(self.group))
        (scale,) = self._scales(emit, offsets, at.udiv(column, n(p.group)), 1)
        start = at.add(at.mul(row, n(p.columns)), column)
        codes, nan_bits = [], emit.all(I32, 0, emit.lanes)
        for skipped in range(0, columns, UNIT):
            for four in emit.transposed(emit.codes, at.add(start, n(skipped)), p.columns, UNIT):
                codes += emit.fp8(four)
                nan_bits = at.or_(nan_bits, emit.nan_bits(four))
        yield ColumnGroup(codes, emit.nan_where(nan_bits, scale))  # a NaN makes all products of its row NaN


_CODINGS: dict[str, type[Coding]] = {"int4": _Int4, "e2m1": _E2m1, "e4m3": _E4m3, **BLOCK_CODINGS}


def coding_of(p: Projection) -> Coding | None:
    """Return the coding of a projection; None if no kernel multiplies with the projection as it is stored."""
    coding = _CODINGS.get(p.coding)
    return coding(p) if coding is not None and coding.can_load(p) and p.rows >= LANES else None
