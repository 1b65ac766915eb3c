"""Which samples a data-parallel rank reads: consecutive ones, as Megatron's pretraining sampler deals them.

Sample i of the stream is item i of the training dataset. A microbatch step takes the next
micro_batch_size x data_parallel_size samples, and rank r the r-th run of micro_batch_size among them
(megatron/legacy/data/data_samplers.py, MegatronPretrainingSampler). Resuming means starting at `consumed_samples`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from inrun_megatron.errors import UserError


def microbatch_indices(
    consumed_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> range:
    """The items of this rank's microbatch when the whole run has consumed `consumed_samples` samples."""
    assert consumed_samples >= 0 and micro_batch_size > 0 and 0 <= data_parallel_rank < data_parallel_size
    start = consumed_samples + data_parallel_rank * micro_batch_size
    return range(start, start + micro_batch_size)


class DataSampler(Sampler[list[int]]):
    """Microbatches of one data-parallel rank as lists of items: a `batch_sampler` for torch's DataLoader.

    Iterating starts at `consumed_samples` and ends when fewer than a full step over all ranks is left.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self.step = micro_batch_size * data_parallel_size
        if consumed_samples + self.step > total_samples:
            raise UserError(
                f"the training data has {total_samples} samples and the run has consumed {consumed_samples}: the next "
                f"{self.step} are not there; raise --train-iters of the run, or stop here"
            )
        self._total = total_samples
        self._consumed = consumed_samples
        self._rank = (micro_batch_size, data_parallel_rank, data_parallel_size)

    def __len__(self) -> int:
        return (self._total - self._consumed) // self.step

    def __iter__(self) -> Iterator[list[int]]:
        for microbatch in range(len(self)):
            yield list(microbatch_indices(self._consumed + microbatch * self.step, *self._rank))
