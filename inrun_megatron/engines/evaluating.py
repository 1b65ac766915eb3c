"""Evaluation mode for a while, and the sums of losses in it; buffers of the model kept over a pass in training mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..losses import masked_sum
from ..parallel import Layout


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every submodule's own flag is put back."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards the buffers are what they were: a forward in training mode may move them (running means, counters)."""
    kept = [
        (owner, name, buffer, buffer._version, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, version, before in kept:
                if buffer._version != version:
                    buffer.copy_(before)
                owner._buffers[name] = buffer


def loss_sums(
    module: nn.Module,
    token_losses: Callable[[Any, Any], Tensor],
    microbatches: Iterable[Mapping[str, Tensor]],
    device: torch.device,
) -> Tensor:
    """(sum of the token losses where ``loss_mask`` is 1, loss tokens), fp64 ``[2]``: this rank's, dropout off, no gradients.

    Args:
        token_losses: ``(module, microbatch) -> [b, s]``.
        device: of the sums.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(module), torch.no_grad():
        for microbatch in microbatches:
            losses, mask = token_losses(module, microbatch).float(), microbatch["loss_mask"]
            sums += torch.stack([masked_sum(losses, mask), mask.float().sum()])
    return sums


def over_ranks(sums: Tensor, layout: Layout) -> Tensor:
    """Sums of losses over all ranks that hold a part of them, in place: replicas, through a pipeline their last stages.

    Collective over the data-parallel group, through a pipeline over the world.
    """
    if layout.pp_size > 1:
        # All tensor-parallel ranks of the last stage have the same sums, the other stages none.
        if layout.tp_rank > 0:
            sums.zero_()
        dist.all_reduce(sums)
    elif layout.dp_size > 1:
        dist.all_reduce(sums, group=layout.dp_group)
    return sums
