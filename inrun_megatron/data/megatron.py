"""What this package uses of megatron-core's datasets, imported in one place.

megatron-core warns on import of every optional package that is not installed; those lines would hide the user's own.
"""

from __future__ import annotations

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import (
        GPTDataset,
        GPTDatasetConfig,
        _get_ltor_masks_and_position_ids,
    )
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

__all__ = [
    "BlendedDataset",
    "BlendedMegatronDatasetBuilder",
    "DType",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Split",
    "document_ids",
    "helpers",
    "masks_and_positions",
]


def document_ids(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """The number of the document that each token belongs to, counted from 0 in its row: [..., s] -> int64 [..., s].

    The end-of-document token belongs to the document that it ends, as in GPTDataset's masks
    (`_get_ltor_masks_and_position_ids`).
    """
    ends = (tokens == eod).long()
    return ends.cumsum(-1) - ends


def masks_and_positions(
    tokens: torch.Tensor, eod: int | None, reset_position_ids: bool, eod_mask_loss: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_mask [s] float32, position_ids [s] int64) of one sequence of inputs [s], by GPTDataset's own function."""
    _, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
        tokens, -1 if eod is None else eod, reset_position_ids, False, eod_mask_loss, False
    )
    return loss_mask, position_ids
