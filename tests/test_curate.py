"""`inrun curate`: rules on known values, the files it writes, and training on them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from inrun_megatron.data.corpora import write_corpus
from inrun_megatron.data.filtered import write_filtered
from inrun_megatron.data.identity import SampleResolver
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.data.megatron import IndexedDataset, IndexedDatasetBuilder
from inrun_megatron.data.origin import origin_of
from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger
from inrun_megatron.report.curation.blend import blend_weights
from inrun_megatron.report.curation.candidates import BOTTOM, HELD_OUT, KEPT, NEGATIVE, UNJUDGED, Candidates
from inrun_megatron.report.curation.decisions import decide
from inrun_megatron.report.curation.files import output_names, pasted
from inrun_megatron.report.curation.rules import Blend, Rules, Unit
from tests.command_line import answer
from tests.synthetic_ledger import DOMAINS, Shape, description, prepared_datasets, write_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    table = prepared_datasets(directory / "data")
    write_run(directory / "shapley", Shape(), description(table))
    return directory


# --- rules -----------------------------------------------------------------------------------------------------------


def two() -> list[Candidates]:
    """Two datasets of documents with known scores; the last document of the first is validation data."""
    return [
        Candidates(
            "a",
            np.array([10, 20, 30, 40, 50]),
            np.array([True, True, True, True, False]),
            np.array([-1.0, 0.5, np.nan, 2.0, -9.0]),
            np.array([3, 1, 0, 2, 1]),
            0.6,
        ),
        Candidates(
            "b", np.full(4, 25), np.full(4, True), np.array([-2.0, -0.5, 1.0, 3.0]), np.full(4, 2), 0.4
        ),
    ]


def fates(**rules: Any) -> list[list[int]]:
    datasets = two()
    decide(datasets, Rules(**rules))
    return [data.fate.tolist() for data in datasets]


def test_each_rule_drops_what_it_says() -> None:
    k, h, u, n, b = KEPT, HELD_OUT, UNJUDGED, NEGATIVE, BOTTOM
    assert fates(drop_negative=True) == [[n, k, k, k, h], [n, n, k, k]]
    # 7 judged documents over both: the lowest 3 of them are 42.9%.
    assert fates(drop_bottom=43.0) == [[b, k, k, k, h], [b, b, k, k]]
    assert fates(drop_bottom=42.0) == [[b, k, k, k, h], [b, k, k, k]]
    assert fates(keep_top=30.0) == [[b, b, k, k, h], [b, b, k, k]] == fates(drop_bottom=70.0)
    # Within each dataset: one of three, two of four.
    assert fates(drop_bottom=50.0, per_dataset=True) == [[b, k, k, k, h], [b, b, k, k]]
    # By tokens, in ascending order: 25, 35 with a's first, 60 with b's second, of 170.
    assert fates(drop_bottom=21.0, unit=Unit.tokens) == [[b, k, k, k, h], [b, k, k, k]]
    assert fates(drop_bottom=20.0, unit=Unit.tokens) == [[k, k, k, k, h], [b, k, k, k]]
    # Evidence: a's second document occurs once only.
    assert fates(drop_bottom=90.0, minimum_samples=2) == [[b, k, k, b, h], [b, b, b, k]]
    assert fates(drop_unjudged=True, minimum_samples=2) == [[k, u, u, k, h], [k, k, k, k]]
    assert fates(drop_negative=True, drop_bottom=50.0) == [[n, k, k, k, h], [n, n, k, k]]
    assert fates(blend=Blend.value) == [[k, k, k, k, h], [k, k, k, k]]


def test_percentages_count_exactly() -> None:
    data = Candidates("a", np.ones(100, int), np.full(100, True), np.arange(100.0), np.ones(100, int), None)
    decide([data], Rules(drop_bottom=29.0))
    assert (data.fate == BOTTOM).sum() == 29


@pytest.mark.parametrize(
    ("rules", "before", "after"),
    [
        # Of a's 100 training tokens 90 are left, of b's 100 tokens 50.
        (Rules(drop_negative=True), [0.6, 0.4], [0.54 / 0.74, 0.20 / 0.74]),
        (Rules(drop_negative=True, blend=Blend.keep), [0.6, 0.4], [0.6, 0.4]),
        (Rules(blend=Blend.value, strength=0.0), [0.6, 0.4], [0.6, 0.4]),
        (Rules(blend=Blend.value, smoothing=1.0), [0.6, 0.4], [0.6, 0.4]),
    ],
)
def test_blend_weights(rules: Rules, before: list[float], after: list[float]) -> None:
    datasets = two()
    decide(datasets, rules)
    found = blend_weights(datasets, rules)
    assert found[0] == pytest.approx(before) and found[1] == pytest.approx(after)


def test_blend_by_value() -> None:
    rules = Rules(blend=Blend.value, strength=2.0, smoothing=0.25)
    datasets = two()
    decide(datasets, rules)
    a = (-10 + 10 + 80) / 70  # judged documents of a by tokens
    b = 1.5 / 4
    gains = [0.6 * np.exp(2.0), 0.4 * np.exp(2.0 * b / a)]
    expected = [0.25 * w + 0.75 * g / sum(gains) for w, g in zip((0.6, 0.4), gains, strict=True)]
    assert blend_weights(datasets, rules)[1] == pytest.approx(expected)
    # A plain list has no weights: tokens of the training split stand in, here 100 each.
    for data in datasets:
        data.weight = None
    assert blend_weights(datasets, Rules(drop_negative=True))[0] == [0.5, 0.5]


# --- the command -----------------------------------------------------------------------------------------------------


def test_every_dataset_has_files_of_its_own() -> None:
    assert output_names(["web", "books/en"]) == ["web", "books_en"]
    assert output_names(["a b", "a_b", "a_b_1"]) == ["a_b_2", "a_b_3", "a_b_1"]
    assert output_names(["curation", "keep_list"]) == ["curation_1", "keep_list_2"]  # beside curation.json


def test_the_line_of_the_next_run_is_one_for_a_shell() -> None:
    path = ["0.5", "my data/it's", "0.5", "web"]
    line = pasted({"data_path": path, "split": "100,0,0"})
    assert shlex.split(line) == ["--data-path", *path, "--split", "100,0,0"] and line.endswith(
        " 0.5 web --split 100,0,0"
    )


def test_a_dry_run_says_what_would_go(run: Path) -> None:
    before = sorted(run.rglob("*"))
    arguments = ("curate", run, "--drop-negative", "--phase", "late", "--dry-run")
    text = answer(*arguments)
    assert "shuffled: 12 negative" in text and "goes" in text and "--split 100,0,0" in text
    assert max(map(len, text.split("The next run")[0].splitlines())) <= 100
    named = re.findall(r"goes .*?(shuffled:\d+) ", text)  # to be pasted
    assert len(named) == 3 and f"Document {named[0]}" in answer("show", run, "--document", named[0])
    figures = answer(*arguments, "--json", "--examples", 2, "--target", "code=2", "--target", "prose")
    rows = {row["name"]: row for row in figures["datasets"]}
    assert rows["shuffled"]["dropped"]["negative"]["documents"] == rows["shuffled"]["documents"] == 12
    assert rows["shuffled"]["score_before"] < 0 < rows["code"]["score_after"]
    gone = rows["shuffled"]["examples"]["dropped"]
    assert len(gone) == 2 and gone[0]["score"] <= gone[1]["score"] < 0 and gone[0]["snippet"]
    assert gone[0]["source"] == f"shuffled/{gone[0]['document']}"
    assert sorted(run.rglob("*")) == before
    # Scores are what `inrun top` adds up, with the weights, per token.
    top = answer("top", run, "--phase", "late", "--json", "-n", 100)["targets"]
    scores = {(t, row["dataset_name"], row["document"]): row for t, rows_ in top.items() for row in rows_}
    code, prose = (scores[t, "shuffled", gone[0]["document"]] for t in ("code", "prose"))
    expected = (2 * code["normalised"] + prose["normalised"]) / code["tokens"]
    assert gone[0]["score"] == pytest.approx(expected, rel=1e-9)


def test_what_is_written_is_a_dataset_with_all_that_lay_beside_it(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "next"
    figures = answer("curate", run, "--drop-bottom", 50, "--per-dataset", "-o", output, "--json")
    assert json.loads((output / "curation.json").read_text())["rules"]["drop_bottom"] == 50
    pasted = shlex.split((output / "data_path.txt").read_text())
    assert pasted == ["--data-path", *figures["data_path"], "--split", "100,0,0"]
    assert figures["not_carried_over"] == ["code.jsonl", "prose.jsonl", "shuffled.jsonl"]
    keep_list = pq.read_table(output / "keep_list.parquet").to_pylist()
    for row in figures["datasets"]:
        source, written = IndexedFile(row["source"]), IndexedDataset(row["prefix"])
        own = [entry for entry in keep_list if entry["dataset"] == row["name"]]
        kept = [entry for entry in own if entry["kept"]]
        assert len(own) == 12 and len(kept) == len(written.sequence_lengths) == row["kept_documents"] == 6
        assert max(e["score"] for e in own if not e["kept"]) <= min(e["score"] for e in kept)
        metadata = pq.read_table(f"{row['prefix']}.documents.parquet").to_pylist()
        for entry in kept:
            new = entry["new_document"]
            np.testing.assert_array_equal(written[new], source.document(entry["document"]))
            assert metadata[new]["source"] == f"{row['name']}/{entry['document']}"
            assert metadata[new]["document"] == new
        summary = json.loads(Path(f"{row['prefix']}.json").read_text())
        assert summary["documents"] == 6 and summary["tokenizer"]["name"] == "bytes"
        assert summary["tokens"] == row["kept_tokens"] == sum(e["tokens"] for e in kept)
        # Through a second curation the way back still leads to the first dataset.
        origin = origin_of(IndexedFile(row["prefix"]), "x")
        assert origin.idx_sha256 == Ledger(run).datasets[DOMAINS.index(row["name"])]["idx_sha256"]
        assert origin.documents(np.arange(6)).tolist() == [e["document"] for e in kept]
    with pytest.raises(UserError, match="exists; choose another --output"):
        answer("curate", run, "--drop-negative", "-o", output)
    answer("curate", run, "--drop-bottom", 10, "-o", output, "--overwrite")
    assert json.loads((output / "curation.json").read_text())["rules"]["drop_bottom"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["next"]


def test_documents_of_several_sequences_stay_whole(tmp_path: Path) -> None:
    """As Megatron's own preprocessing writes them, a sequence per sentence; and no file of a neighbour is taken."""
    builder = IndexedDatasetBuilder(str(tmp_path / "many.bin"), dtype=np.int32)
    for start, lengths in ((0, [2, 3]), (10, [1]), (20, [4, 1, 1])):
        builder.add_document(np.arange(start, start + sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "many.idx"))
    write_corpus(tmp_path / "many.more", ["one", "two", "three"])
    (tmp_path / "out").mkdir()
    assert write_filtered(IndexedFile(tmp_path / "many"), np.array([0, 2]), tmp_path / "out/many", {}) == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["many.bin", "many.idx"]
    written = IndexedFile(tmp_path / "out/many")
    assert written.sequence_lengths.tolist() == [2, 3, 4, 1, 1]
    assert written.document_boundaries.tolist() == [0, 2, 5]
    assert written.document(1).tolist() == list(range(20, 26)) and written.dtype == np.int32


