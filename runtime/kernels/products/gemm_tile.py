"""Code for one tile of a product: ROW_TILE rows of a matrix, as they are stored in its record, times a few rows of x.

One step multiplies four codes q of a row with four numbers n and adds them up, as the instructions VPDPBUSD (AVX-512
VNNI), SDOT and USDOT (Arm) do; other processors need several instructions (``gemm_avx2.py``). The codes are in the byte
order of ``tiers/quant/packing.py``: 32 bytes are one column of 64 rows. Codes of fewer than 4 bits, which are folded,
are unfolded when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import (
    BF16,
    F32,
    FP32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    POINTER,
    Emitter,
    FloatType,
    Value,
    vector,
)
from moetier.runtime.kernels.jit.processor import Dot, Processor
from moetier.tiers.layout import ITEM_BYTES, PAIR_RUN, ROW_TILE, ZERO_POINTS, Bits

STEP = 4  # columns that one step multiplies
# how far ahead memory is prefetched: the hardware prefetchers of most processors stop at the end of a page
BYTES_AHEAD = 2048  # of codes
PAIRS_AHEAD = 2  # groups
COLUMN = ROW_TILE // 2  # bytes of one column of 4-bit codes
VECTORS = ROW_TILE // LANES
CENTRES = {8: 128, 4: 8, 3: 4, 2: 2}
_NEON = {Dot.I8MM: "usdot", Dot.DOTPROD: "sdot"}  # names in LLVM's intrinsic functions; codes are at most 15 for sdot


@dataclass(frozen=True)
class PackedVariant:
    """Properties that the code of a product depends on: how the matrices are stored, and the type of x and y."""

    bits: Bits
    group: int
    pairs: str
    out: FloatType


class TileEmitter(Emitter):
    """Emitter of a function that multiplies ROW_TILE rows of W with rows of x; ``counts`` are its last arguments."""

    def __init__(
        self, module: ir.Module, name: str, variant: PackedVariant, processor: Processor, counts: int = 4
    ) -> None:
        super().__init__(module, name, [POINTER] * 8 + [I64] * counts)
        self.function.linkage = "internal"
        self._variant = variant
        self._processor = processor
        self._codes, self._second, self._pairs, self._scales, self._xn, self._xt, self._xs, self._y = (
            self.function.args[:8]
        )
        self._tile, self._columns, self._out_rows, self._padded = self.function.args[8:12]
        self._groups = self.at.udiv(self._columns, self.number(variant.group))
        # offset of the tile in a plane of 4-bit codes, in bytes
        self._start = self.at.mul(self.at.mul(self._tile, self._columns), self.number(COLUMN))

    def _planes_at(self, place: Value) -> list[list[Value]]:
        """Load STEP columns, beginning at byte ``place`` of a plane of 4-bit codes, as ``_columns_at`` does.

        Codes of 8 bits have two planes, of their high and their low halves; others are unfolded to one.
        """
        match self._variant.bits:
            case 8:
                return [self._columns_at(self._codes, place), self._columns_at(self._second, place)]
            case 4:
                return [self._columns_at(self._codes, place)]
            case _:
                codes = self._folded(self._codes, place, 2, 0x33)
                if self._variant.bits == 3:
                    two = self.all(I8, 2, 4 * LANES)
                    plane = self._folded(self._second, place, 4, 0x11)
                    codes = [self.at.or_(c, self.at.shl(p, two)) for c, p in zip(codes, plane, strict=True)]
                return [codes]

    def _columns_at(self, plane: Value, place: Value) -> list[Value]:
        """Load STEP columns of a plane as they are stored: two vectors of 64 bytes.

        A plane has the same bits of all codes, such as the third bits of codes of 3 bits.
        """
        bytes_ = vector(I8, 2 * COLUMN)
        if not self._processor.has_stream_prefetch:
            self.prefetch(plane, self.at.add(place, self.number(BYTES_AHEAD)), STEP * COLUMN)
        return [self.load(plane, self.at.add(place, self.number(2 * COLUMN * half)), bytes_) for half in range(2)]

    def _folded(self, plane: Value, place: Value, parts: int, mask: int) -> list[Value]:
        """Load STEP columns as ``_columns_at`` does, from a plane that is folded in ``parts``.

        ``mask`` has the bits of a byte that belong to codes.
        """
        at = self.at
        length = at.udiv(at.mul(self._padded, self._columns), self.number(2 * parts))
        part = at.udiv(place, length)
        shift = self.spread(at.trunc(at.mul(part, self.number(4 // parts)), I16), COLUMN)
        codes = []
        for piece in self._columns_at(plane, at.sub(place, at.mul(part, length))):
            moved = at.lshr(at.bitcast(piece, vector(I16, COLUMN)), shift)  # bits that move to the next byte are masked
            codes.append(at.and_(at.bitcast(moved, vector(I8, 2 * COLUMN)), self.all(I8, mask, 2 * COLUMN)))
        return codes

    def _unpack(self, place: Value) -> list[Value]:
        """Load the codes of STEP columns, beginning at byte ``place`` of a plane of 4-bit codes.

        Returns, for each vector of LANES rows, i8 [4 * LANES] with four codes of each row. Without VNNI, codes of 8
        bits are returned as two such vectors, of their high and their low halves.
        """
        first, *second = (self._nibbles(columns) for columns in self._planes_at(place))
        if not second:
            return first
        pairs = list(zip(first, *second, strict=True))
        if self._processor.dot.takes_bytes:
            shift = self.all(I8, 4, 4 * LANES)
            return [self.at.or_(self.at.shl(high, shift), low) for high, low in pairs]
        return pairs  # codes of 8 bits would overflow the 16-bit sums in _dot

    def _nibbles(self, columns: list[Value]) -> list[Value]:
        """Regroup STEP columns of 64 rows into vectors of LANES rows, with four codes of each row."""
        at, length = self.at, 4 * LANES
        order = [[COLUMN * k + row for row in range(first, first + LANES) for k in range(STEP)] for first in (0, LANES)]
        united = [self.pick(columns[0], columns[1], indices) for indices in order]
        low, four = self.all(I8, 15, length), self.all(I8, 4, length)
        return [*(at.and_(v, low) for v in united), *(at.lshr(v, four) for v in united)]

    def _places_of(self, place: Value) -> list[Value]:
        """Return the addresses of byte ``place`` of a plane of 4-bit codes in the planes that are stored."""
        at, bits = self.at, self._variant.bits
        planes = [(self._codes, 2 if bits < 4 else 1)]  # and the number of parts that are folded
        if bits in (8, 3):
            planes.append((self._second, 4 if bits == 3 else 1))
        nbytes = at.udiv(at.mul(self._padded, self._columns), self.number(2))
        return [at.gep(plane, [at.urem(place, at.udiv(nbytes, self.number(parts)))]) for plane, parts in planes]

    def _least(self, a: Value, b: Value) -> Value:
        return self.at.select(self.at.icmp_signed("<", a, b), a, b)

    def _prefetch_pairs(self, g: Value) -> None:
        """Prefetch the pairs of group ``g``. They are not in the page of the codes."""
        at, n = self.at, self.number
        nbytes = 2 * ITEM_BYTES[ZERO_POINTS.get(self._variant.pairs, self._variant.pairs)]
        first = at.add(at.mul(g, self._padded), at.mul(self._tile, n(ROW_TILE)))
        self.prefetch(self._pairs, at.mul(first, n(nbytes)), nbytes * ROW_TILE)

    def _load_pairs(self, g: Value) -> list[tuple[Value, Value]]:
        """Load the pairs (s, b) of group ``g`` in fp32: for each vector of LANES rows, one vector of s and one of b.

        A pair (s, z) with a zero point becomes (s, (centre - z) * s).
        """
        at, n = self.at, self.number
        first = at.add(at.mul(g, self._padded), at.mul(self._tile, n(ROW_TILE)))  # index of the tile's first pair
        even, odd = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)
        pairs = []
        if self._variant.pairs == "bfloat16":
            for number in range(VECTORS):
                place = at.mul(at.add(first, n(number * LANES)), n(4))
                both = self.widen(self.load(self._pairs, place, vector(I16, 2 * LANES)), 2 * LANES)
                pairs.append((self.pick(both, both, even), self.pick(both, both, odd)))
            return pairs
        if self._variant.pairs in ZERO_POINTS:
            centre = self.floats(CENTRES[self._variant.bits])
            for number in range(VECTORS):
                both = self._stored_pairs(at.add(first, n(number * LANES)))
                s, z = self.pick(both, both, even), self.pick(both, both, odd)
                pairs.append((s, at.fmul(at.fsub(centre, z), s)))
            return pairs
        run = at.mul(at.udiv(first, n(PAIR_RUN)), n(8))
        four = [self.widen(self.load(self._scales, at.add(run, n(2 * i)), vector(I16, 1)), 1) for i in range(4)]
        scale_s, low_s, scale_b, low_b = (
            self.spread(at.extract_element(value, ir.Constant(I32, 0)), LANES) for value in four
        )
        for number in range(VECTORS):
            place = at.mul(at.add(first, n(number * LANES)), n(2))
            codes = at.uitofp(self.load(self._pairs, place, vector(I8, 2 * LANES)), vector(F32, 2 * LANES))
            pair = []
            for indices, scale, low in ((even, scale_s, low_s), (odd, scale_b, low_b)):
                value = at.fadd(at.fmul(self.pick(codes, codes, indices), scale), low)
                pair.append(self.widen(self.narrow(value, LANES), LANES))
            pairs.append((pair[0], pair[1]))
        return pairs

    def _stored_pairs(self, first: Value) -> Value:
        """Load LANES pairs with zero points, from the one with index ``first`` on, as an fp32 vector [2 * LANES]."""
        dtype = ZERO_POINTS[self._variant.pairs]
        place = self.at.mul(first, self.number(2 * ITEM_BYTES[dtype]))
        if dtype == "float16":
            return self.widen_half(self.load(self._pairs, place, vector(I16, 2 * LANES)), 2 * LANES)
        return self.load_floats(self._pairs, place, FP32 if dtype == "float32" else BF16, 2 * LANES)

    def _centre_sum(self, index: Value) -> Value:
        """Load -centre × sum(n) of one group (n: rounded activations), broadcast to i32 [LANES].

        Adding products code × n to it gives sum((code - centre) × n). ``index`` is that of the group among those of all
        rows.
        """
        total = self.load(self._xs, self.at.mul(index, self.number(4)), I32)
        return self.spread(self.at.mul(total, ir.Constant(I32, -CENTRES[self._variant.bits])), LANES)

    def _scales_of(self, index: Value) -> tuple[Value, Value]:
        """Load t and t * sum of n of the group ``index`` among those of all rows, each repeated in a vector."""
        place = self.at.mul(index, self.number(8))
        t, t_sum = (self.load(self._xt, self.at.add(place, self.number(i)), F32) for i in (0, 4))
        return self.spread(t, LANES), self.spread(t_sum, LANES)

    def _add_scaled(self, total: Value, whole: Value, pair: tuple[Value, Value], scales: tuple[Value, Value]) -> Value:
        """Add a group's sum of products, ``whole``, to ``total``, scaled by its pair (s, b) and its scales (t, t_sum).

        ``whole`` is i32 [LANES]. The operations and their order are those of all tiles, which gives them the same bits.
        """
        at, (s, b), (t, t_sum) = self.at, pair, scales
        part = at.sitofp(whole, vector(F32, LANES))
        return at.fadd(at.fadd(total, at.fmul(part, at.fmul(s, t))), at.fmul(b, t_sum))

    def _total_at(self, row: Value, number: int) -> Value:
        """Return the offset in totals, fp32 [rows of x, VECTORS, LANES], of vector ``number`` of a row."""
        at, n = self.at, self.number
        return at.mul(at.add(at.mul(row, n(VECTORS)), n(number)), n(4 * LANES))

    def _write_totals(self, totals: Value, first: Value, last: Value) -> None:
        """Write the sums of rows of x, from ``first`` to before ``last``."""
        with self.loop(first, last) as row:
            for number in range(VECTORS):
                total = self.load(totals, self._total_at(row, number), vector(F32, LANES))
                self._write(total, row, number * LANES)

    def _write(self, value: Value, row: Value, first: int) -> None:
        """Write LANES numbers of a row of y, except those beyond the row's end."""
        at, n, variant = self.at, self.number, self._variant
        column = at.add(at.mul(self._tile, n(ROW_TILE)), n(first))
        left = self.spread(at.sub(self._out_rows, column), LANES)
        mask = at.icmp_signed(">", left, ir.Constant(vector(I64, LANES), list(range(LANES))))
        code = "f32"
        if variant.out == BF16:
            value, code = self.narrow(value, LANES), "i16"
        place = at.mul(at.add(at.mul(row, self._out_rows), column), n(variant.out.itemsize))
        target = self.pointer_at(self._y, place, value.type)
        self.intrinsic(f"llvm.masked.store.v{LANES}{code}.p0", ir.VoidType(), value, target, ir.Constant(I32, 1), mask)


