"""What became of each linear layer of a model, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .constraints import settle_masked
from .fuse import FusedForward
from .int8 import Int8
from .nn import CompressedLinear, Int8Linear
from .nn.base import is_conv1d
from .nn.zeros import Zeros
from .patterns import find_pattern
from .swap import reason_to_leave


@dataclass(frozen=True)
class Layer:
    name: str
    op: str
    activation: str
    why: str
    bytes_before: int
    bytes_after: int
    sparsity: float = 0.0
    """The share of the weights that are zero, or were when ``swap`` packed them."""
    pattern: str = "dense"
    bytes_theory: int = 0
    """What the weights take by the formula of the layer's form, without scales and biases."""


class Explanation(list[Layer]):
    """One entry a linear layer; prints as a table."""

    def __str__(self) -> str:
        lines = [("layer", "op", "activation", "zeros", "pattern", "bytes before", "after", "weights by theory", "why")]
        for e in self:
            sizes = (str(e.bytes_before), str(e.bytes_after), str(e.bytes_theory))
            lines.append((e.name, e.op, e.activation, f"{100 * e.sparsity:.0f} %", e.pattern, *sizes, e.why))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def explain(model: nn.Module) -> Explanation:
    """A table of the model's linear layers: what runs them, what is fused, why, and bytes before and after."""
    model = settle_masked(model)
    fused: dict[str, str] = {}
    launches: dict[str, str] = {}
    ops: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedForward):
            prefix = f"{name}." if name else ""
            fused |= {prefix + child: activation for child, activation in module.rz_fused.items()}
            for chain in module.rz_chains:
                first, last = prefix + chain.steps[0].layer, prefix + chain.steps[-1].layer
                launches |= {prefix + step.layer: f"{chain.where}, {first} to {last}" for step in chain.steps}
                fused |= {prefix + step.layer: step.activation for step in chain.steps}
                ops |= {prefix + step.layer: chain.op for step in chain.steps if chain.op}
    found = Explanation()
    for name, m in model.named_modules():
        activation = fused.get(name, "none")
        if isinstance(m, CompressedLinear):
            after = sum(b.numel() * b.element_size() for b in m.buffers())
            dense = (m.in_features + (m.fp32_bias is not None)) * m.out_features * m.dtype.itemsize
            apart = "its activation in the same launch" if name in fused else "no activation behind it was found"
            op = ops.get(name, type(m).__name__)
            how = launches.get(name, apart) if isinstance(m, Int8Linear) or not m.remark else ""
            dropped = m.zeros.dropped if m.zeros else 0
            zeros = m.zeros if m.zeros and m.zeros.pattern else _zeros(m.weight)
            dead = f"{dropped} of {m.out_features + dropped} neurons were dead: dropped" if dropped else ""
            why = "; ".join(filter(None, (how, m.remark, zeros.why, dead)))
            theory = m.weight_bytes()
            found.append(Layer(name, op, activation, why, dense, after, zeros.share, zeros.pattern, theory))
        elif isinstance(m, nn.Linear) or is_conv1d(m):
            size = sum(p.numel() * p.element_size() for p in m.parameters())
            plain = type(m) is nn.Linear or is_conv1d(m)
            why = (reason_to_leave([name], m, Int8()) if plain else "a subclass of nn.Linear") or "not chosen"
            op = ops.get(name, type(m).__name__)
            if name in launches:
                why = f"{launches[name]}; {'not compressed' if why == 'not chosen' else why}"
            zeros = _zeros(m.weight.t() if is_conv1d(m) else m.weight)
            theory = m.weight.numel() * m.weight.element_size()
            found.append(Layer(name, op, activation, why, size, size, zeros.share, zeros.pattern, theory))
    return found


def _zeros(weight: Tensor) -> Zeros:
    pattern = find_pattern(weight)
    return Zeros(pattern.sparsity, str(pattern), "")
