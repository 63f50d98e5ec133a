"""Rows under the panels of one layer: the register tile, and its epilogue while the sums are hot.

    y = act(sums * (row_scale * scale) + bias)

The tile's sums go through 1.5 KB of stack to the epilogue, which LLVM vectorises over the outputs.
"""

from numpy import float32

from .activations import ACTIVATIONS, inlined
from .pointers import f32, i32, i64, load, store
from .tile import PANEL, Float, Int8, tile


def finishing(pointer, names: tuple[str, ...]):
    """The epilogue as a function for kernels; ``code`` says which of the activations it is at run time."""
    activate = ACTIVATIONS[names[0]]

    @inlined
    def finish(code, sums_address, rows, width, scales, scale, bias, y_address, y_stride, parameter):
        for r in range(rows):
            sums, y = pointer(sums_address + r * PANEL * 4), f32(y_address + r * y_stride * 4)
            row_scale = load(scales, r)
            for j in range(width):
                value = float32(load(sums, j)) * (row_scale * load(scale, j)) + load(bias, j)
                store(y, j, activate(value, parameter))

    if len(names) == 1:
        return finish
    others = finishing(pointer, names[1:])

    @inlined
    def select(code, sums_address, rows, width, scales, scale, bias, y_address, y_stride, parameter):
        if code == 0:
            finish(code, sums_address, rows, width, scales, scale, bias, y_address, y_stride, parameter)
        else:
            others(code - 1, sums_address, rows, width, scales, scale, bias, y_address, y_stride, parameter)

    return select


def sweep(kind: Int8 | Float, names: tuple[str, ...], multiple: int = 1):
    """The sweep as a function for kernels, for these activations.

    Outputs are written up to a ``multiple``, and scale and bias read: 16 leaves the vectorised epilogue no tail.
    """
    finish = finishing(f32 if isinstance(kind, Float) else i32, names)
    start_field = 1 if isinstance(kind, Int8) and kind.isa.zero_point else 2
    lanes, vectors, tall_rows, middle_rows = kind.isa.lanes, kind.isa.vectors, kind.rows, kind.rows // 2
    half_width, inputs, step_bytes = lanes * vectors // 2, kind.inputs, kind.step_bytes
    tall, middle, single = (tile(kind, rows, vectors) for rows in (tall_rows, middle_rows, 1))
    thin, half = tile(kind, tall_rows, 1), tile(kind, tall_rows, max(vectors // 2, 1))

    @inlined
    def run(
        layer, scale, bias, code, parameter, rows, taken, row_bytes, scales, y, y_stride, first_panel, last_panel, sums
    ):  # fmt: skip
        header = i64(layer)
        panels, start, zeros = load(header, 0), load(header, start_field), load(header, 2)
        n, steps = (load(header, 3) + multiple - 1) // multiple * multiple, (load(header, 4) + inputs - 1) // inputs
        bias = bias or zeros
        for panel in range(first_panel, last_panel):
            column = panel * PANEL
            width = min(PANEL, n - column)
            w, first = panels + panel * steps * step_bytes, start + column * 4
            scale_at, bias_at = f32(scale + column * 4), f32(bias + column * 4)
            done = 0
            while done < rows:
                rows_at = taken + done * row_bytes
                if rows - done >= tall_rows and width <= lanes:
                    thin(rows_at, row_bytes, w, steps, width, first, sums)
                    now = tall_rows
                elif rows - done >= tall_rows and width <= half_width:
                    half(rows_at, row_bytes, w, steps, width, first, sums)
                    now = tall_rows
                elif rows - done >= tall_rows:
                    tall(rows_at, row_bytes, w, steps, width, first, sums)
                    now = tall_rows
                elif rows - done >= middle_rows:
                    middle(rows_at, row_bytes, w, steps, width, first, sums)
                    now = middle_rows
                else:
                    single(rows_at, row_bytes, w, steps, width, first, sums)
                    now = 1
                y_at, scales_at = y + (done * y_stride + column) * 4, f32(scales + done * 4)
                if width == PANEL:
                    finish(code, sums, now, PANEL, scales_at, scale_at, bias_at, y_at, y_stride, parameter)
                else:
                    finish(code, sums, now, width, scales_at, scale_at, bias_at, y_at, y_stride, parameter)
                done += now

    return run
