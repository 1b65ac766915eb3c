"""Segments of a ledger back to documents: end-of-document tokens against the spans of the .idx, and the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from inrun_megatron.data.corpora import write_corpus
from inrun_megatron.data.identity import SampleResolver
from inrun_megatron.data.megatron import document_ids
from inrun_megatron.data.segments import SegmentPlaces, places_of_documents, places_of_tokens
from inrun_megatron.data.tokenizers import ByteTokenizer
from inrun_megatron.data.train import IdentifiedDataset
from inrun_megatron.dots.segments import Segments
from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger, LedgerWriter, StepRecord, commit, create_ledger, open_ledger
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import whole_run
from inrun_megatron.report.query import Query
from inrun_megatron.report.values.domains import domain_figures
from inrun_megatron.report.values.ranking import Level, create_figures
from tests.command_line import answer
from tests.data_cases import build, write_pair
from tests.synthetic_ledger import TARGETS, description

EOD, S = ByteTokenizer.eod, 32


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return write_pair(tmp_path)


def _token_documents(train: IdentifiedDataset, resolver: SampleResolver, sample: int) -> list[int]:
    """The document of each position of a row, token by token."""
    dataset, number = train.locate(sample)
    return [s.document for s in resolver.resolve(dataset, number) for _ in range(s.end - s.start)][:S]


def _expected(documents: list[int], segments: list[int]) -> dict[tuple[int, int], float]:
    """(segment, document) -> the document's share of the segment's tokens."""
    pairs = list(zip(segments, documents, strict=True))
    return {(j, d): pairs.count((j, d)) / segments.count(j) for j, d in pairs}


def _check(train: IdentifiedDataset, count: int) -> tuple[SegmentPlaces, SampleResolver]:
    resolver = SampleResolver(train.table)
    rows = train.microbatch(range(count))
    parts = document_ids(rows["tokens"], EOD)
    cut = Segments.of(parts)
    counts = np.bincount(cut.row.numpy())
    places = places_of_documents(resolver, 0, rows["sample"].numpy(), counts)
    found: dict[tuple[int, int, int], float] = {}
    for row, first, last, document, share in zip(*places, strict=True):
        assert first == last
        key = (int(row), int(first), int(document))
        found[key] = found.get(key, 0.0) + share
    expected = {
        (row, *key): share
        for row in range(count)
        for key, share in _expected(
            _token_documents(train, resolver, row), (parts[row] - parts[row, 0]).tolist()
        ).items()
    }
    assert found == pytest.approx(expected)
    return places, resolver


def test_end_of_document_tokens_are_where_documents_end(pair: tuple[str, str]) -> None:
    """Prepared data over several epochs: segment d of a row is its d-th document, and nothing else."""
    train, _ = build(pair[1], train_samples=120)
    places, _ = _check(train, 120)
    assert (places.share == 1.0).all()
    last = [int(train[k]["tokens"][-1]) for k in range(120)]
    assert EOD in last, (
        "the control: a row that ends with its document, whose last label is another document's"
    )
    assert (np.bincount(places.row) > 3).any(), "the control: rows of many documents"


def test_documents_without_their_token_share_a_segment(tmp_path: Path) -> None:
    prefix = write_corpus(
        tmp_path / "plain", [f"document {i} " + "x" * i for i in range(30)], append_eod=False
    )
    places, _ = _check(build(prefix, train_samples=40)[0], 40)
    assert set(places.first) == {0} and set(places.last) == {0} and (places.share < 1.0).sum() > 20


def test_the_token_inside_of_a_document_and_documents_of_several_sequences(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.uint16)
    generator = np.random.default_rng(0)
    for index, lengths in enumerate(([25, 3, 19], [14], [], [17, 0, 11, 2], [40], [1])):
        tokens = generator.integers(0, 256, sum(lengths))
        tokens[-1:] = EOD
        if index == 4:
            tokens[[3, 4, 20]] = EOD
        builder.add_document(tokens, lengths)
    builder.finalize(str(tmp_path / "s.idx"))
    train, _ = build(str(tmp_path / "s"), train_samples=40)
    places, resolver = _check(train, 40)
    assert (places.share < 1.0).any() and (places.share == 1.0).any()
    with pytest.raises(
        UserError, match="sample 0 has 19 segments in the ledger, but its tokens are cut into"
    ):
        places_of_documents(resolver, 0, np.array([0]), np.array([19]))


def test_places_of_tokens(pair: tuple[str, str]) -> None:
    train, _ = build(pair[1], train_samples=60)
    resolver = SampleResolver(train.table)
    samples = np.array([7, 3, 59])
    places = places_of_tokens(resolver, 0, samples)
    for i, sample in enumerate(samples):
        own = places.row == i
        found = [
            d
            for first, last, d in zip(places.first[own], places.last[own], places.document[own], strict=True)
            for _ in range(first, last + 1)
        ]
        assert found == _token_documents(train, resolver, sample)


# --- reports ---------------------------------------------------------------------------------------------------------


def _worth(tokens: torch.Tensor, target: int) -> float:
    """The value of a part: any function of its tokens that tells them apart and adds up."""
    return float(((tokens.double() % 17) - 8.3 - target).sum()) * 1e-4


def _write(
    directory: Path, train: IdentifiedDataset, granularity: str, steps: int = 4, batch: int = 10
) -> None:
    described = description(
        [row.to_dict() for row in train.table],
        shapley={"estimator": "first_order", "interval": 1, "granularity": granularity},
    )
    with create_ledger(directory, described):
        writer = LedgerWriter(directory, 0)
        for step in range(1, steps + 1):
            rows = train.microbatch(range((step - 1) * batch, step * batch))
            tokens = rows["tokens"]
            parts = {
                "sample": torch.zeros_like(tokens),
                "document": document_ids(tokens, EOD),
                "token": torch.arange(S).expand_as(tokens),
            }[granularity]
            cut = Segments.of(parts)
            values = np.array([[_worth(tokens[r, a:b], k) for k in range(2)] for r, a, b in cut.bounds])
            lengths = cut.offsets.diff()
            writer.append(
                step,
                rows["dataset"][cut.row],
                rows["sample"][cut.row],
                lengths,
                values,
                segment=cut.ordinal,
            )
            sums = values.sum(0).tolist()
            writer.append_step(
                StepRecord(
                    step=step,
                    samples=batch,
                    clip_coefficient=1.0,
                    sum_values=sums,
                    additivity_lhs=sums,
                    additivity_rhs=sums,
                    target_loss=[5.0, 5.0],
                )
            )
        commit(directory, steps, writer.write_parts())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same values by sample, by document and by token."""
    directory = tmp_path_factory.mktemp("runs")
    train, _ = build(
        "1", write_pair(directory / "data")[0], "1", str(directory / "data" / "b"), train_samples=60
    )
    for granularity in ("sample", "document", "token"):
        _write(directory / granularity, train, granularity)
    resolver = SampleResolver(train.table)
    truth: dict[str, dict[str, float]] = {name: {} for name in TARGETS}
    for k in range(40):
        tokens, (dataset, _) = train[k]["tokens"], train.locate(k)
        for position, document in enumerate(_token_documents(train, resolver, k)):
            for target, name in enumerate(TARGETS):
                key = f"{dataset}:{document}"
                worth = _worth(tokens[position : position + 1], target)
                truth[name][key] = truth[name].get(key, 0.0) + worth
    (directory / "truth.json").write_text(json.dumps(truth))
    return {path.name: path for path in directory.iterdir()}


