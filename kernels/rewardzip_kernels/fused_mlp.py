"""fused_mlp: a whole MLP, or an ensemble of them over the same inputs, as one op and one kernel launch.

    h = concat(inputs)
    h = act(norm(scale * (h @ weight^T) + bias))    for each hidden layer
    y = act(h @ weight^T + bias)

    inputs         1 or more [..., K_i]: fp32, fp16, bf16; or int8, uint8 with their row of ``input_scales``
    weights        all hidden weights, flat, int8 or 16-bit         params   all else, flat, fp32: see ``mlp_layout``
    layers         "17+6: 256 layer_norm:1e-05 mish, 256 relu, 1"   members  E networks, or None for one
    y              [..., out]; [E, ..., out]; with reduce "mean_std" [2, ..., out], the mean and torch's std (E - 1;
                   NaN for E = 1). Its dtype: what the float inputs promote to, fp32 if there is none
    input_scales   [inputs, 2] fp32: an integer input is (q - zero point) * scale, its row is (scale, zero point)

``compute_dtype`` is what the hidden layers' products are made of: their inputs and 16-bit weights are rounded to it
(int8 is exact in all of them). Sums, scale, bias, LayerNorm and activation are fp32, and so is the whole last layer,
whose input is not rounded at all. Default: the inputs' dtype where all are fp16 or all bf16, else that of 16-bit
weights, else float16. float16 rounds by 2^-11, and what passes 65504, an input or an activation, becomes inf and stays
visible; bfloat16 has fp32's range and rounds by 2^-8; float32 is tf32 on a GPU's tensor cores, 2^-10, exact on a CPU.
int8, for int8 weights, rounds every row anew before each hidden layer by ``quantize_rows``; the sums are exact int32:

    h = act(norm((q @ weight^T) * (row_scale * scale) + bias))      a row that holds an inf or a NaN becomes NaN
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations
from .checks import FLOATS, dense_rows
from .int8_dynamic_linear import int8_matmul_reference
from .loading import implementation
from .mlp_layout import MAX_WIDTH, Layer, Linear, check_sizes, layout, parse_layers, unpack
from .quantize import quantize_rows_reference
from .registration import register

INTEGERS = (torch.int8, torch.uint8)


def compute_type(inputs: list[Tensor], weights: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """``compute_dtype`` or its default."""
    if compute_dtype is not None:
        return compute_dtype
    first = inputs[0].dtype
    if first in (torch.float16, torch.bfloat16) and all(x.dtype == first for x in inputs):
        return first
    return torch.float16 if weights.dtype == torch.int8 else weights.dtype


def new_output(inputs: list[Tensor], layers: str, members: int | None, reduce: str) -> Tensor:
    """y, not yet written."""
    dtype = None
    for x in inputs:
        if x.dtype not in INTEGERS:
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    leading = () if members is None else (members if reduce == "none" else 2,)
    shape = (*leading, *inputs[0].shape[:-1], parse_layers(layers)[1][-1][0])
    return inputs[0].new_empty(shape, dtype=dtype or torch.float32)


def numbers(inputs: list[Tensor], input_scales: Tensor | None) -> list[Tensor]:
    """The inputs as fp32."""
    found = []
    for i, x in enumerate(inputs):
        row = x.float()
        if x.dtype in INTEGERS and input_scales is not None:
            row = (row - input_scales[i, 1]) * input_scales[i, 0]
        found.append(row)
    return found


def joined(inputs: list[Tensor], input_scales: Tensor | None) -> Tensor:
    """The inputs as numbers, side by side: [M, K] fp32."""
    return torch.cat([dense_rows(x) for x in numbers(inputs, input_scales)], 1)


def _hidden(h: Tensor, layer: Layer, tensors: Linear, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """A hidden layer before its LayerNorm, and before its activation."""
    scale = tensors.scale
    if compute == torch.int8 and scale is not None:
        q, row_scale = torch.empty_like(h, dtype=torch.int8), h.new_empty(h.shape[0])
        quantize_rows_reference(h, None, q, row_scale)
        z, scale = int8_matmul_reference(q, tensors.weight).float(), row_scale[:, None] * scale
    else:
        z = h.to(compute).float() @ tensors.weight.to(compute).float().t()
    if scale is not None:
        z = z * scale
    z = z + tensors.bias
    if layer.eps is None:
        return z, z
    return z, F.layer_norm(z, (layer.width,), tensors.gamma, tensors.beta, layer.eps)


def _forward(
    h: Tensor, layers: tuple[Layer, ...], member: list[Linear], compute: torch.dtype
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(y [M, out] fp32, per layer its values before LayerNorm and before its activation)."""
    kept = []
    for layer, tensors in zip(layers[:-1], member, strict=False):
        kept.append(_hidden(h, layer, tensors, compute))
        h = activations.ACTIVATIONS[layer.activation].forward(kept[-1][1], layer.parameter)
    z = h @ member[-1].weight.t() + member[-1].bias
    kept.append((z, z))
    return activations.ACTIVATIONS[layers[-1].activation].forward(z, layers[-1].parameter), kept


