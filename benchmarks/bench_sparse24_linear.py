"""2 of every 4 weights kept."""

from functools import partial

from checked import linear_op
from torch import Tensor

from rewardzip.nn import Sparse24Linear


def keep_two(weight: Tensor) -> Tensor:
    n, k = weight.shape
    order = weight.abs().view(n, -1, 4).argsort(2).argsort(2)
    return (order >= 2).view(n, k)


FORMS = {
    "2:4 int8": Sparse24Linear.from_linear,
    "2:4 int8 x int8": partial(Sparse24Linear.from_linear, rows="dynamic"),
    "2:4 fp16": partial(Sparse24Linear.from_linear, values="float16"),
}
test_sparse24_linear = linear_op("sparse24_linear", FORMS, keep_two)