@pytest.mark.parametrize("granularity", ["document", "token"])
def test_documents_have_the_values_of_their_own_segments(runs: dict[str, Path], granularity: str) -> None:
    truth = json.loads(runs["truth.json"].read_text())
    ledger = Ledger(runs[granularity])
    assert all(check.ok for check in ledger.verify()), [c for c in ledger.verify() if not c.ok]
    with Query(ledger) as query:
        create_figures(query, Level.document, whole_run(4), Documents(ledger))
        for name in TARGETS:
            rows = query.rows(f"SELECT * FROM figures WHERE target = '{name}'")
            found = {f"{row['dataset']}:{row['document']}": row["value"] for row in rows}
            assert found == pytest.approx(truth[name], abs=1e-12)
        assert sum(row["tokens"] for row in rows) == 40 * S
    by_length = Ledger(runs["sample"])
    with Query(by_length) as query:  # the control: shares by length are something else
        create_figures(query, Level.document, whole_run(4), Documents(by_length))
        rows = query.rows("SELECT * FROM figures WHERE target = 'code'")
    shared = {f"{row['dataset']}:{row['document']}": row["value"] for row in rows}
    assert max(abs(shared[key] - value) for key, value in truth["code"].items()) > 1e-4


@pytest.mark.parametrize("granularity", ["document", "token"])
def test_figures_of_samples_and_domains_do_not_depend_on_how_they_are_cut(
    runs: dict[str, Path], granularity: str
) -> None:
    def figures(ledger: Ledger) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        with Query(ledger) as query:
            domains = [entry.to_dict() for entry in domain_figures(query, [whole_run(4)])]
            create_figures(query, Level.sample, whole_run(4))
            return domains, query.rows("SELECT * FROM figures ORDER BY target, dataset, sample")

    whole, cut = figures(Ledger(runs["sample"])), figures(Ledger(runs[granularity]))
    assert len(whole[1]) == 80
    for left, right in zip((*whole[0], *whole[1]), (*cut[0], *cut[1]), strict=True):
        assert right.keys() == left.keys()
        for name, value in left.items():
            expected = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            assert right[name] == expected, name


