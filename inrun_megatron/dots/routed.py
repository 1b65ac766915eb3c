"""Dots of experts' linear layers: each sees tokens of all rows in one matrix, ``[n, .]``, which are sorted by part first.

A part (a row, or a document or token of one) is then a stretch of the matrix, and segments.py's cut of a single row serves:

    dots[p, k] = sum_{t in p} B_t . (D_k A_t) = <D_k, B_p^T A_p>

Shape legend: E experts, n tokens of all of them together, P parts of the microbatch, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..host import Later, to_device
from .late import LateDots
from .linear import ROWS_PER_ACCUMULATOR, weight_gradient_and_dots
from .products import weight_gradient
from .projection import token_dots
from .segments import Segments, stretches

# With fewer tokens than this to an expert's part the table of counts grows as large as what it counts, and tokens are projected
# one by one, which is then cheaper anyway (cost.py).
TOKENS_PER_PART = 4
# So few parts are scored whether an expert sees tokens of each or not: all experts' and layers' dots are then added up together.
FEW_PARTS = ROWS_PER_ACCUMULATOR


class RoutedParts:
    """The tokens of a layer's experts by part, made in the layer's forward: the counts are on the host when its backward comes.

    Args:
        parts: int64 ``[n]``, expert after expert: the part of every token.
        owners: int64 ``[n]``: its expert.
        sizes: tokens of every expert.
        count: P.
    """

    def __init__(self, parts: Tensor, owners: Tensor, sizes: Sequence[int], count: int) -> None:
        self._sizes, self._count, self._device = sizes, count, parts.device
        self._on_host: Later | None = None
        if count == 1:
            return  # every expert's gradient is the part's
        experts = len(sizes)
        starts = torch.tensor(list(accumulate(sizes, initial=0))[:-1])
        cells = owners * count + parts
        # Stable: tokens of a part stay in their order, whatever the device.
        self._order = cells.argsort(stable=True)
        # The same within every expert's own tokens, which lie where they lay.
        self._orders = (self._order - to_device(starts, parts.device)[owners]).split(list(sizes))
        counts = torch.zeros(experts * count, dtype=torch.int64, device=parts.device)
        self._counts = counts.scatter_add_(0, cells, torch.ones_like(cells)).view(experts, count)
        if len(parts) >= TOKENS_PER_PART * experts * count:
            self._on_host = Later(self._counts)

    def weight_gradient_and_dots(
        self,
        expert: int,
        activation: Tensor,
        output_grad: Tensor,
        directions: Sequence[Tensor],
        late: LateDots,
    ) -> Tensor:
        """The weight gradient of an expert's linear layer, and the dots of its parts on the way.

        Args:
            activation, output_grad: ``[n_e, in]`` and ``[n_e, out]`` of its own tokens.
            directions: K tensors ``[out, in]``.
            late: of ``[P, K]``; the dots are added to it.
        """
        if not len(activation):
            return weight_gradient(activation, output_grad)
        if self._count == 1:
            return _as_one_row(activation, output_grad, directions, late, None)
        order = self._orders[expert]
        if self._on_host is None:
            late.dots += _sums(token_dots(activation, output_grad, directions)[order], self._counts[expert])
            return weight_gradient(activation, output_grad)
        segments, parts = self._cuts[expert]
        if len(segments) > 1:
            activation, output_grad = activation[order], output_grad[order]
        if parts is None:
            return _as_one_row(activation, output_grad, directions, late, segments)
        own = LateDots(late.dots.new_zeros(len(segments), len(directions)))
        grad = _as_one_row(activation, output_grad, directions, own, segments)
        own.flush()
        late.dots.index_add_(0, parts, own.dots)
        return grad

    @cached_property
    def _cuts(self) -> list[tuple[Segments, Tensor | None]]:
        """How each expert's tokens, in order, are cut, and into which of the parts (None: all of them)."""
        assert self._on_host is not None
        counts = self._on_host.read()
        if self._count <= FEW_PARTS:
            return [(segments, None) for segments in stretches(counts, self._device)]
        return [self._cut(own) for own in counts]

    def _cut(self, counts: Tensor) -> tuple[Segments, Tensor]:
        """By one expert's counts ``[P]``: those parts of which it sees a token."""
        (seen,) = (torch.from_numpy(own) for own in counts.numpy().nonzero())
        [segments] = stretches(counts[seen].unsqueeze(0), self._device)
        return segments, to_device(seen, self._device)

    def sums(self, tokens: Tensor) -> Tensor:
        """Sums of every part's tokens, of all experts: ``[n, K]`` -> ``[P, K]``."""
        if self._count == 1:
            return tokens.sum(0, keepdim=True)
        return _sums(tokens[self._order], self._counts.flatten()).view(*self._counts.shape, -1).sum(0)


def _as_one_row(
    activation: Tensor,
    output_grad: Tensor,
    directions: Sequence[Tensor],
    late: LateDots,
    segments: Segments | None,
) -> Tensor:
    return weight_gradient_and_dots(
        activation.unsqueeze(0), output_grad.unsqueeze(0), directions, 0, late, segments
    )


def _sums(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Sums of stretches of these lengths ``[m]``: ``[n, K]`` -> ``[m, K]``, in a fixed order on a GPU, too."""
    columns = [
        torch.segment_reduce(column, "sum", lengths=lengths, axis=0, unsafe=True)
        for column in tokens.unbind(1)
    ]
    return torch.stack(columns, dim=1)
