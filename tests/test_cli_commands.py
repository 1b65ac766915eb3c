"""The commands, run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from inrun_megatron import cli
from inrun_megatron.ledger import Ledger, LedgerWriter, commit, create_ledger
from inrun_megatron.report.summary.figures import build_summary, print_summary
from inrun_megatron.report.tables import decimals_of, scale_near, scale_of, with_error
from tests.command_line import inrun
from tests.synthetic_ledger import TARGETS, Shape, description, prepared_datasets, write_run

COMMANDS = tuple(command.callback.__name__ for command in cli.app.registered_commands if command.callback)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    directory = tmp_path_factory.mktemp("run")
    table = prepared_datasets(directory / "data")
    return directory, write_run(directory / "shapley", Shape(), description(table))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = inrun(command, "--help")
    assert result.code == 0 and f"Example: inrun {command} " in result.out


def test_version() -> None:
    result = inrun("--version")
    assert result.code == 0 and re.fullmatch(r"inrun-megatron (\d+\.\d+\S*|unknown)\n", result.out)


def test_no_command_is_help() -> None:
    result = inrun()
    assert result.code == 0 and all(command in result.out for command in COMMANDS)


def test_summary_tells_the_story(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    result = inrun("summary", directory)
    assert result.code == 0 and result.err == ""
    assert max(map(len, result.out.splitlines())) <= 100 and "\x1b" not in result.out
    for text in (
        "Target code",
        "Target prose",
        "early",
        "middle",
        "late",
        "21-60",
        "additivity",
        "3 layers, hidden 64",
    ):
        assert text.replace("3 layers", "2 layers") in result.out
    late = rows[rows["step"] > 20]
    share = (late["code"][late["dataset"] == 2] < 0).mean()
    assert re.search(rf"shuffled \({share:.0%} of its samples\s+negative\)", result.out)
    assert re.search(r"best +[+]\d", result.out) and re.search(r"worst +-\d", result.out)


def test_a_summary_has_one_unit(run: tuple[Path, np.ndarray]) -> None:
    units = re.findall(r"nats x 1e[+-]\d\d", inrun("summary", run[0]).out)
    assert len(units) == 4 and len(set(units)) == 1  # domains and documents of both targets
    given = (1e-4, "x 1e-04")
    assert scale_near([-0.9, 0.2], given) == given  # 9,000 units
    assert scale_of([5e-324]) == (1.0, "")
    assert scale_near([2.0], given) == scale_of([2.0]) and scale_near([9e-5], given) == scale_of([9e-5])


def test_an_error_keeps_a_digit() -> None:
    assert with_error(0.12, 0.0034, 1.0).plain == "+0.120 ± 0.003"
    assert (
        with_error(14.7, 0.96, 1.0).plain == "+14.70 ± 0.96" and with_error(1.0, None, 1.0).plain == "+1.00"
    )
    assert (
        decimals_of(0.5, 0.004, None) == 3 and decimals_of(1e-9) == 4 and decimals_of(0.0, float("nan")) == 2
    )


def test_summary_as_json(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    figures = inrun("summary", directory / "shapley", "--json", "--phases", "1/2", "-n", 2).json
    assert [(phase["first"], phase["last"]) for phase in figures["phases"]] == [(1, 30), (31, 60)]
    whole = [row for row in figures["domains"] if row["phase"] == "whole run" and row["target"] == "code"]
    assert sum(row["sum"] for row in whole) == pytest.approx(rows["code"].sum())
    assert all(audit["ok"] for audit in figures["audits"])
    found = figures["documents"]["prose"]
    assert len(found["best"]) == len(found["worst"]) == 2
    assert found["best"][0]["value"] > found["best"][1]["value"] > found["worst"][0]["value"]
    assert found["worst"][0]["source"] == f"shuffled/{found['worst'][0]['document']}"
    target = figures["targets"][0]
    assert target["first_loss"] == 5.5 and target["explained_fraction"] == pytest.approx(1.09 / 0.9, rel=1e-6)


def test_one_sample_that_rules_a_mean_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with create_ledger(tmp_path, description()):
        writer = LedgerWriter(tmp_path, 0)
        for step in range(1, 61):
            values = np.full((8, len(TARGETS)), -1e-3)
            if step == 40:
                values[3, 0] = 1.0
            writer.append(step, [2] * 8, np.arange(8) + 8 * step, [64] * 8, values)
        commit(tmp_path, 60, writer.write_parts())
    summary = build_summary(tmp_path, documents=0)
    assert summary["largest"]["code"]["sample"] == 8 * 40 + 3
    assert summary["largest"]["code"]["share"] == pytest.approx(1 / (1 + 319e-3))
    print_summary(tmp_path, documents=0)
    code, prose = " ".join(capsys.readouterr().out.split()).split("Target prose")
    assert "One sample, shuffled:323 in step 40, has +1: 76%" in code and "One sample" not in prose
    late = next(row for row in summary["domains"] if row["phase"] == "late" and row["target"] == "code")
    # The raw mean has been turned round by it, the normalised one has not.
    assert late["mean"] > 0 > late["normalised_mean"] and "two standard errors: shuffled" in code


def test_summary_without_the_data(tmp_path: Path) -> None:
    described = description(
        [{"name": n, "index": i, "path_prefix": f"/gone/{n}"} for i, n in enumerate("abc")]
    )
    write_run(tmp_path / "shapley", Shape(steps=6), described)
    result = inrun("summary", tmp_path)
    assert (
        result.code == 0 and "Documents cannot be shown: /gone/" in result.out and "Target code" in result.out
    )


def test_a_dataset_table_without_files(tmp_path: Path) -> None:
    """As a run in somebody's own loop may write it: name and index of each dataset."""
    write_run(tmp_path / "shapley", Shape(steps=6))
    result = inrun("summary", tmp_path)
    assert result.code == 0 and "Documents cannot be shown: run.json says no path_prefix" in result.out
    assert inrun("top", tmp_path, "--by", "sample").code == 0
    assert inrun("report", tmp_path, "--json").json["documents"] is None
    shown = inrun("show", tmp_path, "--sample", "code:1", "--json").json
    assert shown["values"] and shown["documents"] == []
    for arguments in (("top",), ("show", "--document", "code:1"), ("curate", "--drop-negative", "--dry-run")):
        refused = inrun(arguments[0], tmp_path, *arguments[1:])
        assert refused.code == 1 and refused.err.count("\n") == 1
        assert "of dataset code, so that its samples lead to no documents" in refused.err


