"""Aggregation against plain numpy on the same rows; phases; documents of samples."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from inrun_megatron.errors import UserError
from inrun_megatron.ledger import Ledger, LedgerWriter, StepRecord, commit, create_ledger
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import (
    Phase,
    choose_steps,
    parse_cuts,
    parse_phase,
    parse_steps,
    phases_of,
    whole_run,
)
from inrun_megatron.report.query import Query
from inrun_megatron.report.text import printable, shorten
from inrun_megatron.report.values.domains import domain_figures
from inrun_megatron.report.values.ranking import Level, RankBy, create_figures, ranked
from tests.synthetic_ledger import DOMAINS, TARGETS, Shape, description, prepared_datasets, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    directory = tmp_path_factory.mktemp("run")
    table = prepared_datasets(directory / "data")
    return directory, write_run(directory / "shapley", Shape(), description(table))


def normalised(rows: np.ndarray, target: str) -> np.ndarray:
    """phi_i n_t / sum_j |phi_j|, one step after another."""
    out = np.empty(len(rows))
    for step in np.unique(rows["step"]):
        own = rows["step"] == step
        out[own] = rows[target][own] / np.abs(rows[target][own]).mean()
    return out


def clustered_error(values: np.ndarray, steps: np.ndarray) -> float:
    """The error of the mean by its definition: residual totals of each step."""
    mean, clusters = values.mean(), np.unique(steps)
    totals = np.array([(values[steps == step] - mean).sum() for step in clusters])
    return float(np.sqrt(len(clusters) / (len(clusters) - 1) * (totals**2).sum()) / len(values))


def test_domain_figures_are_those_of_numpy(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    phases = [whole_run(60), *phases_of(60)]
    with Query(Ledger(directory)) as query:
        figures = domain_figures(query, phases)
    assert len(figures) == len(phases) * len(DOMAINS) * len(TARGETS)
    assert [entry.target for entry in figures[:6]] == ["code"] * 3 + ["prose"] * 3
    for entry in figures:
        own = (
            (rows["dataset"] == entry.dataset)
            & (rows["step"] >= entry.first_step)
            & (rows["step"] <= entry.last_step)
        )
        values, nu = rows[entry.target][own], normalised(rows, entry.target)[own]
        assert entry.samples == own.sum() and entry.tokens == 64 * own.sum()
        assert entry.sum == pytest.approx(values.sum(), rel=1e-12)
        assert entry.mean == pytest.approx(values.mean(), rel=1e-12)
        assert entry.negative_share == (values < 0).mean()
        assert entry.normalised_mean == pytest.approx(nu.mean(), rel=1e-10)
        assert entry.standard_error == pytest.approx(clustered_error(values, rows["step"][own]), rel=1e-6)
        assert entry.normalised_standard_error == pytest.approx(
            clustered_error(nu, rows["step"][own]), rel=1e-6
        )


def test_a_step_of_zeros_counts_in_no_normalised_figure(tmp_path: Path) -> None:
    """The first step of a warm-up, at learning rate 0: its values are zero, and no mean |value| divides them."""
    rows = write_run(tmp_path, Shape(steps=12, idle=2))
    counted = rows[rows["step"] > 2]
    with Query(Ledger(tmp_path)) as query:
        whole = {(f.target, f.dataset): f for f in domain_figures(query, [whole_run(12)])}
        idle = domain_figures(query, [Phase("idle", 1, 2)])
    for (target, dataset), entry in whole.items():
        own = counted["dataset"] == dataset
        nu = normalised(counted, target)[own]
        assert entry.samples == (rows["dataset"] == dataset).sum()
        assert entry.normalised_mean == pytest.approx(nu.mean(), rel=1e-10)
        assert entry.normalised_standard_error == pytest.approx(
            clustered_error(nu, counted["step"][own]), rel=1e-6
        )
    assert {(entry.normalised_mean, entry.normalised_standard_error) for entry in idle} == {(0.0, None)}


def test_normalised_values_tell_late_steps_apart_where_raw_sums_do_not(run: tuple[Path, np.ndarray]) -> None:
    directory, _ = run
    with Query(Ledger(directory)) as query:
        whole = {(f.target, f.name): f for f in domain_figures(query, [whole_run(60)])}
    shuffled = whole["code", "shuffled"]
    assert shuffled.mean > 0 > shuffled.normalised_mean  # the early surplus rules the raw sum


@pytest.mark.parametrize("name", ["web[1]", "w*", "web?"])
def test_a_directory_is_no_pattern(tmp_path: Path, name: str) -> None:
    """Beside a run whose name the pattern would match."""
    own = write_run(tmp_path / name, Shape(steps=3, seed=1))
    write_run(tmp_path / "web1", Shape(steps=3))
    with Query(Ledger(tmp_path / name)) as query:
        found = query.table("SELECT value FROM ledger_values WHERE target = 'code'")["value"].to_numpy()
    np.testing.assert_array_equal(np.sort(found), np.sort(own["code"].astype(found.dtype)))


def test_samples_and_datasets_are_ranked(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    late = rows[rows["step"] > 20]
    with Query(Ledger(directory)) as query:
        create_figures(query, Level.sample, Phase("late", 21, 60))
        worst = ranked(query, Level.sample, "prose", worst=True, n=5)
        expected = np.sort(late, order="prose")[:5]
        assert [row["sample"] for row in worst] == expected["sample"].tolist()
        assert [row["value"] for row in worst] == expected["prose"].tolist()
        create_figures(query, Level.dataset, Phase("late", 21, 60), target="code")
        best = ranked(query, Level.dataset, "code", RankBy.mean, n=10)
        assert [row["dataset_name"] for row in best] == ["code", "prose", "shuffled"]
        assert best[0]["mean"] == pytest.approx(late["code"][late["dataset"] == 0].mean())
        assert ranked(query, Level.dataset, "prose") == []  # only the target that was asked for


def test_samples_of_a_target_of_several_words_are_ranked(tmp_path: Path) -> None:
    """Names in somebody's own loop may be any text, also one that looks like SQL."""
    names = ("one step ahead", "its target 's")
    described = description()
    described.targets = [{"name": name} for name in names]
    rows = write_run(tmp_path, Shape(steps=3), described)
    with Query(Ledger(tmp_path)) as query:
        for name, column in zip(names, TARGETS, strict=True):
            create_figures(query, Level.sample, whole_run(3), target=name)
            best = ranked(query, Level.sample, name, n=100)
            assert [row["value"] for row in best] == np.sort(rows[column])[::-1].tolist()