BAD = [
    (("--dry-run",), "no rule is given"),
    (("--drop-negative",), "give one of --output DIR and --dry-run"),
    (("--drop-bottom", "0", "--dry-run"), "--drop-bottom 0 is no percentage"),
    (("--drop-bottom", "5", "--keep-top", "5", "--dry-run"), "give one"),
    (("--drop-negative", "--dry-run", "--target", "x=1"), "the run has the targets code, prose"),
    (("--drop-negative", "--dry-run", "--target", "code=x"), "'x' is no number"),
    (("--drop-negative", "--dry-run", "--target", "code=0"), "all --target weights are 0"),
    (("--drop-negative", "--dry-run", "--target", "code", "--target", "code"), "given twice"),
    (("--drop-unjudged", "--min-samples", "100000", "--dry-run"), "these rules leave no document"),
    (("--drop-negative", "--overwrite", "-o", "{run}/data"), "which the run read"),
    (("--drop-negative", "--overwrite", "-o", "{run}/shapley"), "was not written by inrun curate"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(run: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        answer("curate", run, *(text.format(run=run) for text in arguments))


# --- training on the outcome -----------------------------------------------------------------------------------------


def pretrain(*flags: str) -> None:
    scrubbed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in scrubbed}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*start, str(ROOT / "launch" / "pretrain.py"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_trains_on_what_curate_wrote(tmp_path: Path) -> None:
    """Train, curate, train again on the pasted data path; the second run never meets a dropped document."""
    library = Path(os.__file__).parent
    modules = [library / f"{name}.py" for name in ("abc", "bisect", "copy", "heapq", "queue", "sched")]
    lines = [line for path in modules for line in path.read_text().split("\n\n") if line.strip()]
    half = len(lines) // 2
    for name, part in (("one", lines[:half]), ("two", lines[half:])):
        records = [{"text": text, "source": f"{name}/{n}"} for n, text in enumerate(part)]
        write_corpus(tmp_path / name, records)
    write_corpus(tmp_path / "target", ["def target(x):\n    return x + 1\n" * 4])
    model = shlex.split(
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --micro-batch-size 8 "
        "--global-batch-size 32 --train-iters 6 --lr 1e-2 --eval-iters 0 --zero-stage 1 --split 90,10,0"
    )
    target = ["--shapley-target", f"code={tmp_path}/target"]
    first = ["--data-path", "0.5", f"{tmp_path}/one", "0.5", f"{tmp_path}/two", "--save", f"{tmp_path}/first"]
    pretrain(*model, *target, *first)
    figures = answer(
        "curate",
        tmp_path / "first",
        "--drop-bottom",
        30,
        "--drop-unjudged",
        "-o",
        tmp_path / "next",
        "--json",
    )
    assert all(row["held_out"] and row["rewritten"] for row in figures["datasets"])
    assert {row["name"] for row in figures["datasets"]} == {"one", "two"}
    # Pasted behind the other flags, so that --data-path and --split override them.
    pasted = shlex.split((tmp_path / "next" / "data_path.txt").read_text())
    pretrain(*model, *target, *pasted, "--seed", "7", "--save", f"{tmp_path}/second")

    ledger = Ledger(tmp_path / "second")
    resolver = SampleResolver(ledger.datasets)
    rows = ledger.values().to_table().to_pydict()
    assert len(rows["value"]) == 5 * 32 or len(rows["value"]) == 6 * 32
    kept = {
        (entry["dataset"], entry["new_document"]): entry
        for entry in pq.read_table(tmp_path / "next" / "keep_list.parquet").to_pylist()
        if entry["kept"]
    }
    met = set()
    for dataset, sample in zip(rows["dataset"], rows["sample"], strict=True):
        name = resolver.name(dataset)
        for span in resolver.resolve(dataset, sample):
            entry = kept[name, span.document]
            metadata = resolver.document_metadata(dataset, span.document)
            assert metadata["source"] == f"{name}/{entry['document']}"
            met.add((name, entry["document"]))
    assert len(met) > 20
    shown = answer("show", tmp_path / "second", "--document", f"{name}:{span.document}", "--json")
    assert shown["source"] == metadata["source"] and shown["text"]

    # The two runs share documents by their origin, though order and numbers differ.
    compared = answer("compare", tmp_path / "first", tmp_path / "second", "--json")
    shared = compared["targets"]["code"]
    assert 20 < shared["shared"] <= len(met) and -1 <= shared["spearman"] <= 1
    mover = shared["movers"]["up"][0]
    assert mover["source_a"] == mover["source_b"]
    with pytest.raises(UserError, match="compare by document"):
        answer("compare", tmp_path / "first", tmp_path / "second", "--by", "sample")
