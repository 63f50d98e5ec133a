"""The register tile for 2:4 weights: each row's kept inputs are picked out, and only those are multiplied.

    w     [steps] of 8 inputs by 64 outputs: two groups of 4 inputs, 2 values each
            int8     [64][4]     the values, in the order of the inputs          [16][4] u8   places
            16 bits  [2][64][2]  the values of one group, then of the other      [16][4] u8   places

The places of output 16 v + l, four times 2 bits, are bits 2 v of the four bytes of lane l. So one load, shifted by 2 v,
is a vector of places for 16 outputs, in the very form that the processor's shuffles of bytes and of floats take. Half
the products of the dense tile, a shuffle for each; 5 bits a weight where that has 8.
"""

from llvmlite import ir
from numba.core import cgutils

from .instruction_sets import I8, I32, InstructionSet, call, constant, signed_byte
from .tile import F32, I64, PANEL, Float, Int8, read, splat

BYTE_SHUFFLES = {
    "avx512_vnni": "llvm.x86.avx512.pshuf.b.512",
    "avx_vnni": "llvm.x86.avx2.pshuf.b",
    "avx2": "llvm.x86.avx2.pshuf.b",
    "neon_dot": "llvm.aarch64.neon.tbl1.v16i8",
}
FLOAT_SHUFFLES = {
    "avx512_vnni": "llvm.x86.avx512.vpermilvar.ps.512",
    "avx_vnni": "llvm.x86.avx.vpermilvar.ps.256",
    "avx2": "llvm.x86.avx.vpermilvar.ps.256",
}


def _places(builder, lanes, w, offset, output):
    """The places of ``lanes`` outputs from ``output`` on, in bits 1 and 0 of each byte; other bits beside them."""
    lane = builder.and_(output, I64(15))
    packed = read(builder, w, builder.add(builder.mul(lane, I64(4)), I64(offset)), ir.VectorType(I32, lanes))
    shift = builder.trunc(builder.shl(builder.lshr(output, I64(4)), I64(1)), I32)
    return builder.lshr(packed, splat(builder, shift, lanes))


def _dwords(builder, lanes, w, offset, output):
    return read(builder, w, builder.add(builder.mul(output, I64(4)), I64(offset)), ir.VectorType(I32, lanes))


# how far ahead of the loop, in bytes: 4096 x 4096 at one row 171 us with it, 285 without
AHEAD = 5120


def _prefetch(builder, kind, x_rows, w):
    """Few rows wait for memory: ask for it early. Many would only lose the time it takes to ask."""
    if len(x_rows) == kind.rows:
        return
    arguments = [I8.as_pointer(), I32, I32, I32]
    function_type = ir.FunctionType(ir.VoidType(), arguments)
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
    for line in range(AHEAD, AHEAD + kind.step_bytes, 64):
        builder.call(function, [builder.gep(w, [I64(line)]), I32(0), I32(3), I32(1)])


class Sparse24Int8(Int8):
    """u8 rows times int8 values, exact in int32."""

    inputs, step_bytes = 8, 4 * PANEL + 64

    def step(self, builder, acc, x_rows, x_at, w, outputs):
        isa = self.isa
        _prefetch(builder, self, x_rows, w)
        weights = [isa.split_w(builder, _dwords(builder, isa.lanes, w, 0, output)) for output in outputs]
        places = [_places(builder, isa.lanes, w, 4 * PANEL, output) for output in outputs]
        controls = [builder.and_(p, constant(p.type, 0x03030303)) for p in places]
        pick = _pick_by_shuffle if isa.name in BYTE_SHUFFLES else _pick_by_shift
        new = []
        for sums, row in zip(acc, x_rows, strict=True):
            picked = pick(builder, isa, read(builder, row, x_at, ir.IntType(64)), controls)
            parts = zip(sums, picked, weights, strict=True)
            new.append([self.dot(builder, a, isa.split_x(builder, x), weight) for a, x, weight in parts])
        return new