def _statistics(ys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the members, ys [E, M, out]."""
    mean = ys.mean(0)
    return mean, (((ys - mean) ** 2).sum(0) / (ys.shape[0] - 1)).sqrt()


def fused_mlp_reference(
    inputs: list[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None = None,
    reduce: str = "none",
    compute_dtype: torch.dtype | None = None,
    input_scales: Tensor | None = None,
) -> Tensor:
    net = layout(layers, weights.dtype == torch.int8)
    compute = compute_type(inputs, weights, compute_dtype)
    y = new_output(inputs, layers, members, reduce)
    x = joined(inputs, input_scales)
    networks = unpack(weights, params, layers, members or 1)
    ys = torch.stack([_forward(x, net.layers, member, compute)[0] for member in networks])
    if reduce == "mean_std":
        ys = torch.stack(_statistics(ys))
    return y.copy_(ys.view(y.shape))


def _check(
    inputs: list[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None = None,
    reduce: str = "none",
    compute_dtype: torch.dtype | None = None,
    input_scales: Tensor | None = None,
) -> None:
    net = layout(layers, weights.dtype == torch.int8)
    pieces = net.layers[0].pieces
    widest = max(layer.width for layer in net.layers)
    if widest > MAX_WIDTH:
        raise ValueError(f"fused_mlp: layers {layers!r} are up to {widest} wide; at most {MAX_WIDTH} fit in one launch")
    if len(inputs) != len(pieces):
        raise ValueError(f"fused_mlp: {len(inputs)} inputs, but layers {layers!r} take {len(pieces)}")
    first = inputs[0]
    for i, x in enumerate(inputs):
        if x.dtype not in FLOATS and x.dtype not in INTEGERS:
            raise TypeError(f"fused_mlp: input {i} is {x.dtype}; it must be float32, float16, bfloat16, int8 or uint8")
        if x.dim() == 0 or x.shape[-1] != pieces[i]:
            raise ValueError(f"fused_mlp: input {i} has shape {tuple(x.shape)}, but layers {layers!r} take {pieces[i]}")
        if x.shape[:-1] != first.shape[:-1]:
            raise ValueError(f"fused_mlp: input {i} has shape {tuple(x.shape)}, but input 0 {tuple(first.shape)}")
        if x.dtype in INTEGERS and input_scales is None:
            raise ValueError(f"fused_mlp: input {i} is {x.dtype}, but input_scales is None")
    for name, tensor in (*((f"input {i}", x) for i, x in enumerate(inputs)), ("params", params)):
        if tensor.device != weights.device:
            raise ValueError(f"fused_mlp: {name} is on {tensor.device}, weights on {weights.device}")
    if input_scales is not None and (input_scales.shape != (len(inputs), 2) or input_scales.dtype != torch.float32):
        raise ValueError(
            f"fused_mlp: input_scales is {input_scales.dtype} {tuple(input_scales.shape)}; "
            f"it must be float32 ({len(inputs)}, 2)"
        )
    if members is not None and members < 1:
        raise ValueError(f"fused_mlp: members is {members}; it must be None, or 1 or more")
    if reduce not in ("none", "mean_std"):
        raise ValueError(f"fused_mlp: reduce is {reduce!r}; it must be 'none' or 'mean_std'")
    if reduce == "mean_std" and members is None:
        raise ValueError("fused_mlp: reduce is 'mean_std', but members is None")
    if compute_dtype is not None and compute_dtype not in (*FLOATS, torch.int8):
        raise TypeError(f"fused_mlp: compute_dtype is {compute_dtype}; it must be float32, float16, bfloat16 or int8")
    if compute_dtype == torch.int8 and weights.dtype != torch.int8:
        raise TypeError(f"fused_mlp: compute_dtype is torch.int8, but weights is {weights.dtype}")
    check_sizes("fused_mlp", weights, params, net, members or 1)


def _fake(
    inputs: list[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None = None,
    reduce: str = "none",
    *_: Any,
) -> Tensor:
    return new_output(inputs, layers, members, reduce)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, weights, params, layers, members, reduce, compute_dtype, input_scales = inputs
    ctx.save_for_backward(weights, params, input_scales, *xs)
    ctx.layers, ctx.members, ctx.reduce, ctx.compute_dtype = layers, members, reduce, compute_dtype


def _slope(layer: Layer, z: Tensor) -> Tensor:
    entry = activations.ACTIVATIONS[layer.activation]
    return entry.derivative(entry.forward(z, layer.parameter) if entry.from_output else z, layer.parameter)


def _input_gradient(
    grad: Tensor, layers: tuple[Layer, ...], member: list[Linear], kept: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """d y / d concat(inputs), for grad [M, out]; a rounding counts as the identity."""
    grad = (grad * _slope(layers[-1], kept[-1][1])) @ member[-1].weight
    for layer, tensors, (z, normal) in reversed(list(zip(layers, member, kept, strict=True))[:-1]):
        grad = grad * _slope(layer, normal)
        if layer.eps is not None and tensors.gamma is not None:
            inverse = (z.var(1, correction=0, keepdim=True) + layer.eps).rsqrt()
            unit, grad = (z - z.mean(1, keepdim=True)) * inverse, grad * tensors.gamma
            grad = inverse * (grad - grad.mean(1, keepdim=True) - unit * (grad * unit).mean(1, keepdim=True))
        grad = (grad if tensors.scale is None else grad * tensors.scale) @ tensors.weight.float()
    return grad


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, params, input_scales, *inputs = ctx.saved_tensors
    net = layout(ctx.layers, weights.dtype == torch.int8)
    networks = unpack(weights, params, ctx.layers, ctx.members or 1)
    x, compute = joined(inputs, input_scales), compute_type(inputs, weights, ctx.compute_dtype)
    runs = [_forward(x, net.layers, member, compute) for member in networks]
    grads = grad.float().reshape(2 if ctx.reduce == "mean_std" else len(runs), x.shape[0], net.layers[-1].width)
    if ctx.reduce == "mean_std":
        ys = torch.stack([y for y, _ in runs])
        mean, std = _statistics(ys)
        # where the members agree the deviation has no slope: 0, as in torch
        pull = torch.where(std == 0, 0.0, grads[1] / (std * (len(runs) - 1)))
        grads = grads[0] / len(runs) + pull * (ys - mean)
    total = torch.zeros_like(x)
    for g, member, (_, kept) in zip(grads, networks, runs, strict=True):
        total = total + _input_gradient(g, net.layers, member, kept)
    parts = total.split(net.layers[0].pieces, 1)
    found = [
        None if i.dtype in INTEGERS else part.reshape(i.shape).to(i.dtype)
        for i, part in zip(inputs, parts, strict=True)
    ]
    # one for each argument that arrived: the dispatcher drops what equals its default
    return found, *[None] * (len(ctx.needs_input_grad) - 1)


_op = register(
    "fused_mlp(Tensor[] inputs, Tensor weights, Tensor params, str layers, int? members=None, str reduce='none', "
    "ScalarType? compute_dtype=None, Tensor? input_scales=None) -> Tensor",
    check=_check,
    reference=fused_mlp_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def fused_mlp(
    inputs: Sequence[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None = None,
    reduce: str = "none",
    compute_dtype: torch.dtype | None = None,
    input_scales: Tensor | None = None,
) -> Tensor:
    """The networks packed in ``weights`` and ``params``, over the inputs; reference: ``fused_mlp_reference``."""
    y: Tensor = _op(list(inputs), weights, params, layers, members, reduce, compute_dtype, input_scales)
    return y


def network(
    networks: list[list[Linear]], layers: str, members: int | None, reduce: str, compute_dtype: torch.dtype
) -> Any:
    """The CPU's form of these layers, of any width: ``bound(inputs)`` gives a function of inputs such as these. None
    where they are not on a CPU, or its implementation has none.

    It is for eager calls that nobody listens to, and does not notice changes of the other tensors.
    """
    pieces, entries = parse_layers(layers)
    for member in networks:
        k = sum(pieces)
        for (n, *_), t in zip(entries, member, strict=True):
            if tuple(t.weight.shape) != (n, k):
                raise ValueError(
                    f"fused_mlp: {layers!r} has a layer of shape {(n, k)}, its weight is {tuple(t.weight.shape)}"
                )
            k = n
    make = getattr(implementation("cpu", "fused_mlp", fused_mlp_reference), "network", None)
    if make is None or not all(t.weight.is_cpu for member in networks for t in member):
        return None
    with torch.no_grad():
        return make(networks, layout(layers, True), members, reduce, compute_dtype, None)


def multiplies_bfloat16() -> bool:
    """Whether the CPU's form multiplies bfloat16 as fast as this processor can: not where it has units for matrices."""
    made = implementation("cpu", "fused_mlp", fused_mlp_reference)
    return bool(getattr(made, "multiplies_bfloat16", lambda: False)())


def packed_network(
    packed: Callable[[], tuple[Tensor, Tensor]],
    device: torch.device,
    layers: str,
    members: int | None,
    reduce: str,
    compute_dtype: torch.dtype | None,
) -> Any:
    """As ``network``, of the packed tensors, which are read where they lie: a GPU's form, and None elsewhere."""
    found = implementation("cpu" if device.type == "cpu" else "gpu", "fused_mlp", fused_mlp_reference)
    make = getattr(found, "packed_network", None)
    return make and make(*packed(), layers, members, reduce, compute_dtype)
