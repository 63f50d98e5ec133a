"""A grammar of models, and the bound their results are held to: that of ``mlp_numerics.py``, over any mix of layers."""

import random
from typing import Any

import torch
from mlp_numerics import LIPSCHITZ
from numerics import SMALLEST, UNIT, C, activation_error, assert_within
from torch import Tensor, nn

from rewardzip.nn import CompressedLinear
from rewardzip_kernels import activations

ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "gelu": nn.GELU, "mish": nn.Mish,
    "elu:1.0": nn.ELU, "leaky_relu:0.01": nn.LeakyReLU, "softplus": nn.Softplus, "none": nn.Identity,
}  # fmt: skip
FUNCTIONS: dict[str, Any] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": nn.functional.silu,
    "gelu": nn.functional.gelu, "mish": nn.functional.mish, "elu:1.0": nn.functional.elu,
    "leaky_relu:0.01": nn.functional.leaky_relu, "softplus": nn.functional.softplus, "none": lambda x: x,
}  # fmt: skip


class Spec:
    """What a random model is: widths of its inputs and layers, and behind each layer a norm or none, an activation."""

    def __init__(self, dice: random.Random, dtype: torch.dtype | None, form: str | None) -> None:
        self.form = form or dice.choice(("sequential", "functional", "functional, inputs apart"))
        self.dtype = dtype or dice.choices((torch.float32, torch.bfloat16, torch.float16), (8, 1, 1))[0]
        self.pieces = [_width(dice) for _ in range(dice.choice((2, 2, 3)) if "apart" in self.form else 1)]
        depth = dice.choice((0, 1, 2, 2, 2, 3, 4))
        self.widths = [_width(dice) for _ in range(depth)] + [dice.choice((1, 1, 1, 3, 16, 33))]
        same = dice.choice(list(ACTIVATIONS))
        mixed = dice.random() < 0.3
        self.activations = [dice.choice(list(ACTIVATIONS)) if mixed else same for _ in range(depth)]
        self.activations.append(dice.choice(("none", "none", "none", "tanh")))
        self.norms = [dice.random() < 0.2 and width > 1 for width in self.widths[:-1]] + [False]
        self.biases = [dice.random() < 0.9 for _ in self.widths]
        self.dropout = dice.random() < 0.2


def _width(dice: random.Random) -> int:
    return dice.choice((1, 2, 3, 7, 15, 16, 17, 23, 31, 32, 33, 64, 64, 65, 100, 128, 130, 256, 257, 300))


def _layers(spec: Spec) -> tuple[list[nn.Linear], list[nn.Module]]:
    sizes = [sum(spec.pieces), *spec.widths]
    linears = [nn.Linear(k, n, bias) for k, n, bias in zip(sizes, spec.widths, spec.biases, strict=False)]
    norms: list[nn.Module] = [
        nn.LayerNorm(n) if norm else nn.Identity() for n, norm in zip(spec.widths, spec.norms, strict=True)
    ]
    for norm in norms:
        if isinstance(norm, nn.LayerNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return linears, norms


def _sequential(spec: Spec) -> nn.Sequential:
    parts: list[nn.Module] = []
    for linear, norm, activation in zip(*_layers(spec), spec.activations, strict=True):
        parts.append(linear)
        parts += [norm] * isinstance(norm, nn.LayerNorm)
        parts += [ACTIVATIONS[activation]()] * (activation != "none")
        parts += [nn.Dropout(0.1)] * spec.dropout
    return nn.Sequential(*parts)


class Functional(nn.Module):
    """The same written as people write forwards: functions for activations, ``cat`` for several inputs."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.names = spec.activations
        linears, norms = _layers(spec)
        self.layers, self.norms = nn.ModuleList(linears), nn.ModuleList(norms)

    def forward(self, *inputs: Tensor) -> Tensor:
        h = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        for layer, norm, name in zip(self.layers, self.norms, self.names, strict=True):
            h = FUNCTIONS[name](norm(layer(h)))
        return h


def _model(spec: Spec) -> nn.Module:
    model = _sequential(spec) if spec.form == "sequential" else Functional(spec)
    model = model.to(spec.dtype).eval().requires_grad_(False)
    # kept beside the modules: a swapped copy has them too
    model.spec, model.dtype = spec, spec.dtype  # type: ignore[assignment]
    model.twin = lambda: _model(spec)  # type: ignore[assignment]
    return model


def random_model(dice: random.Random, dtype: torch.dtype | None = None, form: str | None = None) -> Any:
    return _model(Spec(dice, dtype, form))


def random_inputs(dice: random.Random, model: Any, rows: int) -> tuple[Tensor, ...]:
    size = dice.choice((1.0, 1.0, 0.01, 10.0))
    return tuple((size * torch.randn(rows, k)).to(model.dtype) for k in model.spec.pieces)


def agree(found: Any, expected: Any, what: str) -> None:
    """To the bit: a tensor, or a state dict."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for name in expected:
            agree(found[name], expected[name], f"{what}: {name}")
        return
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, {tuple(expected.shape)} expected"
    worst = (found.double() - expected.double()).abs().max() if found.numel() else 0
    assert torch.equal(found, expected), f"{what}: {worst} apart"


def stands_for(fast: nn.Module, model: nn.Module) -> None:
    """Every layer's numbers are those of the dense model: weights within half a step, all else as it was."""
    for name, layer in fast.named_modules():
        if isinstance(layer, (CompressedLinear, nn.Linear)):
            source = model.get_submodule(name)
            step = source.weight.double().abs().amax(1, keepdim=True) / 127
            moved = (_numbers(layer, source.weight.dtype)[0] - source.weight.double()).abs()
            assert (moved <= 0.501 * step + 1e-30).all(), f"{name}: a weight is {moved.max()} away"
            if source.bias is not None:
                agree(layer.bias, source.bias, f"{name}: bias")


def within_bound(fast: nn.Module, y: Tensor, inputs: tuple[Tensor, ...], what: str) -> None:
    ref, bound = _exact(fast, inputs)
    try:
        assert_within(y, ref, bound)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}\n{fast}") from None


