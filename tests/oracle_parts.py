"""The reference for parts of samples, in fp64, one backward per part.

A part's gradient is that of the sample's loss through the part's own positions: the parameters are constants at all
others. Where the attention is cut at documents, a document's gradient is that of its own tokens' loss, with the document
alone as a sequence: no mask, and nothing of its neighbours in sight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle import (
    GlobalBatch,
    Microbatch,
    OracleGPT,
    OracleStep,
    OracleTrainer,
    Parameters,
    balancing,
    cuts,
    expert_loads,
    masked_sum,
    rows_of,
    split_documents,
)
from tests.oracle_gradients import dot

Key = tuple[int, int]  # (sample, ordinal of the part)


class PartTrainer(OracleTrainer):
    """Also values every part, by the microbatches' `segments`.

    parts: per step {(sample, ordinal): values [K]}.
    """

    parts: list[dict[Key, Tensor]]

    def step(self, batch: GlobalBatch) -> OracleStep:
        gradients = self._gradients(batch)
        result = super().step(batch)
        assert result.directions is not None
        values = {
            key: result.clip_coefficient
            * torch.stack([dot(own, direction) for direction in result.directions])
            for key, own in gradients.items()
        }
        self.parts = [*getattr(self, "parts", []), values]
        return result

    def _gradients(self, batch: GlobalBatch) -> dict[Key, Parameters]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.weights.items()}
        microbatches = [microbatch for replica in batch for microbatch in replica]
        gradients = {}
        for microbatch in microbatches:
            tokens = microbatch["loss_mask"].double().sum()
            of_experts = expert_loads(self.model, leaves, microbatch)
            for index, row in enumerate(rows_of(microbatch) if "segments" in microbatch else []):
                for ordinal, (begin, end) in enumerate(cuts(row["segments"][0])):
                    model, loss = self._loss(leaves, row, begin, end)
                    share = (loss / tokens + balancing(model, row, of_experts, index)) / len(microbatches)
                    found = torch.autograd.grad(share, list(leaves.values()), allow_unused=True)
                    gradients[int(row["sample"]), ordinal] = {
                        name: torch.zeros_like(leaf) if g is None else g
                        for (name, leaf), g in zip(leaves.items(), found, strict=True)
                    }
        return gradients

    def _loss(self, leaves: Parameters, row: Microbatch, begin: int, end: int) -> tuple[OracleGPT, Tensor]:
        """The loss whose gradient is that of positions [begin, end) of the row, and the model that gave it."""
        first = 0
        for document in split_documents(row):
            last = first + document["tokens"].shape[1]
            if begin < last:
                break
            first = last
        assert end <= last, "a part crosses a document"
        own = None
        if (begin, end) != (first, last):
            own = torch.zeros(1, last - first, dtype=torch.bool)
            own[:, begin - first : end - first] = True
        model = OracleGPT(self.model.shape, own, self.model.frozen)
        return model, masked_sum(model, leaves, document)
