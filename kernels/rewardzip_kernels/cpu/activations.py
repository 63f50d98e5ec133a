"""The activations in Numba: straight-line fp32 code that LLVM vectorises inside the kernels' epilogues.

Each takes (x, parameter) and carries NaN through. The largest error of each building block is beside it, in units in
the last place (ulp) or absolute; the table in ``rewardzip_kernels/activations.py`` is what they are held to.
"""

from numba import njit
from numpy import float32, int32, rint

from .pointers import from_bits, multiply_add

inlined = njit(error_model="numpy")


def _polynomial(*coefficients):
    """Horner's rule, highest power first."""
    c = tuple(float32(value) for value in coefficients)

    @inlined
    def evaluate(x):
        y = c[0]
        for i in range(1, len(c)):
            y = multiply_add(y, x, c[i])
        return y

    return evaluate


LOG2_E, LN2_HIGH, LN2_LOW = float32(1.44269504), float32(0.693359375), float32(-2.12194440e-4)
ONE, TWO, HALF, ZERO = float32(1), float32(2), float32(0.5), float32(0)
INFINITY = float32("inf")

_exp_tail = _polynomial(1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5)


@inlined
def _exp_parts(x):
    """x in [-87, 88]: (2^n, e^r - 1) with x = n ln 2 + r, |r| <= ln 2 / 2."""
    n = rint(x * LOG2_E)
    r = multiply_add(-n, LN2_LOW, multiply_add(-n, LN2_HIGH, x))
    return from_bits((int32(n) + int32(127)) << int32(23)), multiply_add(_exp_tail(r) * r, r, r)


@inlined
def exp(x):
    """2 ulp; 0 below -87, inf above 88."""
    power, rest = _exp_parts(min(max(x, float32(-87)), float32(88)))
    y = multiply_add(power, rest, power)
    y = ZERO if x < float32(-87) else y
    y = INFINITY if x > float32(88) else y
    return y if x == x else x


@inlined
def expm1(x):
    """x <= 0: 3 ulp, near 0 too."""
    power, rest = _exp_parts(max(x, float32(-87)))
    y = multiply_add(power, rest, power - ONE)
    return y if x == x else x


# log(1 + t) = 2 artanh(t / (2 + t)), the series of artanh to the 15th power
_artanh_tail = _polynomial(2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3)


@inlined
def log1p(t):
    """t in [0, 1]: 3 ulp."""
    s = t / (t + TWO)
    square = s * s
    return multiply_add(_artanh_tail(square) * square, s, TWO * s)


_tanh_odd = _polynomial(
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928935436e-04,
    4.89352455891786e-03,
)
_tanh_even = _polynomial(1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


@inlined
def tanh(x, _):
    """A quotient of polynomials (the one in Eigen), 1 beyond 9: 6 ulp."""
    square = x * x
    y = x * _tanh_odd(square) / _tanh_even(square)
    y = ONE if x > float32(9) else y
    return -ONE if x < float32(-9) else y


_erf_odd = _polynomial(
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_erf_even = _polynomial(
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02
)


@inlined
def erf(x):
    """A quotient of polynomials (the one in Eigen), 1 beyond 4: 8 ulp."""
    square = x * x
    y = x * _erf_odd(square) / _erf_even(square)
    y = ONE if x > float32(4) else y
    return -ONE if x < float32(-4) else y


@inlined
def none(x, _):
    return x


@inlined
def relu(x, _):
    return ZERO if x < ZERO else x


@inlined
def leaky_relu(x, slope):
    return x if x > ZERO else x * slope


@inlined
def elu(x, alpha):
    return x if x > ZERO else alpha * expm1(ZERO if x > ZERO else x)


@inlined
def sigmoid(x, _):
    return ONE / (ONE + exp(-x))


@inlined
def silu(x, _):
    return x / (ONE + exp(-x))


@inlined
def gelu(x, _):
    return HALF * x * (ONE + erf(x * float32(0.70710678)))


@inlined
def gelu_tanh(x, _):
    inner = float32(0.79788456) * multiply_add(float32(0.044715) * x * x, x, x)
    return HALF * x * (ONE + tanh(inner, ZERO))


@inlined
def mish(x, _):
    """tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); beyond 20 that is 1."""
    e = exp(float32(20) if x > float32(20) else x)
    n = e * (e + TWO)
    return x * (n / (n + TWO))


@inlined
def softplus(x, _):
    return (x if x > ZERO else ZERO) + log1p(exp(-abs(x)))


ACTIVATIONS = {
    f.__name__: f for f in (none, relu, leaky_relu, elu, tanh, sigmoid, silu, gelu, gelu_tanh, mish, softplus)
}
