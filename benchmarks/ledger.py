"""A generated ledger of 100 million rows: how long the commands that read it take, and how much memory.

    python -m benchmarks.ledger                      100 million rows in a temporary directory (about 2 GB)
    python -m benchmarks.ledger --rows 4000000       a smaller one
    python -m benchmarks.ledger --keep DIR           leave the ledger in DIR and use it again
    python -m benchmarks.ledger --only report        one command
    python -m benchmarks.ledger --rows 3200000 --batch 8     100,000 steps of few samples
    python -m benchmarks.ledger --granularity document   values by document: a sample has a row for each of its documents

Rows: 4 targets, 1,024 samples a step (--batch), 4 datasets with 20 sources each; documents of 8 to 64 tokens and samples of 16, so
that most samples are cut from one or two documents. The rows go through the real writer and its commits, the samples
through megatron-core's own index arrays. Each command runs as a user's does, in a process of its own: wall and processor
time are of the whole process, memory is its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TARGETS = ("code", "prose", "maths", "dialogue")
DATASETS, SOURCES, BATCH, WRITERS, SEQUENCE = 4, 20, 1024, 4, 16
COMMIT_EVERY = 500

COMMANDS = {
    "report": ["report", "--output", "PAGE"],
    "report-json": ["report", "--json"],
    "summary": ["summary"],
    "dataset": ["top", "--by", "dataset"],
    "source": ["top", "--by", "source"],
    "document": ["top", "--by", "document"],
    "sample": ["top", "--by", "sample"],
    "verify": ["verify"],
}
"""Subcommand and options; the run comes in between."""


def write_data(directory: Path, samples: int) -> list[dict[str, Any]]:
    """Datasets as `inrun prepare` leaves them (tokens are 0 but for the end of a document), and their table."""
    from inrun_megatron.data.documents import documents_path
    from inrun_megatron.data.megatron import IndexedDatasetBuilder
    from inrun_megatron.data.tokenizers import ByteTokenizer
    from inrun_megatron.data.train import build_datasets

    generator = np.random.default_rng(0)
    blend: list[str] = []
    for index in range(DATASETS):
        prefix = directory / f"set{index}"
        lengths = generator.integers(8, 65, size=int(samples / DATASETS * 1.1 * SEQUENCE / 36) + 100)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        builder.sequence_lengths = lengths.tolist()
        builder.document_indices = list(range(len(lengths) + 1))
        builder.finalize(f"{prefix}.idx")
        os.truncate(f"{prefix}.bin", int(lengths.sum()) * 2)
        # Each document ends with its token: by that segments are told apart.
        tokens = np.memmap(f"{prefix}.bin", np.uint16, "r+")
        tokens[np.cumsum(lengths) - 1] = ByteTokenizer.eod
        tokens.flush()
        names = pa.array([f"source {index}.{number}" for number in range(SOURCES)])
        codes = pa.array(generator.integers(0, SOURCES, len(lengths)), pa.int32())
        table = pa.table(
            {
                "document": np.arange(len(lengths)),
                "source": pa.DictionaryArray.from_arrays(codes, names).cast(pa.string()),
                "file": pa.array(["generated"] * len(lengths)),
                "line": np.arange(1, len(lengths) + 1),
                "tokens": lengths,
            }
        )
        pq.write_table(table, documents_path(prefix))
        blend += ["1", str(prefix)]
    train, _ = build_datasets(
        data_path=blend,
        split="100,0,0",
        seq_length=SEQUENCE,
        train_samples=samples,
        valid_samples=0,
        seed=1,
        tokenizer=ByteTokenizer(),
    )
    return [entry.to_dict() for entry in train.table]


def segments_of(table: list[dict[str, Any]], samples: int) -> list[np.ndarray]:
    """How many documents each of the first `samples` samples has, by dataset."""
    from inrun_megatron.data.identity import SampleResolver

    resolver, found = SampleResolver(table, verify=False), []
    for dataset in range(len(table)):
        counts = np.empty(samples, np.int8)
        for first in range(0, samples, 1 << 18):
            own = np.arange(first, min(first + (1 << 18), samples))
            row, _, start, end = resolver.spans(dataset, own)
            size = end - start
            # The last token of a sample is the label of its last position.
            begin = np.cumsum(size) - size - row * (SEQUENCE + 1)
            counts[own] = np.bincount(row[begin < SEQUENCE], minlength=len(own))
        found.append(counts)
    return found


def write_ledger(
    directory: Path, rows: int, granularity: str = "sample", batch: int = BATCH
) -> dict[str, Any]:
    """Generate; returns the figures of the writing. batch: samples a step, a multiple of DATASETS and WRITERS."""
    from inrun_megatron.ledger import LedgerWriter, RunDescription, StepRecord, commit, create_ledger

    cut = granularity == "document"
    # Samples of 16 tokens, cut from documents of 36 on average, have 16 / 36 boundaries.
    steps = int(rows / (batch * len(TARGETS) * (1 + SEQUENCE / 36 if cut else 1)))
    directory.mkdir(parents=True, exist_ok=True)
    table = write_data(directory, steps * batch + batch)
    segments = segments_of(table, steps * batch // DATASETS) if cut else []
    described = RunDescription(
        targets=[{"name": name, "sequences": 8} for name in TARGETS],
        datasets=table,
        configuration={
            "training": {"optimizer": "adam"},
            "shapley": {"interval": 1, "estimator": "first_order", "granularity": granularity},
        },
        coverage={"parameters": 1, "tapped": 1, "missing": []},
    )
    generator = np.random.default_rng(1)
    nothing = np.zeros(DATASETS, dtype=np.int64)
    started, inside, written = time.perf_counter(), 0.0, 0
    losses = np.full(len(TARGETS), 6.0)
    share = batch // WRITERS
    with create_ledger(directory / "shapley", described):
        writers = [LedgerWriter(directory / "shapley", number) for number in range(WRITERS)]
        for step in range(1, steps + 1):
            dataset = np.arange(batch) % DATASETS
            sample = nothing[dataset] + np.arange(batch) // DATASETS
            nothing += batch // DATASETS
            segment = np.zeros(batch, np.int32)
            if cut:
                counts = np.array([segments[d][k] for d, k in zip(dataset, sample, strict=True)])
                dataset, sample = np.repeat(dataset, counts), np.repeat(sample, counts)
                segment = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            values = generator.normal(1e-5, 1e-4, (len(sample), len(TARGETS))) / (1 + step / 1000)
            sums = values.sum(0)
            # Samples are not cut between writers.
            edges = np.append(np.flatnonzero(segment == 0)[::share], len(sample))
            written += len(sample) * len(TARGETS)
            record = StepRecord(
                step=step,
                samples=batch,
                consumed_samples=step * batch,
                clip_coefficient=1.0,
                target_loss=losses.tolist(),
                sum_values=sums.tolist(),
                additivity_lhs=sums.tolist(),
                additivity_rhs=sums.tolist(),
            )
            losses = losses - sums
            before = time.perf_counter()
            writers[0].append_step(record)
            for number, writer in enumerate(writers):
                own = slice(edges[number], edges[number + 1])
                tokens = np.full(len(sample[own]), SEQUENCE)
                writer.append(step, dataset[own], sample[own], tokens, values[own], segment[own])
            inside += time.perf_counter() - before
            if step % COMMIT_EVERY == 0 or step == steps:
                parts = [part for writer in writers for part in writer.write_parts()]
                commit(directory / "shapley", step, parts)
    size = sum(path.stat().st_size for path in (directory / "shapley" / "values").iterdir())
    return {
        "rows": written,
        "steps": steps,
        "bytes_per_row": size / written,
        "seconds": time.perf_counter() - started,
        "append_microseconds_per_step_and_writer": inside / steps / WRITERS * 1e6,
    }


def timed(directory: Path, command: list[str], page: Path) -> dict[str, float]:
    """Run one command to its end. Raises CalledProcessError where it fails."""
    subcommand, *options = (str(page) if word == "PAGE" else word for word in command)
    arguments = [sys.executable, "-m", "inrun_megatron.cli", subcommand, str(directory), *options]
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(
        process.pid, 0
    )  # of this process alone, where getrusage has the sum of all children
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--granularity", choices=("sample", "document"), default="sample")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples a step: a multiple of 4")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="this command; may be given again")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.keep or Path(temporary)
        figures: dict[str, Any] = {}
        if not (directory / "shapley" / "run.json").exists():
            # In a process of its own: a child's peak is at least what its parent holds when it is started.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                written = pool.submit(
                    write_ledger, directory, options.rows, options.granularity, options.batch
                ).result()
            figures["writing"] = written
            print(
                f"{written['rows']:,} rows written in {written['seconds']:.0f} s ({written['bytes_per_row']:.1f} bytes a row); "
                f"append takes {written['append_microseconds_per_step_and_writer']:.0f} us per step and writer"
            )
        for name, command in COMMANDS.items():
            if options.only and name not in options.only:
                continue
            figures[name] = found = timed(directory, command, Path(temporary) / "report.html")
            print(
                f"{'inrun ' + ' '.join(command):<28} {found['seconds']:6.1f} s   {found['cpu_seconds']:6.1f} s of processor "
                f"time   peak {found['peak_gib']:.2f} GiB",
                flush=True,
            )
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
