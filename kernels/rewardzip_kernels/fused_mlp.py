"""stub"""
import torch
from functools import lru_cache
from dataclasses import dataclass
from .activations import parse
ALIGN = 16

def padded(width): return -(-width // ALIGN) * ALIGN

@dataclass(frozen=True)
class Layer:
    pieces: tuple[int, ...]
    columns: int
    width: int
    activation: str
    parameter: float
    eps: float | None
    weight: int
    scale: int | None
    bias: int
    gamma: int | None
    beta: int | None

@dataclass(frozen=True)
class Layout:
    layers: tuple[Layer, ...]
    weights: int
    params: int

@lru_cache(maxsize=256)
def layout(pieces, layers, quantised):
    found = []
    weights = params = 0
    entries = [e.split() for e in layers.split(",")]
    for i, words in enumerate(entries):
        width = int(words[0])
        eps = None
        words = words[1:]
        if words and words[0].startswith("layer_norm"):
            eps = float(words.pop(0).partition(":")[2] or 1e-5)
        act, par = parse(words[0] if words else "none")
        columns = sum(map(padded, pieces))
        p = padded(width)
        last = i == len(entries)-1
        if last:
            weight = params; params += width*columns; scale = None
        else:
            weight = weights; weights += width*columns
            scale = None
            if quantised:
                scale = params; params += p
        bias = params; params += p
        gamma = beta = None
        if eps is not None:
            gamma = params; beta = params + p; params += 2*p
        found.append(Layer(pieces, columns, width, act.name, par, eps, weight, scale, bias, gamma, beta))
        pieces = (width,)
    return Layout(tuple(found), weights, params)

def compute_type(inputs, weights, compute_dtype):
    if compute_dtype is not None: return compute_dtype
    first = inputs[0].dtype
    if first in (torch.float16, torch.bfloat16) and all(x.dtype == first for x in inputs): return first
    return torch.float16 if weights.dtype == torch.int8 else weights.dtype

def output_like(inputs, weights, params, layers, members, reduce):
    width = int(layers.split(",")[-1].split()[0])
    dt = None
    for x in inputs:
        if x.is_floating_point(): dt = x.dtype if dt is None else torch.promote_types(dt, x.dtype)
    lead = () if members is None else ((2,) if reduce == "mean_std" else (members,))
    return inputs[0].new_empty(*lead, *inputs[0].shape[:-1], width, dtype=dt or torch.float32)