def test_document_values_are_shares_of_their_samples(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    ledger = Ledger(directory)
    documents = Documents(ledger)
    expected: dict[tuple[int, int], float] = {}
    tokens: dict[tuple[int, int], int] = {}
    for row in rows:
        spans = documents.spans(int(row["dataset"]), int(row["sample"]))
        for span in spans:
            key = (int(row["dataset"]), span.document)
            expected[key] = expected.get(key, 0.0) + row["code"] * (span.end - span.start) / 65
            tokens[key] = tokens.get(key, 0) + span.end - span.start
    with Query(ledger) as query:
        create_figures(query, Level.document, whole_run(60), documents)
        found = query.rows("SELECT * FROM figures WHERE target = 'code'")
    assert len(found) == len(expected) > 20
    for row in found:
        key = (row["dataset"], row["document"])
        assert row["value"] == pytest.approx(expected[key], rel=1e-9) and row["tokens"] == tokens[key]
    assert sum(row["value"] for row in found) == pytest.approx(rows["code"].sum(), rel=1e-9)


def test_shares_of_a_sample_add_up_with_a_document_twice_in_it(run: tuple[Path, np.ndarray]) -> None:
    directory, _ = run
    documents = Documents(Ledger(directory))
    table = documents.shares(0, np.arange(150))
    keys = list(zip(table["sample"].to_pylist(), table["document"].to_pylist(), strict=True))
    assert len(set(keys)) == len(keys)
    per_sample = np.bincount(table["sample"].to_numpy(), weights=table["share"].to_numpy())
    assert np.allclose(per_sample, 1.0, atol=1e-12)
    twice = [
        k for k in range(150) if len(spans := documents.spans(0, k)) > len({span.document for span in spans})
    ]
    assert twice, "no sample reads a document twice: the test shows nothing"


def test_default_phases() -> None:
    assert [(p.name, p.first, p.last) for p in phases_of(300)] == [
        ("early", 1, 50),
        ("middle", 51, 100),
        ("late", 101, 300),
    ]
    assert [(p.first, p.last) for p in phases_of(2)] == [(1, 2)]
    assert [(p.first, p.last) for p in phases_of(10, [Fraction(1, 2)])] == [(1, 5), (6, 10)]


def test_step_ranges() -> None:
    assert (parse_steps("5:9", 20).first, parse_steps("5:9", 20).last) == (5, 9)
    assert (parse_steps("15:", 20).first, parse_steps("15:99", 20).last, parse_steps(":9", 20).first) == (
        15,
        20,
        1,
    )
    assert (parse_phase("3/3", 100).first, parse_phase("3/3", 100).last) == (67, 100)
    covered = [
        step for k in (1, 2, 3) for p in [parse_phase(f"{k}/3", 100)] for step in range(p.first, p.last + 1)
    ]
    assert covered == list(range(1, 101))
    for phase in phases_of(300):
        assert parse_phase(phase.name, 300) == phase  # late: steps 101 to 300, not the 201 to 300 of 3/3
    with pytest.raises(UserError, match="2 steps are too few for early, middle, late"):
        parse_phase("late", 2)
    assert choose_steps(None, None, 7) == whole_run(7)


@pytest.mark.parametrize("text", ["9:5", "0:5", "x", "21:30", "1:2:3"])
def test_bad_step_ranges(text: str) -> None:
    with pytest.raises(UserError, match="--steps"):
        parse_steps(text, 20)


@pytest.mark.parametrize("text", ["4/3", "0/3", "3", "a/b", "last"])
def test_bad_phases(text: str) -> None:
    with pytest.raises(UserError, match="--phase"):
        parse_phase(text, 20)


def test_bad_cuts_and_two_ranges() -> None:
    for text in ("1/2,1/3", "2", "0"):
        with pytest.raises(UserError, match="increasing fractions"):
            phases_of(100, parse_cuts(text))
    with pytest.raises(UserError, match="not a list of fractions"):
        parse_cuts("early")
    with pytest.raises(UserError, match="both name a range"):
        choose_steps("1:2", "1/3", 10)


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\n\tb\x1b[31m\u202e\u2028\x9b") == "a\\n\\tb\\x1b[31m\\u202e\\u2028\\x9b"
    assert printable("Zürich 東京 \U0001f600") == "Zürich 東京 \U0001f600"
    assert shorten("abcdefghij", 8) == "abcde..." and shorten("abcdefghij", 8, keep_end=True) == "...fghij"


def test_no_room_is_not_told_as_a_damaged_part(run: tuple[Path, np.ndarray]) -> None:
    sorting = "CREATE TEMP TABLE much AS SELECT range AS a, hash(range) AS b FROM range(4000000) ORDER BY b"
    with Query(Ledger(run[0]), memory_limit="20MB") as query:
        query.run("SET max_temp_directory_size = '1MB'")
        with pytest.raises(UserError, match=r"outgrew 20MB of memory and the room in .*TMPDIR") as raised:
            query.run(sorting)
        assert "damaged" not in str(raised.value)
        with pytest.raises(UserError, match="TMPDIR"):
            query.copy(
                f"COPY (SELECT hash(range) AS b FROM range(9000000) ORDER BY b) TO '{run[0]}/x.parquet'"
            )


def test_nan_is_left_out_where_statistics_do_not_show_it(tmp_path: Path) -> None:
    """A part without infinities: by the statistics of its file every value is small."""
    directory = tmp_path / "ledger"
    with create_ledger(directory, description()):
        writer = LedgerWriter(directory, 0)
        for step, first in ((1, 1.0), (2, np.nan)):
            writer.append(step, [0, 0], [3, 3 + step], [64, 64], [[first, 2.0], [-1.0, -1.0]])
            writer.append_step(StepRecord(step, target_loss=[3.0 / first, 3.0]))
        commit(directory, 2, writer.write_parts())
        writer.close()
    with Query(Ledger(directory)) as query:
        code, prose = domain_figures(query, [whole_run(2)])
        create_figures(query, Level.sample, whole_run(2))
        best = [ranked(query, Level.sample, target)[0] for target in TARGETS]
    assert (code.samples, code.sum, code.negative_share) == (3, -1.0, 2 / 3)
    assert (prose.samples, prose.sum) == (4, 2.0)
    assert best[0]["relative"] is None  # nor is a loss change that is not finite
    # Although the first target has the sample in one step only.
    assert [(row["sample"], row["samples"], row["value"]) for row in best] == [(3, 1, 1.0), (3, 2, 4.0)]