class Tile(TileEmitter):
    """The function ``tile_H``, which multiplies ROW_TILE rows of W with H rows of x; ``height`` is H."""

    def __init__(self, module: ir.Module, variant: PackedVariant, processor: Processor, height: int) -> None:
        super().__init__(module, f"tile_{height}", variant, processor)
        at, n = self.at, self.number
        group = variant.group
        integers = [[at.alloca(vector(I32, LANES)) for _ in range(VECTORS)] for _ in range(height)]
        sums = [[at.alloca(vector(F32, LANES)) for _ in range(VECTORS)] for _ in range(height)]
        zero = self.floats(0.0)
        for places in sums:
            for place in places:
                at.store(zero, place)
        with self.loop(n(0), self._groups) as g:
            rows = [at.add(at.mul(n(row), self._groups), g) for row in range(height)]
            for row in range(height):
                begin = self._centre_sum(rows[row])
                for place in integers[row]:
                    at.store(begin, place)
            first = at.mul(g, n(group))
            self._prefetch_pairs(at.add(g, n(PAIRS_AHEAD)))
            with self.loop(n(0), n(group), 2 * STEP) as step:
                for half in range(2):
                    column = at.add(first, at.add(step, n(half * STEP)))
                    codes = self._unpack(at.add(self._start, at.mul(column, n(COLUMN))))
                    for row in range(height):
                        four = self.load(self._xn, at.add(at.mul(n(row), self._columns), column), I32)
                        x = at.bitcast(self.spread(four, LANES), vector(I8, 4 * LANES))
                        for place, q in zip(integers[row], codes, strict=True):
                            at.store(self._dot(at.load(place), q, x), place)
            pairs = self._load_pairs(g)
            for row in range(height):
                scales = self._scales_of(rows[row])
                for pair, whole, total in zip(pairs, integers[row], sums[row], strict=True):
                    at.store(self._add_scaled(at.load(total), at.load(whole), pair, scales), total)
        for row in range(height):
            for number, place in enumerate(sums[row]):
                self._write(at.load(place), n(row), number * LANES)
        at.ret_void()

    def _dot(self, total: Value, q: Value, x: Value) -> Value:
        """Add to each number of ``total``, i32 [LANES], four products of a code in ``q`` and a number in ``x``.

        ``q`` is unsigned and ``x`` signed, i8 [4 * LANES] each; or ``q`` is a pair, the high and the low halves of
        8-bit codes.
        """
        at = self.at
        if isinstance(q, tuple):
            high, low = q
            four = self.all(I32, 4, LANES)
            return self._dot(at.add(total, at.shl(self._dot(self.all(I32, 0, LANES), high, x), four)), low, x)
        return dot(self, self._processor, total, q, x)