def _pick_by_shuffle(builder, isa, eight, controls):
    """Bytes 0 and 1 of a lane out of the first four inputs, bytes 2 and 3 out of the others."""
    bytes_type = ir.VectorType(I8, 4 * isa.lanes)
    table = builder.bitcast(splat(builder, eight, isa.lanes // 2), bytes_type)
    second = constant(controls[0].type, 0x04040000)
    indices = [builder.bitcast(builder.or_(c, second), bytes_type) for c in controls]
    return [builder.bitcast(call(builder, BYTE_SHUFFLES[isa.name], bytes_type, table, i), second.type) for i in indices]


def _pick_by_shift(builder, isa, eight, controls):
    vector = controls[0].type
    groups = [splat(builder, builder.trunc(builder.lshr(eight, I64(32 * g)), I32), isa.lanes) for g in range(2)]
    picked = []
    for control in controls:
        lane = constant(vector, 0)
        for i in range(4):
            place = builder.and_(builder.lshr(control, constant(vector, 8 * i)), constant(vector, 3))
            byte = builder.lshr(groups[i // 2], builder.shl(place, constant(vector, 3)))
            byte = builder.shl(builder.and_(byte, constant(vector, 255)), constant(vector, 8 * i))
            lane = builder.or_(lane, byte)
        picked.append(lane)
    return picked


class Sparse24Float(Float):
    """fp32 rows times int8 values made fp32 in registers."""

    inputs, step_bytes = 8, 4 * PANEL + 64
    places_at = 4 * PANEL

    def __init__(self, isa: InstructionSet):
        super().__init__(isa)
        self.floats = ir.VectorType(F32, isa.lanes)

    def step(self, builder, acc, x_rows, x_at, w, outputs):
        isa = self.isa
        _prefetch(builder, self, x_rows, w)
        raw = [self.raw(builder, w, output) for output in outputs]
        places = [_places(builder, isa.lanes, w, self.places_at, output) for output in outputs]
        four = ir.VectorType(F32, 4)
        for i in range(4):
            weights = [self.value(builder, r, i) for r in raw]
            controls = [builder.lshr(p, constant(p.type, 8 * i)) for p in places]
            at = builder.add(x_at, I64(16 * (i // 2)))
            groups = [read(builder, row, at, four) for row in x_rows]
            acc = [
                [
                    self.dot(builder, a, self.pick(builder, group, control), weight)
                    for a, control, weight in zip(sums, controls, weights, strict=True)
                ]
                for sums, group in zip(acc, groups, strict=True)
            ]
        return acc

    def pick(self, builder, group, control):
        """In each lane the input of four that bits 1 and 0 of the control name."""
        lanes = self.isa.lanes

        def repeated(which):
            mask = ir.Constant(ir.VectorType(I32, lanes), which)
            return builder.shuffle_vector(group, group, mask)

        if self.isa.name in FLOAT_SHUFFLES:
            table = repeated([0, 1, 2, 3] * (lanes // 4))
            return call(builder, FLOAT_SHUFFLES[self.isa.name], self.floats, table, control)

        def bit(mask):
            return builder.icmp_signed(
                "!=", builder.and_(control, constant(control.type, mask)), constant(control.type, 0)
            )

        x = [repeated([i] * lanes) for i in range(4)]
        odd = bit(1)
        return builder.select(bit(2), builder.select(odd, x[3], x[2]), builder.select(odd, x[1], x[0]))

    def raw(self, builder, w, output):
        return _dwords(builder, self.isa.lanes, w, 0, output)

    def value(self, builder, raw, i):
        return builder.sitofp(signed_byte(builder, raw, i), self.floats)


class Sparse24BFloat16(Sparse24Float):
    """fp32 rows times bf16 values: a dword of a lane holds both values of a group."""

    step_bytes, places_at = 8 * PANEL + 64, 8 * PANEL

    def raw(self, builder, w, output):
        return [_dwords(builder, self.isa.lanes, w, 4 * PANEL * g, output) for g in range(2)]

    def value(self, builder, raw, i):
        group = raw[i // 2]
        upper = group if i % 2 else builder.shl(group, constant(group.type, 16))
        return self.widened(builder, upper)

    def widened(self, builder, upper):
        """fp32 from a value in a dword's upper half, whatever its lower half holds."""
        return builder.bitcast(builder.and_(upper, constant(upper.type, -0x10000)), self.floats)


class Sparse24Float16(Sparse24BFloat16):
    """fp32 rows times fp16 values."""

    def widened(self, builder, upper):
        """Sign, exponent and fraction moved to their places; the exact product moves the exponent's zero."""
        moved = builder.ashr(upper, constant(upper.type, 3))
        moved = builder.and_(moved, constant(upper.type, -0x70002000))
        return builder.fmul(builder.bitcast(moved, self.floats), ir.Constant(self.floats, [2.0**112] * self.isa.lanes))
