"""Which samples a data-parallel rank reads: consecutive ones, as Megatron's pretraining sampler deals them.

Sample i of the stream is item i of the training dataset. A microbatch step takes the next
micro_batch_size x data_parallel_size samples, and rank r the r-th run of micro_batch_size among them
(megatron/legacy/data/data_samplers.py, MegatronPretrainingSampler). Resuming means starting at `consumed_samples`.
"""

from __future__ import annotations


def microbatch_indices(
    consumed_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> range:
    """The items of this rank's microbatch when the whole run has consumed `consumed_samples` samples."""
    assert consumed_samples >= 0 and micro_batch_size > 0 and 0 <= data_parallel_rank < data_parallel_size
    start = consumed_samples + data_parallel_rank * micro_batch_size
    return range(start, start + micro_batch_size)
