"""torch's own 2:4 product, which skips the zeros on the tensor cores: another way for many rows of 16 bits.

It takes int8 values in a form of its own, 9 bits a weight beside the packed one: made at the first call and kept while
the packed one is as it was. Its sums come back rounded to the rows' type, before scale and bias. So that they are as
large as an fp16 model's, the power of two in a scale is multiplied into the weight, which is exact.

A CUDA graph would go on with the form it was recorded with, and must see numbers refreshed in place: not there.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kept import Kept
from ..sparse24_layout import unpack


def takes(n: int, k: int, x_bytes: int, value_bytes: int) -> bool:
    """Whether the shape suits each of the libraries that torch may use."""
    return n % 32 == 0 and k % 64 == 0 and (x_bytes, value_bytes) == (2, 1)


def _form(values: Tensor, indices: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """(the weight in torch's form, what is left of the scales), None where torch refuses."""
    # from 2^-24 to 2^8 an int8 number times it is exact in fp16, the subnormal ones too
    exponent = torch.frexp(scale).exponent.clamp(-24, 8)
    weight = torch.ldexp(unpack(values, indices, k).float(), exponent[:, None])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it a prototype
            return torch.sparse.to_sparse_semi_structured(weight.to(dtype)), torch.ldexp(scale, -exponent)
    except RuntimeError:
        return None


form = Kept(_form)


def recording() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def sums(x: Tensor, values: Tensor, indices: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """(x @ weight^T [M, N] in x's type, the scales it lacks), None where torch does not take it."""
    # changes in inference mode are not counted: to compare values would wait for the GPU
    if values.is_inference() or recording():
        return None
    found = form((values, indices, scale), x.shape[1], x.dtype)
    try:
        return None if found is None else (F.linear(x.contiguous(), found[0]).contiguous(), found[1])
    except RuntimeError:
        return None
