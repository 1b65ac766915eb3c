"""What the tests of prepared data, of training data and of sample identity share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from inrun_megatron.data.corpora import tiny_corpus
from inrun_megatron.data.identity import SampleResolver
from inrun_megatron.data.tokenizers import ByteTokenizer
from inrun_megatron.data.train import IdentifiedDataset, build_datasets


def write_pair(directory: Path) -> tuple[str, str]:
    """Two small datasets, the second of very short documents."""
    return (
        tiny_corpus(directory / "a", documents=20, domain="a"),
        tiny_corpus(directory / "b", documents=40, words=3, domain="b"),
    )


def write_tokenizer(path: Path) -> Path:
    """A real byte-level BPE of a few hundred tokens; <pad> is 0 and <|endoftext|> 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the hat"] * 20, trainer)
    tokenizer.save(str(path))
    return path


def build(*data_path: str, **options: Any) -> tuple[IdentifiedDataset, IdentifiedDataset | None]:
    settings: dict[str, Any] = {
        "data_path": list(data_path),
        "split": "100",
        "seq_length": 32,
        "train_samples": 50,
        "valid_samples": 0,
        "seed": 7,
        "tokenizer": ByteTokenizer(),
        **options,
    }
    return build_datasets(**settings)


def check_identity(dataset: IdentifiedDataset, resolver: SampleResolver) -> Counter:
    """Every item is, token by token, what its resolved spans hold. Returns how often each (dataset, document) is read."""
    read: Counter = Counter()
    for k in range(len(dataset)):
        item = dataset[k]
        index, sample = int(item["dataset"]), int(item["sample"])
        assert (index, sample) == dataset.locate(k)
        spans = resolver.resolve(index, sample)
        parts = [resolver.document_tokens(index, span.document)[span.start : span.end] for span in spans]
        tokens = np.concatenate(parts)
        assert all(len(part) == span.end - span.start > 0 for part, span in zip(parts, spans, strict=True))
        np.testing.assert_array_equal(tokens, np.append(item["tokens"].numpy(), item["labels"][-1]))
        np.testing.assert_array_equal(tokens[1:], item["labels"].numpy())
        np.testing.assert_array_equal(tokens, resolver.tokens(index, sample))
        read.update((index, span.document) for span in spans)
    return read


def metadata(prefix: str | Path) -> list[dict]:
    """Rows of the documents' metadata."""
    return pq.read_table(f"{prefix}.documents.parquet").to_pylist()


def decoded(prefix: str | Path) -> list[str]:
    """The documents as megatron-core reads them, decoded; each must end with the end-of-document token."""
    data = IndexedDataset(str(prefix))
    assert all(data[i][-1] == 256 for i in range(len(data)))
    return [ByteTokenizer().decode(data[i]) for i in range(len(data))]


def jsonl(path: Path, records: list) -> Path:
    """Write records as JSON, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
