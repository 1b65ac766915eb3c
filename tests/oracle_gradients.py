"""The oracle's gradients: of every sample and of every target, in fp64, each by a forward and a backward of its own.

Legend: n samples of the global batch, N sequences of a target, K targets, s tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle_batches import GlobalBatch
from tests.oracle_experts import balance, loads
from tests.oracle_gpt import Microbatch, OracleGPT, Parameters


@dataclass(frozen=True)
class OracleTarget:
    """A validation target: all its sequences [N, s] under the microbatch keys (tokens, labels, ...)."""

    name: str
    rows: Microbatch

    @classmethod
    def from_microbatches(cls, name: str, microbatches: Sequence[Microbatch]) -> OracleTarget:
        """Join microbatches, of all data-parallel ranks; rows whose loss mask is all zero change nothing."""
        keys = ("tokens", "labels", "loss_mask", "position_ids")
        return cls(name, {key: torch.cat([batch[key] for batch in microbatches]) for key in keys})

    @property
    def num_tokens(self) -> float:
        """Sum of the loss mask, the denominator of L_k."""
        return float(self.rows["loss_mask"].double().sum())


@dataclass(frozen=True)
class SampleGradients:
    """g_i of every sample of a global batch, before clipping, and who the samples are."""

    stacked: Parameters  # name -> [n, *parameter shape]
    dataset: Tensor  # [n]
    sample: Tensor  # [n]
    loss: float  # the training loss: mean over microbatches of their token means

    def total(self) -> Parameters:
        """G = sum_i g_i."""
        return {name: stack.sum(0) for name, stack in self.stacked.items()}


def sample_gradients(model: OracleGPT, parameters: Parameters, batch: GlobalBatch) -> SampleGradients:
    """g_i of every sample, each by a forward and a backward of that sample alone.

    The loss of a microbatch is the mean over its loss tokens; microbatches are averaged over accumulation steps and
    data-parallel ranks. So sample i's share is sum_t(loss_it * mask_it) / (tokens of its microbatch * number of
    microbatches).
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    microbatches = [microbatch for replica in batch for microbatch in replica]
    columns: dict[str, list[Tensor]] = {name: [] for name in leaves}
    dataset, sample, loss = [], [], 0.0
    for microbatch in microbatches:
        tokens = microbatch["loss_mask"].double().sum()
        assert tokens > 0, "a microbatch without loss tokens has no loss"
        rows = len(microbatch["tokens"])
        of_experts = expert_loads(model, leaves, microbatch)
        for index, row in enumerate(rows_of(microbatch)):
            share = masked_sum(model, leaves, row) / (tokens * len(microbatches))
            loss += share.item()
            share = share + balancing(model, row, of_experts, index) / len(microbatches)
            for name, gradient in zip(leaves, _gradients(share, leaves), strict=True):
                columns[name].append(gradient)
        missing = torch.full((rows,), -1)
        dataset.append(microbatch.get("dataset", missing))
        sample.append(microbatch.get("sample", missing))
    stacked = {name: torch.stack(column) for name, column in columns.items()}
    return SampleGradients(stacked, torch.cat(dataset), torch.cat(sample), loss)


def expert_loads(model: OracleGPT, parameters: Parameters, microbatch: Microbatch) -> list[Tensor]:
    """Tokens of every expert, [b, E] for each layer; none where training does not balance them."""
    if model.shape.balance is None:
        return []
    routed = []
    with torch.no_grad():
        for row in rows_of(microbatch):
            masked_sum(model, parameters, row)
            routed.append(model.routed)
    return loads([torch.cat(layer) for layer in zip(*routed, strict=True)], model.shape.topk)


def balancing(model: OracleGPT, row: Microbatch, of_experts: list[Tensor], index: int) -> Tensor:
    """What the tokens of the model's last `masked_sum` add to the auxiliary losses of row `index`'s microbatch; 0 without."""
    if model.shape.balance is None:
        return torch.zeros((), dtype=torch.float64)
    length = row["tokens"].shape[1]
    return balance(model.shape.balance, model.routed, of_experts, index, length, model.shape.topk)


def target_gradient(
    model: OracleGPT, parameters: Parameters, target: OracleTarget
) -> tuple[float, Parameters]:
    """L_k and its gradient: the mean over all loss tokens of the target, added up sequence by sequence."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    loss = 0.0
    for row in rows_of(target.rows):
        share = masked_sum(model, leaves, row) / target.num_tokens
        loss += share.item()
        for name, gradient in zip(leaves, _gradients(share, leaves), strict=True):
            total[name] += gradient
    return loss, total


def first_order_values(directions: list[Parameters], samples: SampleGradients, clip: float) -> Tensor:
    """phi = c <d_k, g_i>, [n, K]."""
    columns = []
    for direction in directions:
        parts = [samples.stacked[name].flatten(1) @ direction[name].flatten() for name in direction]
        columns.append(clip * torch.stack(parts).sum(0))
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(samples.sample), 0)


def dot(left: Parameters, right: Parameters) -> Tensor:
    """<left, right> over all parameters, a scalar tensor."""
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def rows_of(batch: Microbatch) -> list[Microbatch]:
    """Microbatches of one row each."""
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["tokens"]))]


def split_documents(row: Microbatch) -> list[Microbatch]:
    """A microbatch of one row as sequences of their own, one for each run of equal `documents` [1, s]; without them
    the row."""
    if "documents" not in row:
        return [row]
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return [{name: row[name][:, begin:end] for name in names} for begin, end in cuts(row["documents"][0])]


def cuts(parts: Tensor) -> list[tuple[int, int]]:
    """(first position, position after the last) of every run of equal integers in [s]."""
    edges = [0, *(t for t in range(1, len(parts)) if parts[t] != parts[t - 1]), len(parts)]
    return list(itertools.pairwise(edges))


def masked_sum(model: OracleGPT, parameters: Parameters, row: Microbatch) -> Tensor:
    """Sum of the row's token losses over its mask. Where the attention is cut at `documents`, each is run by itself;
    `routed` is of all of them."""
    sums, routed = [], []
    for document in split_documents(row):
        losses = model.token_losses(parameters, document)
        sums.append((losses * document["loss_mask"].to(losses.dtype)).sum())
        routed.append(model.routed)
    model.routed = [torch.cat(layer, dim=1) for layer in zip(*routed, strict=True)]
    return torch.stack(sums).sum()


def _gradients(loss: Tensor, leaves: Parameters) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(leaves.values()))