def dot(emit: Emitter, processor: Processor, total: Value, q: Value, x: Value, *, is_signed: bool = False) -> Value:
    """Emit the addition of four products to each number of ``total``, i32 [n]: of unsigned q and signed x, i8 [4 * n].

    n is the number of i32 in a register, on Arm a multiple of it. ``Dot.AVX2`` has no instruction for this, and gets
    the code for any processor. ``is_signed``: q is signed; not on processors that ``takes_bytes``.
    """
    at, count = emit.at, total.type.count
    match processor.dot:
        case Dot.AVX512_VNNI | Dot.AVX_VNNI:
            return emit.intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * count}", total.type, total, q, x)
        case Dot.I8MM | Dot.DOTPROD as arm:
            name, parts = f"llvm.aarch64.neon.{_NEON[arm]}.v4i32.v16i8", []
            for first in range(0, count, 4):
                words, codes = range(first, first + 4), range(4 * first, 4 * first + 16)
                arguments = (
                    emit.pick(value, value, order) for value, order in ((total, words), (q, codes), (x, codes))
                )
                parts.append(emit.intrinsic(name, vector(I32, 4), *arguments))
            return emit.concatenate(parts)
    wide = vector(I16, 4 * count)
    products = at.mul(at.sext(q, wide) if is_signed else at.zext(q, wide), at.sext(x, wide))
    pairs = at.add(*(emit.pick(products, products, range(i, 4 * count, 2)) for i in range(2)))
    pairs = at.sext(pairs, vector(I32, 2 * count))
    return at.add(total, at.add(*(emit.pick(pairs, pairs, range(i, 2 * count, 2)) for i in range(2))))
