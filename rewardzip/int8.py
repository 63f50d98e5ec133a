"""``Int8`` and ``Fused``: what ``swap`` is told to turn linear layers into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .forms import Form, Rows, find_form
from .nn.base import CompressedLinear
from .nn.int8_linear import Int8Linear
from .nn.zeros import Zeros

HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Int8:
    """int8 weights, one scale per output.

    activations: None keeps the rows in their own type (the default: the model's numbers move least); "dynamic" rounds
        each row to int8 inside the layer; "static" uses one scale a layer, taken from the example inputs, or "dynamic"
        for a layer that they reach as zeros.
    compute_dtype: what the products of float rows are made of, "float32" (tf32 on a GPU), "float16" or "bfloat16".
        None is the type of the rows, but for a whole MLP in one launch on a GPU, where it is float16 for fp32 rows:
        beyond 65504 an activation becomes inf there, and the output inf or NaN. "float16" for wider rows needs example
        inputs, whose range is checked.
    scalar_outputs: also take layers with one output, which are otherwise left in full precision.
    """

    activations: Literal["dynamic", "static"] | None = None
    compute_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    scalar_outputs: bool = False

    def __post_init__(self) -> None:
        if self.activations not in (None, "dynamic", "static"):
            raise ValueError(f"Int8: activations is {self.activations!r}; it must be None, 'dynamic' or 'static'")
        if self.compute_dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(
                f"Int8: compute_dtype is {self.compute_dtype!r}; it must be None, 'float32', 'float16' or 'bfloat16'"
            )
        if self.activations is not None and self.compute_dtype is not None:
            raise ValueError(
                f"Int8: activations={self.activations!r} multiplies int8 by int8; "
                f"compute_dtype={self.compute_dtype!r} has no meaning there"
            )

    @property
    def needs_range(self) -> bool:
        """Whether a layer can only be made knowing the largest input it sees."""
        return self.activations == "static" or self.compute_dtype == "float16"

    def make(self, linear: nn.Linear, name: str, x_amax: float | None) -> CompressedLinear:
        """Dense int8, or the form of ``forms.py`` that skips the weight's zeros where that is faster."""
        form, zeros = self._form(linear)
        layer = self._dense(linear, name, x_amax) if form is None else form.make(linear, self._rows)
        layer.zeros = zeros
        return layer

    def skips_zeros(self, linear: nn.Linear) -> bool:
        """Whether ``make`` skips the layer's zeros where they are: to take whole neurons would move the others."""
        form, zeros = self._form(linear)
        return form is not None and "dead" not in zeros.pattern

    @property
    def _rows(self) -> Rows:
        return "float" if self.activations is None else "dynamic"

    def _form(self, linear: nn.Linear) -> tuple[Form | None, Zeros]:
        lacking = "static scales" if self.activations == "static" else ""
        if self.compute_dtype is not None:
            lacking = f"products in {self.compute_dtype}"
        return find_form(linear, self._rows, lacking)

    def _dense(self, linear: nn.Linear, name: str, x_amax: float | None) -> Int8Linear:
        half = self.compute_dtype == "float16"
        if half and x_amax is not None and not x_amax <= HALF_MAX:
            raise ValueError(
                f"swap: layer {name!r} sees inputs up to {x_amax:g}, but float16 ends at {HALF_MAX:g}; "
                "use compute_dtype='bfloat16' or leave it out"
            )
        rows = self.activations or "float"
        return Int8Linear.from_linear(
            linear,
            # the examples put nothing but zeros in: no scale for all can be taken from them
            rows="dynamic" if rows == "static" and x_amax == 0 else rows,
            compute_dtype=None if self.compute_dtype is None else getattr(torch, self.compute_dtype),
            x_amax=x_amax,
        )


@dataclass(frozen=True)
class Fused:
    """Nothing is compressed: an MLP of up to 6 layers and a million weights becomes one call on a CPU.

    Its outputs differ by the order in which fp32 sums are added, and by nothing else; a 16-bit model is computed in
    fp32. The layers stay ``nn.Linear`` and go on learning; a change of their numbers is noticed. On a GPU a 16-bit MLP
    up to 256 wide is one launch. In fp32 there, and while a gradient for the weights is wanted, the layers run one by
    one as before.
    """
