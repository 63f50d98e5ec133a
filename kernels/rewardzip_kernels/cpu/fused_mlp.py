"""fused_mlp on a CPU, by ``mlp_engine.py``: weights in int8, or in 16 bits, which are kept as fp32 or as pairs of bf16.

What does not depend on this call's addresses is kept per weights tensor: the packed weights, the table that the kernel
reads, the kernel, the shapes already checked. ``params`` is read where it lies; a change of ``weights`` packs anew,
noticed as in ``packing.py``.
"""

import struct
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..checks import dense_rows
from ..fused_mlp import _check, compute_type, fused_mlp_reference, new_output, numbers
from ..kept import Source
from ..mlp_layout import Layer, Layout, Linear, layout, padded, unpack
from ..written import function
from . import mlp_gradient, quick, threads
from .engine import kernel
from .instruction_sets import choose, processor_features
from .linear import BLOCK
from .mlp_engine import HIDDEN, LAST, MOST_ROWS, OWN_SCRATCH, build
from .outputs import in_large_pages
from .packing import Packed, PackedFloats
from .pointers import bits_of
from .tile import PANEL, BFloat16, Float, Float16, Int8, PairsBFloat16, Whole, WholeBFloat16, WholeFloat16

# by what products are made of: for int8 weights, for those in floats
KINDS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.int8: (Int8, None),
    torch.float32: (Float, Whole),
    torch.float16: (Float16, WholeFloat16),
    torch.bfloat16: (BFloat16, WholeBFloat16),
}
SHAPES_KEPT = 256
CACHE = 1 << 22
# outputs that a dot product each gives sooner than tiles
FEW_OUTPUTS = 12
FLOAT = torch.float32
HALVES = (torch.float16, torch.bfloat16)

_plans: dict[tuple[Any, ...], "Plan"] = {}


def multiplies_bfloat16() -> bool:
    return PairsBFloat16.multiplies(choose()) and "amx-bf16" not in processor_features()


def kind_for(compute: torch.dtype, stored: torch.dtype, isa: str | None) -> Any:
    """The tile for products of this type and weights of that."""
    if compute == torch.bfloat16 and PairsBFloat16.multiplies(choose(isa)):
        return PairsBFloat16
    return KINDS[compute][stored != torch.int8]


@lru_cache(maxsize=256)
def prepare(kind: Any, hidden: tuple[str, ...], last: str, normed: bool, tiled: bool, isa: str | None) -> Any:
    """The compiled kernel, or None."""
    chosen = choose(isa)
    key = ("mlp", kind.__name__, chosen.name, "+".join(hidden), last, f"{'norm' * normed}{'tiled' * tiled}")
    return kernel(key, lambda: build(kind(chosen), hidden, last, normed, tiled))


@lru_cache(maxsize=256)
def prepare_gradient(kind: Any, back: Any, hidden: tuple[str, ...], last: str, isa: str | None) -> Any:
    chosen = choose(isa)
    key = ("gradient", kind.__name__, chosen.name, "+".join(hidden), last)
    return kernel(key, lambda: mlp_gradient.build(kind(chosen), back(chosen), hidden, last))


def hidden_activations(net: tuple[Layer, ...]) -> tuple[str, ...]:
    """What the kernel needs for the hidden layers: "none" first, which comes before a LayerNorm."""
    names = {layer.activation for layer in net[:-1]}
    if len(net) == 1 or any(layer.eps is not None for layer in net):
        names.add("none")
    return tuple(sorted(names, key=lambda name: (name != "none", name)))