def _exact(fast: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The network in float64 from the numbers it holds, and how far roundings may carry its result."""
    spec: Spec = fast.spec
    if isinstance(fast, nn.Sequential):
        linears = [m for m in fast if isinstance(m, (nn.Linear, CompressedLinear))]
        norms = iter([m for m in fast if isinstance(m, nn.LayerNorm)])
        pairs = [(linear, next(norms) if norm else None) for linear, norm in zip(linears, spec.norms, strict=True)]
    else:
        pairs = list(zip(fast.layers, fast.norms, strict=True))
    h = torch.cat([x.double() for x in inputs], -1)
    error = torch.zeros_like(h)
    own = UNIT[spec.dtype]
    for (layer, norm), name in zip(pairs, spec.activations, strict=True):
        weight, bias, rows, unit = _numbers(layer, spec.dtype)
        size = h.abs() @ weight.abs().t()
        if rows == "dynamic":
            # either rounding of a row is within half a step of it, and the largest input may have moved the step
            error = error + 0.51 * ((h.abs() + error).amax(-1, keepdim=True) / 127)
        elif rows == "static":
            error = (
                error + 0.51 * layer.x_scale.double() + (h.abs() + error - 127 * layer.x_scale.double()).clamp(min=0)
            )
        error = error + UNIT[unit] * (h.abs() + error) * C
        z = h @ weight.t() + bias
        error = error @ weight.abs().t() + C * h.shape[1] ** 0.5 * own_sum(layer, spec.dtype) * (size + bias.abs())
        error = error + C * own * (z.abs() + error)
        if isinstance(norm, nn.LayerNorm):
            z, error = _norm(z, error, norm, own)
        kind = name.partition(":")[0]
        error = LIPSCHITZ.get(kind, 1.0) * error + C * activation_error(z, kind)
        h = activations.apply(z, name)
        error = error + C * own * (h.abs() + error) + SMALLEST[spec.dtype]
    return h, error


def own_sum(layer: nn.Module, dtype: torch.dtype) -> float:
    """The roundoff of a layer's sums: fp32, but for what torch does inside dense 16-bit layers."""
    return UNIT[torch.float32] if isinstance(layer, CompressedLinear) else UNIT[dtype]


def _numbers(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, str, Any]:
    if isinstance(layer, CompressedLinear):
        weight = layer.int8_weight.double() * layer.scale.double()[:, None]
        bias, rows, unit = layer.fp32_bias, layer.rows, layer.compute_dtype
    else:
        weight, bias, rows, unit = layer.weight.double(), layer.bias, "float", None
    return weight, torch.zeros(1).double() if bias is None else bias.double(), rows, unit


def _norm(z: Tensor, error: Tensor, norm: nn.LayerNorm, own: float) -> tuple[Tensor, Tensor]:
    gamma, beta = norm.weight.double(), norm.bias.double()
    centred = z - z.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    # of all values within the error, the deviation is least where they are nearest to each other
    spread = error.square().mean(-1, keepdim=True).sqrt()
    least = (deviation - spread).clamp(min=norm.eps**0.5)
    unit = centred / deviation
    moved = (error + error.mean(-1, keepdim=True) + unit.abs() * spread) / least
    rounding = C * max(own, UNIT[torch.float32]) * ((z.abs() + z.abs().mean(-1, keepdim=True)) / least + 4 * unit.abs())
    return unit * gamma + beta, (moved + rounding) * gamma.abs() + C * own * beta.abs()
