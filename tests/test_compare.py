"""`inrun compare`: runs with known values, on the same data in another order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inrun_megatron.data.corpora import write_corpus
from inrun_megatron.errors import UserError
from inrun_megatron.ledger import LedgerWriter, commit, create_ledger
from tests.command_line import answer
from tests.synthetic_ledger import Shape, blended, description, prepared_datasets, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a; b: the same data in another order, other values of the same rule; c: as a, other values; d: other data."""
    directory = tmp_path_factory.mktemp("runs")
    same = prepared_datasets(directory / "data")
    other_order = prepared_datasets(directory / "data", seed=2)
    other_data = prepared_datasets(directory / "other", documents=13)
    for name, seed, table in (("a", 0, same), ("b", 1, other_order), ("c", 2, same), ("d", 3, other_data)):
        write_run(directory / name / "shapley", Shape(seed=seed), description(table))
    return directory


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties with their mean rank."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def test_documents_of_runs_in_another_order(runs: Path) -> None:
    a, b = runs / "a", runs / "b"
    found = answer("compare", a, b, "--json", "--steps", "21:60")
    scores = []
    for run in (a, b):
        top = answer("top", run, "--steps", "21:60", "--json", "-n", 100, "--target", "code")["targets"][
            "code"
        ]
        scores.append(
            {(row["dataset_name"], row["document"]): row["normalised"] / row["tokens"] for row in top}
        )
    keys = sorted(scores[0].keys() & scores[1].keys())
    one, two = (np.array([side[key] for key in keys]) for side in scores)
    code = found["targets"]["code"]
    assert code["shared"] == len(keys) > 30 and code["same_target"]
    assert code["spearman"] == pytest.approx(np.corrcoef(ranks(one), ranks(two))[0, 1])
    assert code["pearson"] == pytest.approx(np.corrcoef(one, two)[0, 1])
    assert code["same_sign"] == pytest.approx(((one < 0) == (two < 0)).mean())
    # Both follow one rule per domain, so that they agree well but not wholly.
    assert 0.5 < code["spearman"] < 0.999
    change = (ranks(two) - ranks(one)) / len(keys)
    up, down = code["movers"]["up"][0], code["movers"]["down"][0]
    for mover, extreme in ((up, change.max()), (down, change.min())):
        place = keys.index((mover["dataset_a"], mover["document_a"]))
        assert mover["change"] == pytest.approx(extreme) == pytest.approx(change[place])
        assert mover["score_a"] == pytest.approx(one[place]) and mover["score_b"] == pytest.approx(two[place])
        assert mover["document_b"] == mover["document_a"] and mover["snippet"]
        assert mover["source_a"] == mover["source_b"] == f"{mover['dataset_a']}/{mover['document_a']}"
    text = answer("compare", a, b, "--steps", "21:60", "-n", 2)
    assert max(map(len, text.splitlines())) <= 120 and f"Spearman {code['spearman']:+.3f}" in text


def test_samples_of_runs_in_the_same_order(runs: Path) -> None:
    same = answer("compare", runs / "a", runs / "a", "--by", "sample", "--json")["targets"]["prose"]
    assert same["shared"] == same["rows_a"] == 480 and same["top_decile"] == same["bottom_decile"] == 1.0
    assert same["spearman"] == pytest.approx(1.0) and same["movers"] == {"up": [], "down": []}
    other = answer("compare", runs / "a", runs / "c", "--by", "sample", "--json")["targets"]["prose"]
    assert 300 < other["shared"] < 480 and 0.2 < other["spearman"] < 0.95
    with pytest.raises(UserError, match=r"no sample is the same in both runs.*compare by document"):
        answer("compare", runs / "a", runs / "b", "--by", "sample")


@pytest.mark.parametrize("measure", ["value", "relative"])
def test_other_measures(runs: Path, measure: str) -> None:
    arguments = ("compare", runs / "a", runs / "b", "--json", "--measure", measure, "--per", "document")
    movers = answer(*arguments)["targets"]["code"]["movers"]
    top = answer("top", runs / "a", "--json", "-n", 100, "--target", "code")["targets"]["code"]
    scores = {(row["dataset_name"], row["document"]): row[measure] for row in top}
    for mover in (*movers["up"], *movers["down"]):
        assert mover["score_a"] == pytest.approx(scores[mover["dataset_a"], mover["document_a"]])


def test_domains_side_by_side(runs: Path) -> None:
    found = answer("compare", runs / "a", runs / "b", "--json", "--target", "code", "--phase", "3/3")
    rows = {row["name"]: row for row in found["domains"]}
    assert list(found["targets"]) == ["code"] and list(rows) == ["code", "prose", "shuffled"]
    for letter, run in (("a", "a"), ("b", "b")):
        top = answer("top", runs / run, "--by", "dataset", "--target", "code", "--phase", "3/3", "--json")
        for own in top["targets"]["code"]:
            row = rows[own["dataset_name"]]
            mean = own["normalised"] / own["samples"]
            assert row[f"normalised_mean_{letter}"] == pytest.approx(mean)
            assert row[f"samples_{letter}"] == own["samples"]


