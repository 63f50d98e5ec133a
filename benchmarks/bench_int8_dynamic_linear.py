"""int8 weights, rows rounded to int8."""

from functools import partial

from checked import linear_op

from rewardzip.nn import Int8Linear

test_int8_dynamic_linear = linear_op(
    "int8_dynamic_linear", {"int8 x int8": partial(Int8Linear.from_linear, rows="dynamic")}
)
