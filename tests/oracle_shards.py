"""Tensor-parallel shards of a state dict to full parameters and back, by parameter name.

column-parallel and vocabulary-parallel weights and column-parallel biases: split along dim 0
row-parallel weights: split along dim 1
gated linear_fc1, full [gate; up]: rank r holds [gate_r; up_r]
norms, row-parallel biases, position embedding: replicated
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tests.oracle_gpt import GPTShape, Parameters, parameter_shapes

Split = Literal["rows", "gated rows", "columns", "replicated"]


def split_kind(name: str, shape: GPTShape) -> Split:
    """How tensor parallelism splits the parameter `name`."""
    if ".linear_fc1." in name and shape.gated:
        return "gated rows"
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        return "rows"
    if ".linear_qkv." in name or ".linear_fc1." in name:
        return "rows"
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return "columns"
    return "replicated"


def split_parameters(full: Parameters, shape: GPTShape, tp_size: int, tp_rank: int) -> Parameters:
    """Rank `tp_rank`'s shard of every parameter, contiguous copies. Sizes must divide by `tp_size`."""

    def part(value: Tensor, dim: int) -> Tensor:
        assert value.shape[dim] % tp_size == 0, f"{tuple(value.shape)} does not divide by {tp_size}"
        return value.chunk(tp_size, dim)[tp_rank]

    shards = {}
    for name, value in full.items():
        match split_kind(name, shape):
            case "rows":
                shard = part(value, 0)
            case "columns":
                shard = part(value, 1)
            case "gated rows":
                gate, up = value.chunk(2)
                shard = torch.cat((part(gate, 0), part(up, 0)))
            case "replicated":
                shard = value
        shards[name] = shard.clone()
    return shards


def merge_shards(shards: list[Parameters], shape: GPTShape, replica_tolerance: float = 1e-6) -> Parameters:
    """Full parameters from all ranks' shards, in rank order.

    Names that are not parameters of the shape (a tied output layer, extra state) are dropped; a missing one is a
    KeyError. AssertionError when replicas differ by more than `replica_tolerance` of their largest element, or
    when a merged parameter has the wrong shape.
    """
    full = {}
    for name, size in parameter_shapes(shape).items():
        parts = [shard[name].detach() for shard in shards]
        match split_kind(name, shape):
            case "rows":
                value = torch.cat(parts)
            case "columns":
                value = torch.cat(parts, dim=1)
            case "gated rows":
                halves = [part.chunk(2) for part in parts]
                value = torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
            case "replicated":
                value = parts[0].clone()
                for rank, part in enumerate(parts):
                    difference = (part - value).abs().max().item()
                    bound = replica_tolerance * value.abs().max().item()
                    assert difference <= bound, f"{name}: rank {rank} differs from rank 0 by {difference:.3e}"
        assert tuple(value.shape) == size, f"{name}: {tuple(value.shape)} merged, {size} expected"
        full[name] = value
    return full