def test_commands(runs: dict[str, Path]) -> None:
    run, truth = str(runs["document"]), json.loads(runs["truth.json"].read_text())
    best = answer("top", run, "--target", "code", "-n", "1", "--json")["targets"]["code"][0]
    key = max(truth["code"], key=truth["code"].get)
    assert f"{best['dataset']}:{best['document']}" == key and best["value"] == pytest.approx(
        truth["code"][key]
    )
    rows = answer("show", run, "--document", key, "--json")["values"]
    assert sum(row["value"] for row in rows if row["target"] == "code") == pytest.approx(truth["code"][key])
    sample = answer("show", run, "--sample", "a:3", "--json")
    parts = [part["values"]["prose"] for part in sample["documents"] if part["values"]]
    [whole] = [row["value"] for row in sample["values"] if row["target"] == "prose"]
    assert len(parts) > 1 and sum(parts) == pytest.approx(whole)
    assert "Value: code" in answer("show", run, "--sample", "a:3")
    exported = runs["document"] / "rows.jsonl"
    written = answer("export", run, "--output", str(exported), "--json")["rows"]
    lines = [json.loads(line) for line in exported.read_text().splitlines()]
    assert written == len(lines) > 80 and max(line["segment"] for line in lines) > 0


def test_commands_on_whole_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    """Page, summary, comparison and curation of a run by document: its own values, and in words where they come from."""
    run, truth = str(runs["document"]), json.loads(runs["truth.json"].read_text())
    page = tmp_path / "page.html"
    figures = answer("report", run, "--output", str(page), "--json")
    rows = Ledger(run).values().count_rows()
    assert figures["rows"] == {"rows": rows, "not_finite": 0}
    words = "value is that of its own tokens"
    assert words in page.read_text() and words in answer("summary", run).replace("\n", " ")
    same = answer("compare", run, str(runs["token"]), "--measure", "value", "--per", "document", "--json")
    assert same["targets"]["code"]["spearman"] > 0.999  # equal values in other orders of sums
    by_length = answer(
        "compare", run, str(runs["sample"]), "--measure", "value", "--per", "document", "--json"
    )
    assert by_length["targets"]["code"]["spearman"] < 0.99
    rule = ("--drop-negative", "--target", "code", "--measure", "value", "--per", "document")
    curated = answer("curate", run, *rule, "--dry-run", "--json")
    dropped = sum(kind["documents"] for row in curated["datasets"] for kind in row["dropped"].values())
    values = truth["code"].values()
    assert 0 < sum(value < -1e-12 for value in values) <= dropped <= sum(value < 1e-12 for value in values)


def test_a_ledger_keeps_its_granularity(runs: dict[str, Path]) -> None:
    resumed = description(Ledger(runs["document"]).datasets, shapley={"granularity": "token"})
    with pytest.raises(UserError, match="holds values of granularity document, the resumed run has token"):
        open_ledger(runs["document"], resumed)


def test_a_lost_sample_is_noticed(tmp_path: Path, pair: tuple[str, str]) -> None:
    train, _ = build(pair[1], train_samples=60)
    append: Any = LedgerWriter.append

    def lossy(self: LedgerWriter, step: int, *columns: Any, segment: torch.Tensor) -> None:
        kept = slice(0, int(torch.nonzero(segment == 0)[-1]))
        append(self, step, *(column[kept] for column in columns), segment=segment[kept])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LedgerWriter, "append", lossy)
        _write(tmp_path / "run", train, "document")
    [check] = [check for check in Ledger(tmp_path / "run").verify() if check.name == "steps"]
    assert not check.ok and "9 rows, 10 recorded" in check.detail
