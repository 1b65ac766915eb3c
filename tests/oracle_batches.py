"""Batches of the oracle's tests: random sequences, laid out over data-parallel ranks and accumulation steps.

A global batch is [data-parallel rank][accumulation step] of microbatches; its samples are numbered in that order.
"""

from __future__ import annotations

import torch

from tests.oracle_gpt import GPTShape, Microbatch

GlobalBatch = list[list[Microbatch]]


def split_batch(rows: Microbatch, dp_size: int, accumulation: int, micro_batch_size: int) -> GlobalBatch:
    """Lay consecutive samples [n, ...] out as Megatron's sequential pretraining sampler does.

    Accumulation step a, data-parallel rank r, row j is sample (a * dp_size + r) * micro_batch_size + j.
    """
    expected = dp_size * accumulation * micro_batch_size
    assert len(rows["tokens"]) == expected, f"{len(rows['tokens'])} rows, {expected} expected"

    def microbatch(replica: int, step: int) -> Microbatch:
        first = (step * dp_size + replica) * micro_batch_size
        return {key: value[first : first + micro_batch_size] for key, value in rows.items()}

    return [[microbatch(replica, step) for step in range(accumulation)] for replica in range(dp_size)]


def random_rows(
    shape: GPTShape, count: int, seed: int, *, masked: bool = True, first_sample: int = 0, dataset: int = 0
) -> Microbatch:
    """`count` random sequences under all microbatch keys; with `masked`, loss masks of varying length."""
    generator = torch.Generator().manual_seed(seed)
    s = shape.seq_length
    text = torch.randint(shape.vocab_size, (count, s + 1), generator=generator)
    mask = torch.ones(count, s)
    if masked:
        lengths = torch.randint(1, s + 1, (count, 1), generator=generator)
        mask = (torch.arange(s)[None] < lengths).float()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(s).repeat(count, 1),
        "dataset": torch.full((count,), dataset),
        "sample": torch.arange(first_sample, first_sample + count),
    }
