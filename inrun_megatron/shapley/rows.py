"""Whose values a step computes: the samples of its microbatches, and the parts they are cut into.

Shape legend: b rows and s positions of a microbatch, n parts, K targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dots.segments import Segments
from ..errors import UserError


@dataclass(frozen=True)
class MicrobatchRows:
    """Attributes:
    dataset, sample: identity of each row, ``[b]``.
    tokens: loss tokens of each row ``[b]``, of each part ``[n]`` where rows are cut; on the training device, if the
        loss mask is there, until they are read (``StepRows.unread``).
    dots: partial dots ``[b, K]`` or ``[n, K]``, fp64, on the training device.
    segments: the parts; None where rows are whole.
    """

    dataset: Tensor
    sample: Tensor
    tokens: Tensor
    dots: Tensor
    segments: Segments | None


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _on_host(column: Any) -> Tensor:
    """Identities come from the data loader, on the host: nothing to wait for."""
    tensor = torch.as_tensor(column)
    return tensor if _is_on_host(tensor) else tensor.cpu()


@dataclass
class StepRows:
    """The rows of a step in the order of its microbatches."""

    targets: int
    device: torch.device
    microbatches: list[MicrobatchRows] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.microbatches)

    def add(self, dataset: Any, sample: Any, tokens: Any, segments: Any = None) -> MicrobatchRows:
        """A further microbatch, with dots of zero.

        Args:
            dataset, sample: ``[b]``.
            tokens: loss mask ``[b, s]``, or, of whole rows, their loss tokens ``[b]``.
            segments: ``[b, s]`` integers that change where a row is cut; None: whole rows.

        Raises:
            UserError: shapes that do not fit.
        """
        dataset, sample = _on_host(dataset), _on_host(sample)
        if dataset.shape != sample.shape or sample.dim() != 1:
            raise UserError(
                f"dataset of shape {list(dataset.shape)} and sample of shape {list(sample.shape)}: pass the number of the dataset "
                f"and of the sample for each row of the microbatch, both of shape [b]"
            )
        tokens = torch.as_tensor(tokens)
        if not _is_on_host(tokens):
            tokens = tokens.to(self.device)
        cut = None if segments is None else Segments.of(torch.as_tensor(segments))
        wanted = "[b] or [b, s]" if cut is None else f"{[cut.rows, cut.positions]}, that of the segments"
        fits = tokens.dim() in (1, 2) if cut is None else tokens.shape == (cut.rows, cut.positions)
        if not fits or len(tokens) != len(sample):
            raise UserError(
                f"tokens of shape {list(tokens.shape)} for {len(sample)} samples: pass the loss mask with shape {wanted}"
            )
        if tokens.dim() == 2:
            tokens = tokens.sum(1, dtype=torch.float64) if cut is None else cut.sums(tokens.double())
            if _is_on_host(tokens):
                tokens = tokens.round().long()
        count = len(sample) if cut is None else len(cut)
        dots = torch.zeros(count, self.targets, dtype=torch.float64, device=self.device)
        self.microbatches.append(MicrobatchRows(dataset, sample, tokens, dots, cut))
        return self.microbatches[-1]

    @property
    def samples(self) -> int:
        """Rows of all microbatches."""
        return sum(len(microbatch.sample) for microbatch in self.microbatches)

    def dots(self) -> Tensor:
        """All partial dots, ``[parts, K]``."""
        return torch.cat([rows.dots for rows in self.microbatches])

    def unread(self) -> Tensor:
        """Loss tokens that are on the device: to be read together with a step's other figures."""
        found = [rows.tokens for rows in self.microbatches if not _is_on_host(rows.tokens)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.float64, device=self.device)

    def read(self, tokens: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Put the tokens of ``unread``, which have come to the host, in their places."""
        first = 0
        for index, rows in enumerate(self.microbatches):
            if not _is_on_host(rows.tokens):
                own = torch.from_numpy(tokens[first : first + len(rows.tokens)]).round().long()
                self.microbatches[index] = replace(rows, tokens=own)
                first += len(own)
        assert first == len(tokens), "these are not the tokens that were unread"

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dataset, sample, tokens) of all parts in the order of ``dots``, each ``[parts]``; after ``read``."""

        def of_parts(rows: MicrobatchRows, of_rows: Tensor) -> Tensor:
            return of_rows if rows.segments is None else of_rows[rows.segments.row]

        return (
            torch.cat([of_parts(rows, rows.dataset) for rows in self.microbatches]),
            torch.cat([of_parts(rows, rows.sample) for rows in self.microbatches]),
            torch.cat([rows.tokens for rows in self.microbatches]),
        )

    def places(self) -> tuple[Tensor, Tensor]:
        """(row, ordinal within the row) of all parts, each int64 ``[parts]``; rows count through the step."""
        rows, ordinals, first = [], [], 0
        for microbatch in self.microbatches:
            cut, count = microbatch.segments, len(microbatch.sample)
            rows.append(first + (torch.arange(count) if cut is None else cut.row))
            ordinals.append(torch.zeros(count, dtype=torch.int64) if cut is None else cut.ordinal)
            first += count
        return torch.cat(rows), torch.cat(ordinals)

    def of_samples(self, parts: Tensor) -> Tensor:
        """Values of the rows, ``[rows, K]``, from those of their parts ``[parts, K]``: sums in fp64."""
        rows, _ = self.places()
        return torch.zeros(self.samples, parts.shape[1], dtype=parts.dtype).index_add_(0, rows, parts)
