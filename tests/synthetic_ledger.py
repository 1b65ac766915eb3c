"""A run without training: prepared corpora, their real GPTDataset indices, and values by a known rule, through the real
writer and commits. For tests of the ledger and the reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inrun_megatron.data.corpora import tiny_corpus
from inrun_megatron.data.tokenizers import ByteTokenizer
from inrun_megatron.ledger import (
    Check,
    Ledger,
    LedgerWriter,
    PartInfo,
    RunDescription,
    StepRecord,
    commit,
    create_ledger,
)

TARGETS = ("code", "prose")
DOMAINS = ("code", "prose", "shuffled")

# Mean value of (domain, target) in the late phase, before the early surplus that any data have.
LATE = np.array([[9.3e-4, 3.4e-4], [1.2e-4, 6.8e-4], [-9.3e-4, -3.5e-4]])


@dataclass
class Shape:
    """Size of the run. writers: data-parallel ranks that write; idle: first steps at learning rate 0, of values 0."""

    steps: int = 60
    batch: int = 8
    writers: int = 2
    commit_every: int = 20
    seed: int = 0
    idle: int = 0


def description(datasets: list[dict[str, Any]] | None = None, **configuration: Any) -> RunDescription:
    """Of a run with TARGETS; without `datasets` a table of DOMAINS that leads to no files."""
    if datasets is None:
        datasets = [{"name": name, "index": index} for index, name in enumerate(DOMAINS)]
    return RunDescription(
        targets=[{"name": name, "sequences": 8} for name in TARGETS],
        datasets=datasets,
        configuration={
            "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
            "data": {"seq_length": 64},
            "training": {"optimizer": "adam", "lr": 1e-3, "global_batch_size": 8},
            "shapley": {"estimator": "first_order", "optimizer": "auto", "interval": 1},
        }
        | configuration,
        layout={"tp": 1, "dp": 2},
        coverage={"parameters": 10, "tapped": 10, "missing": []},
    )


def values_of(generator: np.random.Generator, step: int, dataset: np.ndarray) -> np.ndarray:
    """Values [n, K] of samples with these dataset indices: 40 times larger, and positive for all, in the first steps."""
    early = 40 * np.exp(-step / 4)
    noise = generator.normal(0.0, 4e-4, (len(dataset), len(TARGETS)))
    return (LATE[dataset] + early * 1e-3 + noise) / (1 + step / 100)


def step_record(step: int, values: np.ndarray, losses: np.ndarray, consumed: int) -> StepRecord:
    """A record that agrees with `values` [n, K]; clipping by one half, so that lhs and rhs are twice the sums."""
    sums = values.sum(0)
    return StepRecord(
        step=step,
        consumed_samples=consumed,
        samples=len(values),
        lr=1e-3,
        train_loss=float(losses.mean()),
        grad_norm=2.0,
        clip_coefficient=0.5,
        target_loss=losses.tolist(),
        sum_values=sums.tolist(),
        momentum_term=(0.1 * sums).tolist(),
        decay_term=(-0.01 * sums).tolist(),
        additivity_lhs=(2 * sums).tolist(),
        additivity_rhs=(2 * sums * (1 + 1e-7)).tolist(),
        seconds_total=0.2,
        seconds_scoring=0.03,
    )


def write_run(
    directory: Path, shape: Shape | None = None, described: RunDescription | None = None
) -> np.ndarray:
    """Write a whole run. Returns its rows as a structured array (step, dataset, sample, code, prose)."""
    shape = shape or Shape()
    generator = np.random.default_rng(shape.seed)
    described = described or description()
    rows, next_sample = [], np.zeros(len(DOMAINS), dtype=np.int64)
    with create_ledger(directory, described):
        writers = [LedgerWriter(directory, number) for number in range(shape.writers)]
        losses = np.array([5.5, 5.6])
        for step in range(1, shape.steps + 1):
            dataset = generator.integers(0, len(DOMAINS), shape.batch)
            sample = np.empty(shape.batch, dtype=np.int64)
            for position, index in enumerate(dataset):
                sample[position] = next_sample[index]
                next_sample[index] += 1
            values = values_of(generator, step, dataset) * (step > shape.idle)
            writers[0].append_step(step_record(step, values, losses, step * shape.batch))
            losses = losses - 0.9 * values.sum(0)
            for number, writer in enumerate(writers):
                own = slice(number, None, shape.writers)
                tokens = np.full(len(sample[own]), 64)
                writer.append(step, dataset[own], sample[own], tokens, values[own])
            rows += [(step, d, s, *v) for d, s, v in zip(dataset, sample, values, strict=True)]
            if step % shape.commit_every == 0 or step == shape.steps:
                parts: list[PartInfo] = [part for writer in writers for part in writer.write_parts()]
                commit(directory, step, parts, f"iter_{step:07d}")
    fields = [("step", int), ("dataset", int), ("sample", int), *((name, float) for name in TARGETS)]
    return np.array(rows, dtype=fields)


def prepared_datasets(
    directory: Path, samples: int = 700, seq_length: int = 64, seed: int = 1, documents: int = 12
) -> list[dict[str, Any]]:
    """The dataset table of a blend of DOMAINS, from real corpora and megatron-core's own indices; `seed`: of the order."""
    prefixes = [tiny_corpus(directory / name, documents=documents, words=20, domain=name) for name in DOMAINS]
    return blended(prefixes, samples, seq_length, seed)


def blended(
    prefixes: Sequence[str], samples: int = 700, seq_length: int = 64, seed: int = 1
) -> list[dict[str, Any]]:
    """The dataset table of a blend of prepared datasets in equal parts."""
    from inrun_megatron.data.train import build_datasets

    blend = [piece for prefix in prefixes for piece in ("1", prefix)]
    train, _ = build_datasets(
        data_path=blend,
        split="100,0,0",
        seq_length=seq_length,
        train_samples=samples,
        valid_samples=0,
        seed=seed,
        tokenizer=ByteTokenizer(),
    )
    return [entry.to_dict() for entry in train.table]


def failed(directory: Path) -> dict[str, Check]:
    """What `inrun verify` finds wrong, by name."""
    return {check.name: check for check in Ledger(directory).verify() if not check.ok}
