"""Samples with their identity: items of a GPTDataset or a blend that say where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from inrun_megatron.data.megatron import BlendedDataset, GPTDataset, document_ids


@dataclass(frozen=True)
class DatasetDescription:
    """One component dataset: all that is needed to find a sample's documents again, and to see that it is the same."""

    name: str
    index: int
    """Its number in the blend: `dataset` of an item."""
    path_prefix: str
    """Absolute path without .bin/.idx."""
    idx_sha256: str
    bin_bytes: int
    documents: int
    weight: float | None
    """Its weight in the blend as given; None for a plain list."""
    samples: int
    """Items that GPTDataset can give."""
    unique_description_hash: str
    """megatron-core's key of the cached indices."""
    description: dict[str, Any]
    """megatron-core's unique description of the GPTDataset: seed, sequence length, split, samples asked for, ..."""
    cache_files: dict[str, str]
    """Paths of GPTDataset's document_index, sample_index and shuffle_index."""
    index_sha256: dict[str, str]
    """sha256 of the content of each of those arrays."""
    bin_digest: str
    """`digest_of` the .bin: documents of the same lengths have the same .idx, whatever they say."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


class IdentifiedDataset(Dataset[dict[str, torch.Tensor]]):
    """A GPTDataset or a BlendedDataset whose items say where they come from.

    Item k: tokens, labels, position_ids [s] int64, loss_mask [s] float32, dataset and sample, int64 scalars. With
    `attention_eod` (the end-of-document token) also documents [s] int64: the attention is cut between them. It takes the
    place of GPTDataset's attention mask of [1, s, s], which says the same.
    """

    def __init__(
        self,
        dataset: GPTDataset | BlendedDataset,
        table: list[DatasetDescription],
        attention_eod: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._attention_eod = attention_eod
        self._components = components(dataset)
        self.table = table

    def __len__(self) -> int:
        return len(self._dataset)

    def locate(self, k: int) -> tuple[int, int]:
        """(dataset, sample) of item k, without reading it."""
        if not 0 <= k < len(self):
            raise IndexError(f"item {k} of a dataset of {len(self)} samples")
        if isinstance(self._dataset, BlendedDataset):
            return int(self._dataset.dataset_index[k]), int(self._dataset.dataset_sample_index[k])
        return 0, k

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        dataset, sample = self.locate(k)
        item = self._components[dataset][sample]
        if self._attention_eod is not None:
            item["documents"] = document_ids(item["tokens"], self._attention_eod)
        return {**item, "dataset": torch.tensor(dataset), "sample": torch.tensor(sample)}

    def microbatch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The items `indices` stacked along a first dimension b."""
        return default_collate([self[k] for k in indices])


def components(dataset: GPTDataset | BlendedDataset) -> list[GPTDataset]:
    """The GPTDatasets of a blend, or the one itself."""
    return list(dataset.datasets) if isinstance(dataset, BlendedDataset) else [dataset]  # type: ignore[arg-type]