def test_equal_values_have_no_correlation(tmp_path: Path, runs: Path) -> None:
    table = json.loads((runs / "a/shapley/run.json").read_text())["datasets"]
    with create_ledger(tmp_path / "flat", description(table)):
        writer = LedgerWriter(tmp_path / "flat", 0)
        writer.append(1, [0] * 8, np.arange(8), [64] * 8, np.full((8, 2), 1e-3))
        commit(tmp_path / "flat", 1, writer.write_parts())
    code = answer("compare", tmp_path / "flat", runs / "a", "--by", "sample", "--json")["targets"]["code"]
    assert code["shared"] == 8 and code["spearman"] is None


def one_step(directory: Path, runs: Path, values: list[float]) -> Path:
    """A ledger of one step, of which no realised change is known, with these values towards both targets."""
    table = json.loads((runs / "a/shapley/run.json").read_text())["datasets"]
    with create_ledger(directory, description(table)):
        writer = LedgerWriter(directory, 0)
        n = len(values)
        writer.append(1, [0] * n, np.arange(n), [64] * n, np.repeat(values, 2).reshape(n, 2))
        commit(directory, 1, writer.write_parts())
        writer.close()
    return directory


def test_tenths_are_as_large_at_both_ends_and_zero_has_no_sign(tmp_path: Path, runs: Path) -> None:
    values = [-4.0, -3.0, -2.0, -1.0, 0.0]  # a tenth of five: one
    a, b = one_step(tmp_path / "a", runs, values), one_step(tmp_path / "b", runs, [*values[:-1], 1.0])
    code = answer("compare", a, b, "--by", "sample", "--measure", "value", "--json")["targets"]["code"]
    assert (code["top_decile"], code["bottom_decile"]) == (1.0, 1.0)
    assert code["same_sign"] == 0.8
    swapped = one_step(tmp_path / "c", runs, [values[1], values[0], *values[2:]])
    code = answer("compare", a, swapped, "--by", "sample", "--measure", "value", "--json")["targets"]["code"]
    assert (code["top_decile"], code["bottom_decile"]) == (1.0, 0.0)


def test_relative_values_that_are_not_known_are_named_as_the_reason(tmp_path: Path, runs: Path) -> None:
    a = one_step(tmp_path / "a", runs, [1.0, 2.0])
    message = rf"{a}: no relative values in steps 1-1: .* use normalised values"
    for command in (
        ("compare", runs / "a", a, "--by", "sample", "--measure", "relative"),
        ("top", a, "--by", "sample", "--rank", "relative"),
        ("curate", a, "--drop-bottom", "10", "--measure", "relative", "--dry-run"),
    ):
        with pytest.raises(UserError, match=message):
            answer(*command)


def test_more_movers_than_there_are_numbers(runs: Path) -> None:
    """Beyond what SQL counts to."""
    found = answer("compare", runs / "a", runs / "c", "--by", "sample", "--json", "-n", 2**63)
    code = found["targets"]["code"]
    assert 300 < sum(map(len, code["movers"].values())) <= code["shared"]


def test_texts_of_the_same_lengths_are_different_documents(tmp_path: Path) -> None:
    """Their .idx are equal, and so are the orders in which samples are cut from them."""
    texts = ["first words " * 8, "second, and more of them " * 6]
    prefixes = [
        write_corpus(tmp_path / name, [change(text) for text in texts])
        for name, change in (("as", str), ("upper", str.upper), ("swapped", lambda text: text[::-1]))
    ]
    write_run(tmp_path / "run/shapley", Shape(steps=6), description(blended(prefixes, samples=60)))
    for level, rows in (("document", 6), ("sample", 48)):
        found = answer("compare", tmp_path / "run", tmp_path / "run", "--by", level, "--json")["targets"][
            "code"
        ]
        assert (found["rows_a"], found["shared"]) == (rows, rows)


BAD = [
    (("{runs}/a", "{runs}/d"), "no document was scored in both runs: they read code, prose, shuffled and"),
    (("{runs}/a", "{runs}/b", "--target", "x"), "the runs have no target 'x' in common"),
    (("{runs}/a", "{runs}/b", "--by", "dataset"), "give document or sample"),
    (("{runs}/a", "{runs}/none"), "does not exist"),
    (("{runs}/a", "{runs}/b", "-n", "-1"), "is no number of movers"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(runs: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        answer("compare", *(text.format(runs=runs) for text in arguments))
