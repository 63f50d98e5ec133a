"""The Triton twin of the activation table, in fp32, from instructions every target and the interpreter have.

Absolute error against float64 on top of fp32 rounding, as the tests hold it: tanh, sigmoid, silu, elu, gelu_tanh, mish
and softplus at most 4 * 2^-24 * max(1, |x|), elu times |alpha| above 1 (their ``exp`` is the hardware's, good to 2
units in the last place); gelu the same through ``erf``; relu and leaky_relu exact. NaN stays NaN in all of them:
comparisons pick, or a ``maximum`` that is told to pass NaN on, which is one instruction where a comparison and a choice
are two.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # from exp of a negative number: no overflow, no cancellation but near 0, where 2^-24 absolute is left
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.where(x > 20.0, 20.0, x))))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x < 0, x * PARAMETER, x)
    elif ACTIVATION == "elu":
        x = tl.where(x < 0, PARAMETER * (tl.exp(tl.where(x < 0, x, 0.0)) - 1.0), x)
    elif ACTIVATION == "tanh":
        x = _tanh(x)
    elif ACTIVATION == "sigmoid":
        x = _sigmoid(x)
    elif ACTIVATION == "silu":
        x = x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "mish":
        x = x * _tanh(_softplus(x))
    elif ACTIVATION == "softplus":
        x = _softplus(x)
    else:
        tl.static_assert(ACTIVATION == "none", "an activation of the table is missing here")
    return x


# whose slope follows from the output; of leaky_relu and elu where the parameter is above 0
SLOPES = ("none", "relu", "leaky_relu", "elu", "tanh", "sigmoid", "softplus")


@triton.jit
def slope(y, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr):
    """The derivative by the input, from the output; 1 at NaN, which y itself shows."""
    if ACTIVATION == "relu":
        d = tl.where(y <= 0, 0.0, 1.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(y > 0, 1.0, PARAMETER)
    elif ACTIVATION == "elu":
        d = tl.where(y > 0, 1.0, y + PARAMETER)
    elif ACTIVATION == "tanh":
        d = 1.0 - y * y
    elif ACTIVATION == "sigmoid":
        d = y * (1.0 - y)
    elif ACTIVATION == "softplus":
        d = 1.0 - tl.exp(-y)
    else:
        tl.static_assert(ACTIVATION == "none", "an activation of the table is missing here")
        d = y * 0.0 + 1.0
    return d
