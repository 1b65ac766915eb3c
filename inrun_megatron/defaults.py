"""Defaults that flags, library and plan share, and that depend on the layout."""

from __future__ import annotations

from typing import Literal


def default_base(stages: int) -> Literal["current", "drift"]:
    """Where first_order takes the validation gradient unless told, on a pipeline of `stages` stages (1: none).

    The step's own starting point is the more faithful one (docs/evidence.md, experiment 1). Through a pipeline moved weights
    cost a flush, which is more than the validation pass itself: there it is for the user to ask for.
    """
    return "drift" if stages == 1 else "current"


CUDA_BLOCK = 1 << 26
"""Elements that elementwise work on a GPU takes at a time: its one vector to compute in is 256 MiB in fp32 at most."""

BUCKET_SIZE = 1 << 25
"""Elements that one collective sums or gathers over data-parallel ranks, at most: 128 MiB of fp32. Chosen, not measured."""


def padded_vocabulary(vocab_size: int, divisible_by: int, tensor_parallel: int) -> int:
    """Rows of the embedding and output layer: the next multiple of `divisible_by` x `tensor_parallel`.

    Megatron-LM's rule (`_vocab_size_with_padding`, megatron/training/tokenizer/tokenizer.py).
    """
    multiple = divisible_by * tensor_parallel
    return (vocab_size + multiple - 1) // multiple * multiple
