"""The reference's mixture of experts: every expert sees every token, and those that a token is not routed to count nothing.

Legend: b sequences, s tokens, E experts, k of them for a token. `BALANCE` and `Z` weigh the losses of Megatron's router
(megatron/core/transformer/moe/moe_utils.py: switch_load_balancing_loss_func, z_loss_func), large enough to be seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BALANCE, Z = 0.05, 0.01


def weights(logits: Tensor, chosen: Tensor) -> Tensor:
    """What each expert's output counts, [b, s, E]: softmax over the logits of the `chosen` [b, s, k], 0 elsewhere."""
    return torch.zeros_like(logits).scatter(-1, chosen, logits.gather(-1, chosen).softmax(-1))


def mixture(logits: Tensor, chosen: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`expert(e, weight [b, s, 1])` of all experts, added up."""
    share = weights(logits, chosen)
    return torch.stack([expert(e, share[..., e : e + 1]) for e in range(logits.shape[-1])]).sum(0)


def loads(routed: list[Tensor], topk: int) -> list[Tensor]:
    """Tokens of every expert, [b, E] for each layer."""
    return [F.one_hot(logits.topk(topk).indices, logits.shape[-1]).sum((1, 2)).double() for logits in routed]


def balance(
    kind: str, row: list[Tensor], of_microbatch: list[Tensor], index: int, tokens: int, topk: int
) -> Tensor:
    """What some tokens of a row add to the microbatch's auxiliary losses.

    row: router's logits [1, s, E] of each layer, of all or some of the row's tokens. of_microbatch: `loads` of all its
    rows, constants. tokens: of a whole row.
    """
    total = torch.zeros((), dtype=torch.float64)
    for logits, load in zip(row, of_microbatch, strict=True):
        rows, experts = load.shape
        scores = logits.softmax(-1).sum((0, 1))  # [E]
        if kind == "aux_loss":
            count = rows * tokens
            total = total + BALANCE * experts * (scores * load.sum(0)).sum() / (topk * count * count)
        elif kind == "seq_aux_loss":
            total = total + BALANCE * experts * (scores * load[index]).sum() / (topk * tokens**2) / rows
        total = total + Z * logits.logsumexp(-1).square().sum() / (rows * tokens)
    return total
