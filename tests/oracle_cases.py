"""Small models, optimizers and batches for the tests of the oracle itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import (
    GlobalBatch,
    GPTShape,
    OptimizerSpec,
    OracleGPT,
    OracleTarget,
    OracleTrainer,
    Parameters,
    random_parameters,
    random_rows,
    split_batch,
)

GPT2 = GPTShape(
    "gpt2",
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    vocab_size=13,
    seq_length=6,
    padded_vocab_size=16,
)
LLAMA = GPTShape(
    "llama",
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    vocab_size=13,
    seq_length=6,
)
SHAPES = pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
OPTIMIZERS = {
    "sgd": OptimizerSpec("sgd", weight_decay=0.1, clip=0.5),
    "momentum": OptimizerSpec("sgd", momentum=0.9, dampening=0.1, weight_decay=0.1),
    "nesterov": OptimizerSpec("sgd", momentum=0.9, nesterov=True),
    "adam": OptimizerSpec("adam", beta2=0.95, weight_decay=0.3, clip=0.5),
    "adamw": OptimizerSpec("adamw", beta2=0.95, weight_decay=0.3, clip=0.5),
}
EACH_OPTIMIZER = pytest.mark.parametrize("spec", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def make_batch(shape: GPTShape, seed: int = 1) -> GlobalBatch:
    """8 samples as 2 replicas x 2 accumulation steps x 2 rows, with loss masks of varying length."""
    return split_batch(random_rows(shape, 8, seed), 2, 2, 2)


def make_trainer(shape: GPTShape, spec: OptimizerSpec, **options: Any) -> OracleTrainer:
    targets = [OracleTarget(f"target{k}", random_rows(shape, 3, 50 + k)) for k in range(2)]
    return OracleTrainer(shape, random_parameters(shape), spec, lambda step: 0.01 / step, targets, **options)


def batch_loss(model: OracleGPT, parameters: Parameters, batch: GlobalBatch) -> Tensor:
    """Megatron's convention written out for whole microbatches."""
    means = []
    for replica in batch:
        for microbatch in replica:
            losses = model.token_losses(parameters, microbatch)
            mask = microbatch["loss_mask"].double()
            means.append((losses * mask).sum() / mask.sum())
    return torch.stack(means).mean()