def test_print_summary_of_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, Shape(steps=1))
    print_summary(tmp_path, documents=0)
    assert "Steps 1-1" in capsys.readouterr().out
    assert build_summary(tmp_path, documents=0)["domains"][0]["standard_error"] is None


def test_top(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    arguments = ("top", directory, "--target", "code", "--worst", "-n", 3, "--steps", "21:60")
    figures = inrun(*arguments, "--by", "sample", "--json").json
    expected = np.sort(rows[rows["step"] > 20], order="code")[:3]
    assert [row["sample"] for row in figures["targets"]["code"]] == expected["sample"].tolist()
    assert list(figures["targets"]) == ["code"] and all(row["snippet"] for row in figures["targets"]["code"])
    text = inrun(*arguments)
    assert (
        text.code == 0
        and "Worst documents for target code, steps 21-60" in text.out
        and "shuffled:" in text.out
    )
    both = inrun("top", directory, "--by", "dataset", "--phase", "3/3", "--rank", "per-token").out
    assert all(f"for target {target}, steps 41-60, by per-token" in both for target in TARGETS)
    assert len(re.findall(r"nats x 1e[+-]\d\d", both)) == 4  # sum and mean of both targets


def test_an_output_that_is_not_utf_8(run: tuple[Path, np.ndarray]) -> None:
    """Errors of means have a sign that ASCII lacks."""
    command = [sys.executable, "-m", "inrun_megatron.cli", "summary", str(run[0]), "-n", "0"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (
        done.returncode == 0 and done.stderr == "" and "Target prose" in done.stdout and " ? " in done.stdout
    )


def test_top_says_what_rules_its_sums(run: tuple[Path, np.ndarray]) -> None:
    note = "Early steps rule sums over a whole run"
    assert note in inrun("top", run[0]).out
    for flags in (("--phase", "late"), ("--steps", "1:9"), ("--rank", "normalised"), ("--json",)):
        assert note not in inrun("top", run[0], *flags).out


def test_top_has_one_unit_for_all_targets(run: tuple[Path, np.ndarray]) -> None:
    units = re.findall(r"x 1e[+-]\d\d", inrun("top", run[0], "--by", "dataset").out)
    assert len(units) == 4 and len(set(units)) == 1  # sums and means of both targets
    units = re.findall(r"x 1e[+-]\d\d", inrun("top", run[0], "--by", "document").out)
    assert len(units) == 4 and units[:2] == units[2:]  # per token is far from the sums


def test_show_sample_and_document(run: tuple[Path, np.ndarray]) -> None:
    directory, rows = run
    row = rows[rows["dataset"] == 2][4]
    figures = inrun("show", directory, "--sample", f"shuffled:{row['sample']}", "--json").json
    assert [value["value"] for value in figures["values"]] == [row["code"], row["prose"]]
    assert sum(part["share"] for part in figures["documents"]) == pytest.approx(1.0)
    part = figures["documents"][0]
    text = inrun("show", directory, "--sample", f"2:{row['sample']}")
    assert text.code == 0 and part["text"].strip().splitlines()[0] in text.out

    top = inrun("top", directory, "--by", "document", "--target", "prose", "-n", 1, "--json").json
    best = top["targets"]["prose"][0]
    shown = inrun(
        "show", directory, "--document", f"{best['dataset_name']}:{best['document']}", "--json"
    ).json
    total = sum(value["value"] for value in shown["values"] if value["target"] == "prose")
    assert total == pytest.approx(best["value"], rel=1e-9)
    assert shown["metadata"]["domain"] == best["dataset_name"] and shown["text"].startswith(
        best["snippet"][:20]
    )
    assert (
        "Value (nats)" in inrun("show", directory, "--document", f"{best['dataset']}:{best['document']}").out
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_export_of_rows(run: tuple[Path, np.ndarray], tmp_path: Path, suffix: str) -> None:
    directory, rows = run
    file = tmp_path / f"rows.{suffix}"
    result = inrun("export", directory, "--output", file, "--target", "code", "--json")
    assert result.json["rows"] == len(rows) and [path.name for path in tmp_path.iterdir()] == [file.name]
    if suffix == "parquet":
        values = pq.read_table(file)["value"].to_pylist()
    elif suffix == "jsonl":
        values = [json.loads(line)["value"] for line in file.read_text().splitlines()]
    else:
        lines = file.read_text().splitlines()
        assert lines[0] == "step,dataset,dataset_name,sample,segment,target,tokens,value,normalised,relative"
        values = [float(line.split(",")[7]) for line in lines[1:]]
    assert values == np.sort(rows, order=["step", "dataset", "sample"])["code"].tolist()


def test_export_of_documents(run: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    directory, rows = run
    inrun("export", directory, "--by", "document", "--phase", "2/3", "-o", tmp_path / "d.parquet")
    table = pq.read_table(tmp_path / "d.parquet")
    middle = rows[(rows["step"] > 20) & (rows["step"] <= 40)]
    assert sum(table["value"].to_pylist()) == pytest.approx(sum(middle[target].sum() for target in TARGETS))


def test_moved_data(run: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    directory, _ = run
    copy = Path(shutil.copytree(directory, tmp_path / "moved"))
    record = json.loads((copy / "shapley" / "run.json").read_text())
    for dataset in record["datasets"]:
        dataset["path_prefix"] = "/gone/" + dataset["name"]
    (copy / "shapley" / "run.json").write_text(json.dumps(record))
    refused = inrun("top", copy, "-n", 1)
    assert refused.code == 1 and "/gone/code.idx does not exist" in refused.err
    found = inrun(
        "top", copy, "-n", 1, *(f"--data={name}={copy}/data/{name}" for name in ("code", "prose", "shuffled"))
    )
    assert found.code == 0


def test_verify(run: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    directory, _ = run
    good = inrun("verify", directory)
    assert good.code == 0 and "all 10 checks passed" in good.out
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    part = next((copy / "shapley" / "values").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    bad = inrun("verify", copy)
    assert bad.code == 1 and "FAILED" in bad.out and "truncated" in bad.out and bad.err == ""
    figures = inrun("verify", copy, "--json")
    assert figures.code == 1 and figures.json["ok"] is False
    part.unlink()
    broken = inrun("top", copy, "--by", "dataset")
    assert broken.code == 1 and "`inrun verify` names damaged parts" in broken.err


def test_more_rows_than_there_are_numbers_are_all_rows(run: tuple[Path, np.ndarray]) -> None:
    """Beyond what SQL counts to."""
    found = inrun("top", run[0], "--by", "sample", "--json", "-n", 2**63)
    assert found.code == 0 and len(found.json["targets"]["code"]) == len(run[1])


BAD = [
    (("top", "{run}", "--target", "x"), "the run has no target 'x'; it has code, prose"),
    (("top", "{run}", "--by", "word"), "has the field 'word'"),
    (("top", "{run}", "--steps", "9:1"), "--steps '9:1' holds no step"),
    (("top", "{run}", "-n", "0"), "-n 0 shows nothing"),
    (("summary", "{run}", "-n", "-1"), "-n -1 is no number"),
    (("show", "{run}", "--sample", "code:1", "--characters", "1"), "--characters 1 shows no text"),
    (("top",), "Missing argument 'RUN'"),
    (("top", "{run}", "--bogus"), "No such option"),
    (("top", "{tmp}/nowhere"), "does not exist"),
    (("verify", "{tmp}"), "holds no ledger"),
    (("summary", "{empty}"), "has no committed step: no step is scored"),
    (("top", "{empty}"), "has no committed step: no step is scored"),
    (("summary", "{run}", "--phases", "x"), "not a list of fractions"),
    (("summary", "{run}", "--phases", "1/2,1/3"), "--phases 1/2,1/3: cuts must be increasing fractions"),
    (("show", "{run}"), "give one of --sample D:K and --document D:N"),
    (("show", "{run}", "--sample", "x:1"), "no dataset 'x'; it has 0 (code), 1 (prose), 2 (shuffled)"),
    (("show", "{run}", "--sample", "code"), "--sample 'code' is not DATASET:NUMBER"),
    (("show", "{run}", "--sample", "code:999999"), "not 999999"),
    (("show", "{run}", "--document", "code:999999"), "not 999999"),
    (("show", "{run}", "--sample", f"code:{2**63}"), "numbers are below 2**63"),
    (("show", "{run}", "--document", f"code:{2**63}"), "numbers are below 2**63"),
    (
        ("report", "{run}", "-n", "0", "-o", "{run}/shapley/run.json/x.html"),
        "Not a directory; choose another --output",
    ),
    (("verify", "x" * 300), "File name too long"),
    (("export", "{run}", "-o", "{tmp}/x.xls"), "no suffix .csv, .jsonl or .parquet"),
    (("export", "{run}", "-o", "{tmp}/none/x.csv"), "is no directory"),
    (("export", "{run}", "-o", "{run}/shapley/run.json", "--format", "csv"), "exists; choose another"),
    (
        ("export", "{run}", "-o", "{run}", "--format", "csv", "--overwrite"),
        "is no regular file; choose another",
    ),
    (("top", "{run}", "--data", "code"), "is not NAME=PREFIX"),
    (("summary", "{run}", "--data", "x=y"), "no dataset 'x'; it has 0 (code), 1 (prose), 2 (shuffled)"),
    (("report", "{run}", "--data", "x=y", "-o", "{tmp}/x.html"), "the run has no dataset 'x'"),
    (("bogus",), "inrun: No such command 'bogus'; see inrun --help"),
    (("top", "{run}", "--rank", "x"), "Invalid value for '--rank': 'x' is not one of 'value', 'mean'"),
    (
        ("prepare", "{run}", "-o", "{tmp}/x", "--workers", "0"),
        "--workers is 0: use 1 for one process, or more",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_1(
    run: tuple[Path, np.ndarray],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    empty = tmp_path / "empty"
    create_ledger(empty, description()).close()
    assert Ledger(empty).last_step == 0
    result = inrun(*(text.format(run=run[0], tmp=tmp_path, empty=empty) for text in arguments))
    assert result.code == 1 and result.out == ""
    assert message in result.err and result.err.count("\n") == 1 and result.err.startswith("inrun")
