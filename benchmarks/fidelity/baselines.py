"""What one would use without In-Run Data Shapley: each scores every sequence of the corpus for every target, `[N, K]`."""

from __future__ import annotations

import itertools
import re

import bm25s
import numpy as np
import torch
from torch import Tensor

from .model import Shape, SmallGPT, token_losses
from .training import Targets

END = 256  # the end of a document; everything below is a byte


def gradient_dot(shape: Shape, weights: dict[str, Tensor], corpus: Tensor, targets: Targets) -> Tensor:
    """`<grad L_k, grad loss_i>` at the final checkpoint."""
    model = SmallGPT(shape, 0)
    model.load_state_dict(weights)

    def gradient(rows: Tensor) -> Tensor:
        parts = torch.autograd.grad(token_losses(model, rows).mean(), list(model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    against = torch.stack([gradient(rows) for rows in targets.values()])
    return torch.stack([against @ gradient(row[None]) for row in corpus]).double()


def overlap(corpus: Tensor, targets: Targets) -> Tensor:
    """BM25 of words and of their pairs; a target's sequences are one query."""
    retriever = bm25s.BM25()
    retriever.index([_terms(row) for row in corpus], show_progress=False)
    scores = [
        retriever.get_scores([term for row in rows for term in _terms(row)]) for rows in targets.values()
    ]
    return torch.from_numpy(np.stack(scores, axis=1)).double()


def negative_loss(row_losses: Tensor, order: Tensor, samples: int, num_targets: int) -> Tensor:
    """Minus the sequence's mean loss when it was last trained on: easy text is thought good."""
    losses = torch.full((samples,), float("nan"), dtype=torch.float64)
    for indices, values in zip(order, row_losses.double(), strict=True):
        losses[indices] = values
    return -losses[:, None].expand(-1, num_targets)


def _terms(row: Tensor) -> list[str]:
    text = bytes(token for token in row.tolist() if token < END).decode("utf-8", errors="replace").lower()
    words = re.findall(r"\w+", text)
    return [*words, *(f"{one} {two}" for one, two in itertools.pairwise(words))] or [""]
