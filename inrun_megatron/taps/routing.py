"""Which tokens of a microbatch a mixture-of-experts layer gives to each of its experts.

An expert's linear layers see ``[n, .]``: the tokens that are routed to it, of all rows. Shape legend: T = s b tokens of the
microbatch, numbered as ``[s, b]`` (Megatron) or ``[b, s]`` lies flat; E experts; n tokens of all experts together, one token
counted once for each of its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..host import to_device


@dataclass(eq=False)
class Routing:
    """One layer's routing of one microbatch.

    Attributes:
        tokens: int64 ``[n]``, expert after expert: which of the T tokens each is.
        sizes: tokens of every expert.
        total: T.
        batch_first: tokens are numbered row after row.
    """

    tokens: Tensor
    sizes: tuple[int, ...]
    total: int
    batch_first: bool = False

    @classmethod
    def of_map(cls, routed: Tensor, sizes: Sequence[int]) -> Routing:
        """From the router's map, without a wait for the device: the sizes are known already.

        Args:
            routed: bool ``[T, E]``: does the token go to the expert?
            sizes: its sums over tokens.
        """
        flat, n = routed.t().reshape(-1), sum(sizes)
        # Where in ``tokens`` each True belongs; the others go behind its end.
        places = torch.where(flat, flat.cumsum(0) - 1, n)
        token = torch.arange(len(routed), device=routed.device).repeat(routed.shape[1])
        tokens = token.new_empty(n + 1).scatter_(0, places, token)[:n]
        return cls(tokens, tuple(sizes), len(routed))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where every expert's tokens begin, and where the last one's end."""
        return (0, *accumulate(self.sizes))

    @cached_property
    def owners(self) -> Tensor:
        """The expert of every token, int64 ``[n]``."""
        experts = torch.arange(len(self.sizes), device=self.tokens.device)
        sizes = to_device(torch.tensor(self.sizes), experts.device)
        return experts.repeat_interleave(sizes, output_size=len(self.tokens))

    def rows(self, rows: int) -> Tensor:
        """The row of every token, int64 ``[n]``, of a microbatch of so many."""
        return self.tokens // (self.total // rows) if self.batch_first else self.tokens % rows

    def positions(self, rows: int) -> Tensor:
        """Its position in the row, int64 ``[n]``."""
        return self.tokens % (self.total // rows) if self.batch_first else self.tokens // rows


@dataclass(frozen=True, eq=False)
class Routed:
    """What one expert sees of a routing; ``expert`` None: what all of them see, one after the other."""

    routing: Routing
    expert: int | None = None

    def of(self, tokens: Tensor) -> Tensor:
        """This expert's stretch of something by token ``[n, ...]``."""
        if self.expert is None:
            return tokens
        starts = self.routing.starts
        return tokens[starts[self.expert] : starts[self.expert + 1]]
