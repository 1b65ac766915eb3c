"""Small GPTs on the demo's text, to judge estimators by: `benchmarks.direction` and `tests/test_fidelity.py`.

Training is the fp64 oracle's (`tests/`), so both need a checkout.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from inrun_megatron.data.indexed import IndexedFile
from launch import demo_corpus
from tests.oracle import (
    GlobalBatch,
    GPTShape,
    Microbatch,
    OptimizerSpec,
    OracleTarget,
    OracleTrainer,
    random_parameters,
    split_batch,
)
from tests.oracle_optimizer import global_norm, step_all

CORPUS = Path(__file__).parents[1] / "data/demo"
DOMAINS = ("code", "prose", "shuffled")
TARGETS = ("code", "prose")
VOCABULARY = 257  # bytes and the end of a document
BATCH, TARGET_SEQUENCES, SEQUENCE = 16, 4, 64


Kind = Literal["gpt2", "llama", "experts"]


@dataclass(frozen=True)
class Setting:
    """AdamW (betas 0.9 and 0.999, weight decay 0.1), linear warm-up, then a constant learning rate.

    kind: `experts` is Llama's shape with eight of them in every layer, two for a token, that multiply as much as its own.
    """

    kind: Kind
    lr: float
    warmup: int = 10
    clip: float = 1.0


@cache
def text() -> dict[str, Tensor]:
    """Byte tokens of the demo's domains and targets: from data/demo where it is there as the demo makes it, else anew."""
    settings = {
        "python": sys.version.split()[0],
        "seed": 1234,
        "train_bytes": 600_000,
        "target_bytes": 65_536,
    }
    if demo_corpus.up_to_date(CORPUS / "corpus.json", settings):
        names = [*DOMAINS, *(f"target_{name}" for name in TARGETS)]
        files = {name: IndexedFile(CORPUS / name) for name in names}
        return {n: torch.from_numpy(f.tokens(0, f.num_tokens).astype("int64")) for n, f in files.items()}
    corpus = demo_corpus.build(1234, 600_000, 65_536)
    return {
        name: torch.tensor([token for record in records for token in (*record["text"].encode(), 256)])
        for name, records in corpus.items()
    }


class Experiment:
    """One seed of a setting: its weights, targets and batches.

    Every batch has 16 samples from the three domains in turn, every target 4 sequences; all at random places.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        mixed = setting.kind == "experts"
        shape = GPTShape(
            "llama" if setting.kind == "experts" else setting.kind,
            num_layers=2,
            hidden_size=64,
            experts=8 if mixed else None,
            expert_ffn=128,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            seq_length=SEQUENCE,
        )
        self._generator = torch.Generator().manual_seed(seed)
        targets = [OracleTarget(n, self._rows(f"target_{n}", TARGET_SEQUENCES)) for n in TARGETS]
        self.trainer = OracleTrainer(
            shape,
            random_parameters(shape, seed=seed, scale=0.02),
            OptimizerSpec("adamw", weight_decay=0.1, clip=setting.clip),
            lambda t: setting.lr * min(1.0, t / setting.warmup),
            targets,
        )

    def at(self, steps: tuple[int, ...]) -> Iterator[tuple[int, GlobalBatch]]:
        """Train; before each of `steps` (ascending, from 1) hand out its number and its batch."""
        for step in itertools.count(1):
            batch = self._batch()
            if step in steps:
                yield step, batch
            if step >= steps[-1]:
                return
            self._train(batch)

    def _train(self, batch: GlobalBatch) -> None:
        """The trainer's step without values: one backward for all samples."""
        trainer, rows = self.trainer, batch[0][0]
        leaves = {name: value.clone().requires_grad_() for name, value in trainer.weights.items()}
        loss = trainer.model.token_losses(leaves, rows).mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        clip = trainer.optimizer.clip_coefficient(global_norm(gradients))
        clipped = {name: clip * gradient for name, gradient in gradients.items()}
        trainer.weights, trainer.state = step_all(
            trainer.optimizer, trainer.lr, trainer.weights, clipped, trainer.state
        )

    def _batch(self) -> GlobalBatch:
        parts = [self._rows(DOMAINS[i % len(DOMAINS)], 1) for i in range(BATCH)]
        return split_batch({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, 1, 1, BATCH)

    def _rows(self, name: str, count: int) -> Microbatch:
        data = text()[name]
        starts = torch.randint(0, len(data) - SEQUENCE - 1, (count,), generator=self._generator)
        rows = torch.stack([data[start : start + SEQUENCE + 1] for start in starts.tolist()])
        return {
            "tokens": rows[:, :-1],
            "labels": rows[:, 1:],
            "loss_mask": torch.ones(count, SEQUENCE),
            "position_ids": torch.arange(SEQUENCE).repeat(count, 1),
            "dataset": torch.zeros(count, dtype=torch.long),
            "sample": starts,
        }
