"""Dots of experts' linear layers: each sees tokens of all rows in one matrix, ``[n, .]``, which are sorted by part first.

A part (a row, or a document or token of one) is then a stretch of the matrix, and segments.py's cut of a single row serves:

    dots[p, k] = sum_{t in p} B_t . (D_k A_t) = <D_k, B_p^T A_p>

Shape legend: E experts, n tokens of all of them together, P parts of the microbatch, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..host import Later, to_device
from .late import LateDots
from .linear import weight_gradient_and_dots
from .products import weight_gradient
from .projection import token_dots
from .segments import Segments

# With fewer tokens than this to an expert's part the table of counts grows as large as what it counts, and tokens are projected
# one by one, which is then cheaper anyway (cost.py).
FEWEST = 4


class RoutedParts:
    """The tokens of a layer's experts by part, made in the layer's forward: the counts are on the host when its backward comes.

    Args:
        parts: int64 ``[n]``, expert after expert: the part of every token.
        owners: int64 ``[n]``: its expert.
        sizes: tokens of every expert.
        count: P.
    """

    def __init__(self, parts: Tensor, owners: Tensor, sizes: Sequence[int], count: int) -> None:
        experts = len(sizes)
        self._starts = (0, *accumulate(sizes))
        cells = owners * count + parts
        # Stable: tokens of a part stay in their order, whatever the device.
        self._order = cells.argsort(stable=True)
        counts = torch.zeros(experts * count, dtype=torch.int64, device=parts.device)
        self._counts = counts.scatter_add_(0, cells, torch.ones_like(cells)).view(experts, count)
        self._on_host = Later(self._counts) if len(parts) >= FEWEST * experts * count else None

    def weight_gradient_and_dots(
        self,
        expert: int,
        activation: Tensor,
        output_grad: Tensor,
        directions: Sequence[Tensor],
        dots: Tensor,
    ) -> Tensor:
        """The weight gradient of an expert's linear layer, and the dots of its parts on the way.

        Args:
            activation, output_grad: ``[n_e, in]`` and ``[n_e, out]`` of its own tokens.
            directions: K tensors ``[out, in]``.
            dots: ``[P, K]`` fp64; the dots are added to it.
        """
        if not len(activation):
            return weight_gradient(activation, output_grad)
        start, stop = self._starts[expert], self._starts[expert + 1]
        order = self._order[start:stop] - start
        if self._on_host is None:
            dots += _sums(token_dots(activation, output_grad, directions)[order], self._counts[expert])
            return weight_gradient(activation, output_grad)
        counts = self._on_host.read()[expert].numpy()
        (parts,) = counts.nonzero()
        own = LateDots(dots.new_zeros(len(parts), len(directions)))
        if len(parts) > 1:
            activation, output_grad = activation[order], output_grad[order]
        offsets = torch.from_numpy(np.concatenate(([0], counts[parts].cumsum())))
        grad = weight_gradient_and_dots(
            activation.unsqueeze(0),
            output_grad.unsqueeze(0),
            directions,
            0,
            own,
            Segments(1, stop - start, offsets),
        )
        own.flush()
        dots.index_add_(0, to_device(torch.from_numpy(parts), dots.device), own.dots)
        return grad

    def sums(self, tokens: Tensor) -> Tensor:
        """Sums of every part's tokens, of all experts: ``[n, K]`` -> ``[P, K]``."""
        return _sums(tokens[self._order], self._counts.flatten()).view(*self._counts.shape, -1).sum(0)


def _sums(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Sums of stretches of these lengths ``[m]``: ``[n, K]`` -> ``[m, K]``, in a fixed order on a GPU, too."""
    columns = [
        torch.segment_reduce(column, "sum", lengths=lengths, axis=0, unsafe=True)
        for column in tokens.unbind(1)
    ]
    return torch.stack(columns, dim=1)
