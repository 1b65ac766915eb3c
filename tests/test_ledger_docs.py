"""docs/ledger.md says what the code does: columns and types, tolerances, and an example that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from inrun_megatron.ledger import Ledger, audits
from inrun_megatron.ledger.rows import SUM_TOLERANCE
from inrun_megatron.ledger.schema import SCHEMA_VERSION, SCHEMAS
from inrun_megatron.report.values.findings import LARGE_SHARE
from tests.synthetic_ledger import Shape, write_run

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "ledger.md").read_text(encoding="utf-8")


def type_name(kind: pa.DataType) -> str:
    names = {pa.float64(): "float64", pa.string(): "string"}
    return "string, dictionary-encoded" if pa.types.is_dictionary(kind) else names.get(kind, str(kind))


@pytest.mark.parametrize("table", list(SCHEMAS))
def test_every_column_is_documented(table: str) -> None:
    section = TEXT.split(f"## `{table}/`")[1].split("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, flags=re.MULTILINE)
    assert documented == [(field.name, type_name(field.type)) for field in SCHEMAS[table]]


def test_constants_are_those_of_the_code() -> None:
    assert f"`schema_version` is {SCHEMA_VERSION}." in TEXT
    assert audits.ADDITIVITY_TOLERANCE == {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
    assert "1e-4 (fp32) or 2e-2 (bf16, fp16)" in TEXT
    assert audits.EFFICIENCY_RANGE == (1 / 20, 20) and "outside 1/20 to 20" in TEXT
    assert audits.EFFICIENCY_MINIMUM_STEPS == 20 and "at least 20 steps" in TEXT
    assert audits.EFFICIENCY_TREND == 0.25 and "at least a quarter of" in TEXT
    assert SUM_TOLERANCE == 1e-6 and "(1e-6 of the sum" in TEXT
    assert LARGE_SHARE == 0.05 and "more than 5%" in TEXT


def test_every_check_is_documented(tmp_path: Path) -> None:
    write_run(tmp_path, Shape(steps=4))
    section = TEXT.split("## `inrun verify`")[1]
    documented = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert documented == [check.name for check in Ledger(tmp_path).verify()]


def test_the_example_runs(tmp_path: Path) -> None:
    rows = write_run(tmp_path / "RUN" / "shapley", Shape(steps=4))
    code = TEXT.split("```python\n")[1].split("```")[0].replace('"RUN"', repr(str(tmp_path / "RUN")))
    scope: dict = {}
    exec(code, scope)
    assert scope["table"].num_rows == 2 * len(rows)
    assert dict(scope["means"])["code"] == pytest.approx(rows["code"].mean())
