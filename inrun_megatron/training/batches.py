"""Microbatches of training steps, read ahead by a thread, and their loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from inrun_megatron import host
from inrun_megatron.data.sampler import microbatch_indices
from inrun_megatron.training.deepspeed_config import Batch

Microbatch = dict[str, torch.Tensor]
# Columns that scoring reads and no layer: on a GPU the host would have to wait for them.
ON_THE_HOST = ("dataset", "sample", "segments")


def collate(samples: Sequence[Mapping[str, Any]]) -> Microbatch:
    """Samples of the dataset as one microbatch: every entry with a leading row dimension b."""
    return {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in samples[0]}


def to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The microbatch with what the model reads on `device`; the host does not wait for the copies."""
    return {
        key: tensor if key in ON_THE_HOST else host.to_device(tensor, device)
        for key, tensor in microbatch.items()
    }


class StepLoader:
    """The microbatches of consecutive optimizer steps of one data-parallel rank.

    The order of samples is that of the dataset (which is shuffled), so the position is one number: the samples
    consumed by the whole run. While a step computes, a thread reads the next one.
    """

    def __init__(
        self,
        dataset: Any,
        batch: Batch,
        *,
        dp_rank: int,
        consumed_samples: int,
        ahead: bool = True,
    ) -> None:
        self._dataset, self._batch, self._dp_rank = dataset, batch, dp_rank
        self._position = consumed_samples
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") if ahead else None
        self._next: Future[list[Microbatch]] | None = None

    def _read(self, consumed: int) -> list[Microbatch]:
        batch = self._batch
        per_pass = batch.micro * batch.data_parallel
        own = [
            microbatch_indices(consumed + number * per_pass, batch.micro, self._dp_rank, batch.data_parallel)
            for number in range(batch.accumulation)
        ]
        return [collate([self._dataset[k] for k in indices]) for indices in own]

    def next_step(self, more: bool = True) -> list[Microbatch]:
        """The microbatches of the next step; `more` says whether another will be asked for."""
        microbatches = self._read(self._position) if self._next is None else self._next.result()
        self._next = None
        self._position += self._batch.size
        if more and self._pool is not None:
            self._next = self._pool.submit(self._read, self._position)
        return microbatches

    def close(self) -> None:
        """Stop the reading thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def evaluation_batches(dataset: Any, batch: Batch, iterations: int, dp_rank: int) -> Iterator[Microbatch]:
    """This rank's microbatches of the first `iterations` global batches of `dataset`."""
    loader = StepLoader(dataset, batch, dp_rank=dp_rank, consumed_samples=0, ahead=False)
    for _ in range(iterations):
        yield from loader.next_step(more=False)
