"""The stored form of a 2:4 sparse weight: of every 4 inputs in a row, 2 values and where they stand.

    weight [N, K], K padded with zeros to 8 * B: 2 B groups of 4 inputs. Group b of the first half and group B + b of
    the second share a byte of indices, so that each of the five planes below is read along b with no shuffling:

    values  [N, 4, B]   plane 0, 1   the first and the second value of group b
                        plane 2, 3   those of group B + b
    indices [N, B] u8   bits  1 0    where the first value of group b stands, 0 to 3
                              3 2    where its second value stands, after the first
                              5 4    the first of group B + b
                              7 6    the second of group B + b

    2 x 8 + 2 x 2 bits for 4 int8 weights, 5 bits a weight; 9 in 16 bits.

A group with fewer than two nonzeros stores zeros in the places it has left, the lowest that keep the order.
"""

import torch
from torch import Tensor


def width(k: int) -> int:
    """B, the bytes of indices in a row."""
    return -(-k // 8)


def broken_groups(weight: Tensor) -> tuple[int, int]:
    """(how many groups of 4 inputs have more than 2 nonzeros, how many groups there are)."""
    n, k = weight.shape
    nonzeros = torch.nn.functional.pad(weight != 0, (0, -k % 4)).view(n, -1, 4).sum(2)
    return int((nonzeros > 2).sum()), nonzeros.numel()


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A dense 2:4 weight [N, K] of any type -> (values, indices); the two first nonzeros of a group are taken."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -k % 8)).view(n, 2, width(k), 4)
    zero = groups == 0
    # the nonzeros first, in their order; then the lowest of the zeros; then those two in the order of their places
    places = torch.arange(4, device=weight.device) + 4 * zero
    chosen = places.topk(2, dim=3, largest=False).values.remainder(4).sort(dim=3).values
    values = groups.gather(3, chosen).transpose(2, 3).reshape(n, 4, width(k))
    bits = chosen[:, 0, :, 0] | chosen[:, 0, :, 1] << 2 | chosen[:, 1, :, 0] << 4 | chosen[:, 1, :, 1] << 6
    return values.contiguous(), bits.to(torch.uint8)


def places(indices: Tensor) -> Tensor:
    """indices [N, B] -> [N, 2 B, 2] int64: the places in each group, in the order of the inputs."""
    n, b = indices.shape
    shifts = torch.tensor([[0, 2], [4, 6]], device=indices.device)
    return (indices.long()[:, None, :, None] >> shifts[:, None, :] & 3).view(n, 2 * b, 2)


def ordered(values: Tensor) -> Tensor:
    """values [N, 4, B] -> [N, 2 B, 2]: both values of each group, in the order of the inputs."""
    n, _, b = values.shape
    return values.view(n, 2, 2, b).transpose(2, 3).reshape(n, 2 * b, 2)


def unpack(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """The dense weight [N, K], in the type of the values."""
    n, b = indices.shape
    groups = values.new_zeros(n, 2 * b, 4).scatter_(2, places(indices), ordered(values))
    return groups.view(n, 8 * b)[:, :k].contiguous()
