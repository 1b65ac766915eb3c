"""inrun prepare: what it reads, and what it writes."""

from __future__ import annotations

import datetime
import gzip
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers

from inrun_megatron.data.corpora import tiny_corpus, write_corpus
from inrun_megatron.data.documents import read_summary
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.data.prepare import prepare
from inrun_megatron.data.tokenizers import build_tokenizer, build_tokenizer_from
from inrun_megatron.errors import UserError
from tests.data_cases import decoded, jsonl, metadata, write_tokenizer

TEXTS = ["Hello world.\n", "naïve café — 漢字 🙂", "a\n\nb\r\nc\ttab", "x" * 5000]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def test_text_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/b.txt").write_text(TEXTS[1], encoding="utf-8")
    (tmp_path / "in/a.md").write_bytes(TEXTS[2].encode())
    with gzip.open(tmp_path / "in/deep/c.txt.gz", "wt", encoding="utf-8") as file:
        file.write(TEXTS[0])
    (tmp_path / "in/.hidden.txt").write_text("no")
    (tmp_path / "in/program.py").write_text("no")
    (tmp_path / "in/empty.txt").write_text("")
    summary = prepare([tmp_path / "in"], tmp_path / "out/c")
    assert decoded(tmp_path / "out/c") == [TEXTS[2], TEXTS[1], TEXTS[0]]
    assert (summary.documents, summary.empty, summary.files) == (3, 1, 4)
    assert summary.tokens == sum(len(t.encode()) + 1 for t in TEXTS[:3])
    assert [row["file"] for row in metadata(tmp_path / "out/c")] == [
        str(tmp_path / "in" / name) for name in ("a.md", "b.txt", "deep/c.txt.gz")
    ]
    # a glob names anything; a file that two inputs name counts once
    prepare([str(tmp_path / "in/**/*.py"), tmp_path / "in/program.py"], tmp_path / "out/py")
    assert decoded(tmp_path / "out/py") == ["no"]


def test_jsonl_keeps_fields(tmp_path: Path) -> None:
    records = [
        {"body": "one", "source": "web", "score": 1, "tags": ["a"], "mixed": 1, "big": 2**70, "ok": True},
        {"body": ""},
        {"body": "two", "url": "http://x", "score": 2.5, "mixed": "m", "ok": None},
        {"body": None},
    ]
    path = jsonl(tmp_path / "a.jsonl", records)
    path.write_text(path.read_text() + "\n  \n")  # blank lines at the end
    summary = prepare(
        [path],
        tmp_path / "c",
        text_field="body",
        keep=["source", "url", "score", "tags", "mixed", "big", "ok"],
    )
    assert summary.empty == 2 and decoded(tmp_path / "c") == ["one", "two"]
    first, second = metadata(tmp_path / "c")
    assert first == {
        "document": 0,
        "source": "web",
        "file": str(path),
        "line": 1,
        "tokens": 4,
        "url": None,
        "score": 1.0,
        "tags": '["a"]',
        "mixed": "1",
        "big": str(2**70),
        "ok": True,
    }
    assert (second["source"], second["line"], second["score"], second["mixed"]) == (
        str(path),
        3,
        2.5,
        '"m"',
    )


def test_parquet(tmp_path: Path) -> None:
    day = datetime.date(2024, 1, 2)
    table = pa.table({"text": ["one", None, "three"], "n": [1, 2, 3], "day": [day] * 3})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    prepare([tmp_path / "a.parquet"], tmp_path / "c", keep=["n", "day"])
    assert decoded(tmp_path / "c") == ["one", "three"]
    assert [(r["line"], r["n"], r["day"]) for r in metadata(tmp_path / "c")] == [
        (1, 1, "2024-01-02"),
        (3, 3, "2024-01-02"),
    ]


def test_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo")
    prepare([tmp_path / "a.txt"], tmp_path / "c", format="lines")
    assert decoded(tmp_path / "c") == ["one", "two"]
    assert [row["line"] for row in metadata(tmp_path / "c")] == [1, 3]


def test_workers_change_nothing(tmp_path: Path, tokenizer_json: Path) -> None:
    generator = random.Random(0)
    records = [{"text": "the cat " * generator.randint(1, 300), "i": i} for i in range(3000)]
    path = jsonl(tmp_path / "a.jsonl", records)  # several pieces of 1 MiB
    assert path.stat().st_size > 3 << 20
    (tmp_path / "b.txt").write_text("the dog")
    results = []
    for workers in (1, 3):
        out = tmp_path / f"c{workers}"
        prepare([path, tmp_path / "b.txt"], out, tokenizer=tokenizer_json, keep=["i"], workers=workers)
        results.append(
            [Path(f"{out}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".documents.parquet")]
        )
    assert results[0] == results[1]
    assert [row["i"] for row in metadata(tmp_path / "c3")] == [*range(3000), None]


def test_hugging_face_tokenizer(tmp_path: Path, tokenizer_json: Path) -> None:
    tokenizer = build_tokenizer(tokenizer_json.parent)  # the directory will do
    prefix = write_corpus(tmp_path / "c", TEXTS, tokenizer=tokenizer_json)
    data = IndexedDataset(prefix)
    assert [tokenizer.decode(data[i]) for i in range(len(data))] == TEXTS
    assert all(data[i][-1] == tokenizer.eod == 1 for i in range(len(data)))
    summary = read_summary(prefix)
    assert summary is not None
    record = summary["tokenizer"]
    assert build_tokenizer_from(record).unique_identifiers == tokenizer.unique_identifiers
    with pytest.raises(UserError, match="has changed since"):
        build_tokenizer_from({**record, "sha256": "0" * 64})
    assert build_tokenizer(tokenizer_json, "<pad>").eod == 0


def test_large_vocabulary_uses_int32(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(70000)} | {"</s>": 70000}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "big.json"))
    prefix = write_corpus(tmp_path / "c", ["w1 w69999 w5"], tokenizer=tmp_path / "big.json")
    assert IndexedFile(prefix).document(0).tolist() == [1, 69999, 5, 70000]
    assert IndexedFile(prefix).dtype == np.int32


def test_reader_agrees_with_megatron(tmp_path: Path) -> None:
    prefix = tiny_corpus(tmp_path / "c", documents=12)
    ours, theirs = IndexedFile(prefix), IndexedDataset(prefix)
    assert ours.num_documents == len(theirs) == 12 and ours.one_sequence_per_document
    for i in range(12):
        np.testing.assert_array_equal(ours.document(i), theirs[i])
        np.testing.assert_array_equal(ours.sequence(i, 3, 7), theirs.get(i, 3, 4))
