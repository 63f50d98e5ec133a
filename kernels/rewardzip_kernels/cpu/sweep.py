"""Rows under the panels of one layer: the register tile, and its epilogue while the sums are hot.

    y = act(sums * (row_scale * scale) + bias)

The tile's sums go through 1.5 KB of stack to the epilogue, which LLVM vectorises over the outputs. Of many inputs a
part is taken at a time, for all rows, so that it stays in cache: the sums of all rows are then kept between.
"""

from numpy import float32

from .activations import ACTIVATIONS, inlined
from .pointers import f32, i32, i64, load, store, u16
from .rows import as_it_is, upper_half
from .tile import PANEL, Float, Int8, tile

# steps of a part
PART = 256


def finishing(pointer, names: tuple[str, ...], bfloat16: bool = False):
    """The epilogue as a function for kernels; ``code`` says which of the activations it is at run time."""
    activate = ACTIVATIONS[names[0]]
    output, size, put = (u16, 2, upper_half) if bfloat16 else (f32, 4, as_it_is)

    @inlined
    def finish(code, sums_address, rows, width, scales, scale, bias, y_address, y_stride, parameter):
        for r in range(rows):
            sums, y = pointer(sums_address + r * PANEL * 4), output(y_address + r * y_stride * size)
            row_scale = load(scales, r)
            for j in range(width):
                value = float32(load(sums, j)) * (row_scale * load(scale, j)) + load(bias, j)
                store(y, j, put(activate(value, parameter)))

    if len(names) == 1:
        return finish
    others = finishing(pointer, names[1:], bfloat16)

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
    finish, size = finishing(f32 if isinstance(kind, Float) else i32, names, kind.rows_bytes == 2), kind.rows_bytes
    start_field = 1 if isinstance(kind, Int8) and kind.isa.zero_point else 2
    lanes, vectors, tall_rows, middle_rows = kind.isa.lanes, kind.isa.vectors, kind.rows, kind.rows // 2
    half_width, inputs, item, step_bytes = lanes * vectors // 2, kind.inputs, kind.item, kind.step_bytes
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
            scale_at, bias_at = f32(scale + column * 4), f32(bias + column * 4)
            for step in range(0, steps, PART):
                now_steps, whole = min(PART, steps - step), steps <= PART
                w, part = panels + (panel * steps + step) * step_bytes, taken + step * inputs * item
                done = 0
                while done < rows:
                    rows_at, sums_at = part + done * row_bytes, sums if whole else sums + done * PANEL * 4
                    first, apart = (sums_at, PANEL * 4) if step else (start + column * 4, 0)
                    if rows - done >= tall_rows and width <= lanes:
                        thin(rows_at, row_bytes, w, now_steps, width, first, apart, sums_at)
                        now = tall_rows
                    elif rows - done >= tall_rows and width <= half_width:
                        half(rows_at, row_bytes, w, now_steps, width, first, apart, sums_at)
                        now = tall_rows
                    elif rows - done >= tall_rows:
                        tall(rows_at, row_bytes, w, now_steps, width, first, apart, sums_at)
                        now = tall_rows
                    elif rows - done >= middle_rows:
                        middle(rows_at, row_bytes, w, now_steps, width, first, apart, sums_at)
                        now = middle_rows
                    else:
                        single(rows_at, row_bytes, w, now_steps, width, first, apart, sums_at)
                        now = 1
                    if step + now_steps == steps:
                        y_at, scales_at = y + (done * y_stride + column) * size, f32(scales + done * 4)
                        if width == PANEL:
                            finish(code, sums_at, now, PANEL, scales_at, scale_at, bias_at, y_at, y_stride, parameter)
                        else:
                            finish(code, sums_at, now, width, scales_at, scale_at, bias_at, y_at, y_stride, parameter)
                    done += now

    return run