class Network:
    """One MLP, or several of a shape, as the kernel reads them; ``run`` is None where it cannot be compiled.

    Hidden weights are packed. The fp32 tensors are read where they lie if they are dense and as long as the kernel
    reads, and are then in ``live``: what is written there later, the kernel sees.
    """

    changed = staticmethod(quick.changed)

    def __init__(
        self,
        networks: list[list[Linear]],
        flat: Layout,
        members: int | None,
        reduce: str,
        compute: Any,
        isa: str | None,
    ) -> None:
        net = flat.layers
        # a single layer is fp32 whatever the type of the products
        stored = networks[0][0].weight.dtype
        self.kind = kind_for(compute, stored, isa) if len(net) > 1 else Float
        names = hidden_activations(net)
        normed = any(layer.eps is not None for layer in net)
        self.tiled = len(net) > 1 and net[-1].width > FEW_OUTPUTS
        self.run = prepare(self.kind, names, net[-1].activation, normed, self.tiled, isa)
        self.pieces, self.outputs = net[0].pieces, net[-1].width
        self.leading = () if members is None else (len(networks) if reduce == "none" else 2,)
        self.work = len(networks) * sum(layer.width * sum(layer.pieces) for layer in net)
        self.parallel_work = self.kind.parallel_work
        self.address = struct.Struct("qq" * len(self.pieces)).pack
        self.live: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.last: list[PackedFloats] = []
        self.layers, self.members, self.names = net, networks, names
        # the last layer's rows are stored with each input on a multiple of 16, the packed ones without gaps
        spread = padded if len(net) == 1 else int
        columns = sum(map(spread, self.pieces))
        widest = -(-max(columns, *(layer.width for layer in net)) // PANEL) * PANEL
        self.ones = torch.ones(widest, dtype=torch.float32, device="cpu")
        self.packed = [
            [
                PackedFloats(t.weight, torch.bfloat16)
                if self.kind is PairsBFloat16
                else Packed(t.weight)
                if stored == torch.int8
                else PackedFloats(t.weight.to(compute))
                for t in member[:-1]
            ]
            for member in networks
        ]
        fields = len(LAST) + len(HIDDEN) * (len(net) - 1)
        # weights beyond the cache are read once a block
        stored_bytes = sum(p.panels.nbytes for member in self.packed for p in member)
        self.block = MOST_ROWS if stored_bytes > CACHE else BLOCK
        table = [
            *(len(net) - 1, self.outputs, widest, len(self.pieces), columns, len(networks)),
            *(int(reduce == "mean_std"), self.ones.data_ptr(), fields, self.block),
        ]
        start = 0
        for piece in self.pieces:
            table += piece, start
            start += spread(piece)
        for packed_member, member in zip(self.packed, networks, strict=True):
            table += self._last(member[-1].weight), self._at(member[-1].bias, 1), bits_of(net[-1].parameter)
            for layer, weight, t in zip(net, packed_member, member, strict=False):
                scale = self._at(t.scale) or self.ones.data_ptr()
                table += weight.address, scale, self._at(t.bias), names.index(layer.activation)
                table += bits_of(layer.parameter), self._at(t.gamma), self._at(t.beta), bits_of(layer.eps or 0.0)
        self.widest = widest
        self.table = torch.tensor(table, dtype=torch.int64, device="cpu")
        self.table_at = self.table.data_ptr()
        rows = 4 + widest * (self.kind.item + 4) + (4 * len(networks) * self.outputs if reduce == "mean_std" else 0)
        self.scratch = self.block * rows

    def _last(self, weight: Tensor) -> int:
        if not self.tiled:
            return self._at(weight)
        self.last.append(PackedFloats(weight.detach()))
        return self.last[-1].address

    def _at(self, tensor: Tensor | None, quantum: int = 16) -> int:
        """Where the kernel reads this one, so many values at once."""
        if tensor is None:
            return 0
        if tensor.dtype is FLOAT and tensor.is_contiguous() and tensor.shape[-1] % quantum == 0:
            self.live.append(tensor)
            self.copies.append(tensor.detach())  # its memory, should it be given other
            return tensor.data_ptr()
        self.copies.append(torch.nn.functional.pad(tensor.detach().float(), (0, -tensor.shape[-1] % 16)).contiguous())
        return self.copies[-1].data_ptr()

    def rows(self, places: bytes, m: int, y_at: int) -> None:
        """The outputs of m rows, on as many threads as they are worth."""
        run, table = self.run, self.table_at
        if m * self.work < self.parallel_work or m <= BLOCK or torch.get_num_threads() == 1:
            run(table, threads.scratch(self.scratch), places, 0, m, m, y_at)
            return

        def some_rows(start: int, stop: int) -> None:
            run(table, threads.scratch(self.scratch), places, start, stop, m, y_at)

        threads.run(some_rows, threads.ranges(m, torch.get_num_threads(), 12, BLOCK))

    def gradient(self) -> "Gradient | None":
        """Its form that gives the gradient of its one output as well, or None."""
        return Gradient(self) if Gradient.takes(self) else None

    def bound(self, inputs: list[Tensor], flat: bool = False) -> Callable[..., Tensor | None] | None:
        """The network as a function of inputs of these shapes and this type, or None; for others, and what is not dense
        on a CPU, the function gives None. ``flat``: the one output of a row has no dimension of its own.
        """
        kind = inputs[0].dtype
        if kind in HALVES:
            call = self.bound([x.float() for x in inputs], flat)
            return None if call is None else partial(_of_halves, kind, call)
        shapes = [x.shape for x in inputs]
        leading = shapes[0][:-1]
        m, shape = leading.numel(), (*self.leading, *leading, *(() if flat else (self.outputs,)))
        fits = [s[-1] for s in shapes] == list(self.pieces) and all(s[:-1] == leading for s in shapes)
        if self.run is None or not fits or m == 0 or not shape or (flat and self.outputs > 1):
            return None
        few = m <= BLOCK or m * self.work < self.parallel_work
        names = [f"x{i}" for i in range(len(shapes))]
        own = self.scratch <= OWN_SCRATCH
        call = self._quick(shapes, m, shape) if few else None
        if call is not None:
            source = f"""
def f({", ".join(names)}):
    return call({", ".join([*names, *([] if own else ["scratch(size)"])])})
"""
        else:
            other = [f"{x}.shape != {x}_shape" for x in names[1:]]
            other += [f"{x}.dtype is not FLOAT or not {x}.is_cpu" for x in names]
            other += [f"not {x}.is_contiguous() or {x}.is_neg()" for x in names]
            places = ", ".join(f"{x}.data_ptr(), {x}_width" for x in names)
            run = f"run(table, {'0' if own else 'scratch(size)'}, address({places}), 0, m, m, y.data_ptr())"
            # ``new`` is ``new_empty``, a tenth of a microsecond faster, but for the shape ()
            source = f"""
def f({", ".join(names)}):
    if {" or ".join(other)}:
        return None
    y = {"" if few else "in_large_pages"}(x0.new({", ".join(f"y{i}" for i in range(len(shape)))}))
    {run if few else f"network.rows(address({places}), m, y.data_ptr())"}
    return y
"""
        # the network owns what the table points to
        known = {"FLOAT": FLOAT, "run": self.run, "address": self.address, "network": self, "scratch": threads.scratch}
        known |= {"call": call, "in_large_pages": in_large_pages}
        place: dict[str, Any] = {**known, "table": self.table_at, "size": self.scratch, "m": m}
        place |= {f"y{i}": size for i, size in enumerate(shape)}
        for x, s, width in zip(names, shapes, self.pieces, strict=True):
            place |= {f"{x}_shape": s, f"{x}_width": width}
        return function(source, place)

    def _quick(self, shapes: list[torch.Size], m: int, shape: tuple[int, ...]) -> Any:
        """The call for inputs of these shapes in machine code, or None."""
        words = [self.table_at, 0, 0, 0, m, m, 0, *(word for width in self.pieces for word in (0, width))]
        rows = [(s, 7 + 2 * i) for i, s in enumerate(shapes)]
        scratch_at = 1 if self.scratch > OWN_SCRATCH else -1
        return quick.settled(self.run, words, rows, shape, y_at=6, scratch_at=scratch_at, table=(2, 7))


def _of_halves(kind: torch.dtype, call: Callable[..., Tensor | None], *inputs: Tensor) -> Tensor | None:
    """The call with inputs of 16 bits as what they are in fp32; None for others."""
    if any(x.dtype is not kind or not x.is_cpu for x in inputs):
        return None
    y = call(*[x.float() for x in inputs])
    return None if y is None else y.to(kind)


class Gradient:
    """A network's output and its gradient: ``mlp_gradient.py``."""

    @staticmethod
    def takes(network: Network) -> bool:
        """One MLP, two layers or more, one output, and slopes that follow from the activations' outputs."""
        return (
            network.run is not None
            and not network.leading
            and network.outputs == 1
            and len(network.layers) > 1
            and all(layer.eps is None and layer.activation in mlp_gradient.SLOPES for layer in network.layers)
            and all(layer.parameter > 0 for layer in network.layers if layer.activation in ("leaky_relu", "elu"))
        )

    def __init__(self, network: Network) -> None:
        self.network, hidden = network, network.members[0][:-1]
        back = Whole if issubclass(network.kind, Whole) else Float
        key = network.kind, back, network.names, network.layers[-1].activation, None
        self.run = prepare_gradient(*key)
        with torch.no_grad():
            turned = [t.weight.t().contiguous() for t in hidden]
            self.packed = [Packed(w) if back is Float else PackedFloats(w) for w in turned]
        self.turned = turned
        self.back = torch.tensor([packed.address for packed in self.packed], dtype=torch.int64, device="cpu")
        self.columns = sum(network.pieces)
        self.scratch = 4 * BLOCK * (1 + network.widest * (len(network.layers) + 2))

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(y [m, 1], gradient [m, columns]) of contiguous fp32 inputs [m, piece] on a CPU."""
        network, m = self.network, inputs[0].shape[0]
        places: list[int] = []
        for x, width in zip(inputs, network.pieces, strict=True):
            places += x.data_ptr(), width
        y, gradient = inputs[0].new_empty(m, 1), inputs[0].new_empty(m, self.columns)
        at = network.table_at, self.back.data_ptr()
        rows = network.address(*places), y.data_ptr(), gradient.data_ptr()

        def some_rows(start: int, stop: int) -> None:
            self.run(*at, threads.scratch(self.scratch), rows[0], start, stop, *rows[1:])

        if 2 * m * network.work < network.parallel_work or m <= BLOCK or torch.get_num_threads() == 1:
            some_rows(0, m)
        else:
            threads.run(some_rows, threads.ranges(m, torch.get_num_threads(), 12, BLOCK))
        return y, gradient


class Plan(Network):
    """The network of one weights tensor, and the shapes it has been checked for."""

    def __init__(
        self,
        weights: Tensor,
        params: Tensor,
        layers: str,
        members: int | None,
        reduce: str,
        compute: torch.dtype,
        isa: str | None,
        gone: Callable[[Any], None],
    ):
        networks = unpack(weights, params, layers, members or 1, padding=True)
        super().__init__(networks, layout(layers, weights.dtype == torch.int8), members, reduce, compute, isa)
        # views of params: they would keep it alive
        self.live = []
        self.weights, self.params = Source(weights, gone), Source(params, gone)
        self.shapes: dict[Any, tuple[int, tuple[int, ...]]] = {}

    def holds(self, weights: Tensor, params: Tensor) -> bool:
        # but for a packed last layer, params are read where they lie
        written = self.params.holds if self.tiled else self.params.is_at
        return self.weights.holds(weights) and written(params)


def _plan(
    weights: Tensor, params: Tensor, layers: str, members: int | None, reduce: str, compute: Any, isa: str | None
) -> Plan:
    key = (id(weights), layers, members, reduce, compute, isa)

    # by name: when the interpreter ends, this module's own may be gone before the tensor
    def gone(reference: Any, plans: dict[Any, Any] = _plans) -> None:
        now = plans.get(key)
        if now is not None and reference in (now.weights.tensor, now.params.tensor):
            del plans[key]

    with torch.no_grad():
        made_of = compute or (torch.float16 if weights.dtype == torch.int8 else weights.dtype)
        _plans[key] = new = Plan(weights, params, layers, members, reduce, made_of, isa, gone)
    return new


def fused_mlp(
    inputs: list[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None = None,
    reduce: str = "none",
    compute_dtype: torch.dtype | None = None,
    input_scales: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    plan = _plans.get((id(weights), layers, members, reduce, compute_dtype, isa))
    one = inputs[0] if len(inputs) == 1 else None
    shapes: Any = tuple([x.shape for x in inputs]) if one is None else one.shape
    found = plan.shapes.get(shapes) if plan is not None and plan.holds(weights, params) else None
    if plan is None or found is None or input_scales is not None:
        return _unseen(inputs, weights, params, layers, members, reduce, compute_dtype, input_scales, isa)
    m, shape = found
    for x in inputs:
        if x.dtype is not FLOAT or not x.is_cpu:
            return _unseen(inputs, weights, params, layers, members, reduce, compute_dtype, input_scales, isa)
    if one is not None and one.is_contiguous():
        at = plan.address(one.data_ptr(), plan.pieces[0])
    else:
        places: list[int] = []
        # copies live to the end of the call
        rows = [x if x.is_contiguous() else dense_rows(x) for x in inputs]
        for x, row, width in zip(inputs, rows, plan.pieces, strict=True):
            places += row.data_ptr(), width if row is x else row.stride(0)
        at = plan.address(*places)
    y = in_large_pages(inputs[0].new_empty(*shape))
    plan.rows(at, m, y.data_ptr())
    return y


def _unseen(
    inputs: list[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None,
    reduce: str,
    compute_dtype: torch.dtype | None,
    input_scales: Tensor | None,
    isa: str | None,
) -> Tensor:
    """A call that needs its checks, a plan, or its inputs made fp32."""
    _check(inputs, weights, params, layers, members, reduce, compute_dtype, input_scales)
    if input_scales is not None or any(x.dtype != FLOAT for x in inputs):
        compute = compute_type(inputs, weights, compute_dtype)
        y = fused_mlp(numbers(inputs, input_scales), weights, params, layers, members, reduce, compute, None, isa)
        return y.to(new_output(inputs, layers, members, reduce).dtype)
    plan = _plans.get((id(weights), layers, members, reduce, compute_dtype, isa))
    if plan is None or not plan.holds(weights, params):
        plan = _plan(weights, params, layers, members, reduce, compute_dtype, isa)
    if plan.run is None:
        return fused_mlp_reference(inputs, weights, params, layers, members, reduce, compute_dtype, input_scales)
    if len(plan.shapes) == SHAPES_KEPT:
        plan.shapes.clear()
    leading = inputs[0].shape[:-1]
    plan.shapes[tuple(x.shape for x in inputs) if len(inputs) > 1 else inputs[0].shape] = (
        leading.numel(),
        (*plan.leading, *leading, plan.outputs),
    )
    return fused_mlp(inputs, weights, params, layers, members, reduce, compute_dtype, None, isa)


# calls ``_check`` where it has not seen the like before
fused_mlp.checks = True  # type: ignore[attr-defined]
fused_mlp.network = Network  # type: ignore[attr-defined]
fused_mlp.multiplies_bfloat16 = multiplies_bfloat16  # type: ignore[attr-defined]
