"""int8 weights, float rows."""

from checked import linear_op

from rewardzip.nn import Int8Linear

test_int8_linear = linear_op("int8_linear", {"int8": Int8Linear.from_linear})
