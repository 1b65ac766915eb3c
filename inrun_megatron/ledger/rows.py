"""Checks of the rows: contents, duplicates, agreement with the step records.

Memory is bounded: rows are read part by part, duplicates are sought in ranges of steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from inrun_megatron.ledger.checks import NAMED, Check, name_some, setting
from inrun_megatron.ledger.columns import equals, integers, is_known, numbers, places, taken, texts
from inrun_megatron.ledger.schema import SCHEMAS, SCORED, STEPS, VALUES, PartInfo
from inrun_megatron.ledger.step_table import with_realised

if TYPE_CHECKING:
    from inrun_megatron.ledger.read import Ledger

SUMMED_ROWS = 1 << 20
"""Sums by part, step and target that are held before they are added up."""

SUM_TOLERANCE = 1e-6
"""Sum of a step's rows against its recorded sum_values, relative to the sum of |values|: both are fp64
sums."""

DUPLICATE_RANGE_ROWS = 1 << 21
"""Rows that the search for duplicates holds in memory at a time."""


TOTALS = pa.schema(
    [
        ("step", pa.int64()),
        ("target", pa.string()),
        ("rows", pa.int64()),
        ("samples", pa.int64()),
        ("total", pa.float64()),
        ("absolute", pa.float64()),
    ]
)
"""Of each (step, target), from the rows themselves: rows, samples (rows with segment 0: every sample has one), sum of
values and sum of |values|."""


def check_contents(ledger: Ledger, parts: list[PartInfo]) -> tuple[pa.Table, Check]:
    """Values finite, names and indices known, steps inside the part's range; and TOTALS."""
    sums, bad = _Sums(), []
    rows = not_finite = 0
    datasets = len(ledger.run["datasets"])
    targets = pa.array(ledger.target_names)
    for part in parts:
        faults: Counter[str] = Counter()
        for batch in pq.ParquetFile(ledger.directory / part.file).iter_batches(1 << 20):
            table = pa.table(batch)
            value = table["value"]
            finite = pc.is_finite(value)
            inside = pc.and_(
                pc.greater_equal(table["step"], part.first_step), pc.less_equal(table["step"], part.last_step)
            )
            known = pc.and_(pc.greater_equal(table["dataset"], 0), pc.less(table["dataset"], datasets))
            names = pc.cast(table["target"], pa.string())
            for what, good in (
                ("values that are not finite", finite),
                ("steps outside the part's range", inside),
                ("unknown dataset indices", known),
                ("unknown targets", pc.is_in(names, targets)),
                ("negative sample indices", pc.greater_equal(table["sample"], 0)),
                ("negative segments", pc.greater_equal(table["segment"], 0)),
            ):
                faults[what] += table.num_rows - (pc.sum(good).as_py() or 0)
            rows += table.num_rows
            first = pc.equal(table["segment"], 0)
            sums.add(table["step"], names, pc.if_else(finite, value, 0.0), first)
        not_finite += faults["values that are not finite"]
        bad += [f"{part.file}: {count:,} {what}" for what, count in faults.items() if count]
    totals = sums.totals()
    figures = {"rows": rows, "not_finite": not_finite, "bad": bad}
    if bad:
        return totals, Check("rows", False, name_some("bad rows:", bad), figures)
    return totals, Check("rows", True, f"{rows:,} rows, all finite, all names and indices known", figures)


class _Sums:
    """Sums by step and target, as tables until the end: a row of Python for each part, step and target would take hours
    where many ranks have written."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._rows = 0

    def add(self, step: pa.ChunkedArray, target: pa.ChunkedArray, value: pa.ChunkedArray, first: Any) -> None:
        columns = {
            "step": step,
            "target": target,
            "rows": pa.array(np.ones(len(step), np.int64)),
            "samples": pc.cast(first, pa.int64()),
            "total": value,
            "absolute": pc.abs(value),
        }
        self._keep(_added(pa.table(columns)))
        if self._rows > SUMMED_ROWS:
            self._keep(self._taken())

    def totals(self) -> pa.Table:
        return self._taken().cast(TOTALS) if self._tables else TOTALS.empty_table()

    def _keep(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._rows += table.num_rows

    def _taken(self) -> pa.Table:
        table, self._tables, self._rows = _added(pa.concat_tables(self._tables)), [], 0
        return table


def _added(table: pa.Table) -> pa.Table:
    names = ["rows", "samples", "total", "absolute"]
    grouped = table.group_by(["step", "target"]).aggregate([(name, "sum") for name in names])
    return grouped.select(["step", "target", *(f"{name}_sum" for name in names)]).rename_columns(
        ["step", "target", *names]
    )


def check_duplicates(ledger: Ledger, parts: list[PartInfo], totals: pa.Table) -> Check:
    """No (step, dataset, sample, target) twice: the last defence against a resume that kept what it
    repeats."""
    keys = ["step", "dataset", "sample", "segment", "target"]
    count, named = 0, []
    for first, last in _step_ranges(totals):
        # Not all parts: their number grows with the run, and so does that of the ranges.
        paths = [
            str(ledger.directory / part.file)
            for part in parts
            if part.first_step <= last and part.last_step >= first
        ]
        if not paths:
            continue  # rows outside their part's range, which is a fault of its own
        table = (
            ds.dataset(paths, schema=SCHEMAS[VALUES], format="parquet")
            .to_table(columns=keys, filter=(ds.field("step") >= first) & (ds.field("step") <= last))
            .unify_dictionaries()
        )
        table = table.set_column(4, "target", pc.cast(table["target"], pa.string()))
        grouped = table.append_column("n", pa.array(np.ones(table.num_rows, np.int64)))
        grouped = grouped.group_by(keys).aggregate([("n", "sum")])
        twice = grouped.filter(pc.greater(grouped["n_sum"], 1))
        count += twice.num_rows
        named += [
            f"step {row['step']} dataset {row['dataset']} sample {row['sample']} segment {row['segment']} "
            f"target {row['target']} "
            f"({row['n_sum']} times)"
            for row in twice.slice(0, NAMED).to_pylist()
        ]
    figures = {"duplicates": count, "first": named[:NAMED]}
    if count:
        return Check(
            "duplicates", False, f"{count:,} keys more than once: {'; '.join(named[:NAMED])}", figures
        )
    return Check("duplicates", True, "every (step, dataset, sample, segment, target) once", figures)


def _step_ranges(totals: pa.Table) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of steps with at most DUPLICATE_RANGE_ROWS rows each (or one step)."""
    steps, places_of = np.unique(integers(totals, "step"), return_inverse=True)
    rows = np.bincount(places_of, integers(totals, "rows")).astype(np.int64)
    per_step = dict(zip(steps.tolist(), rows.tolist(), strict=True))
    first: int | None = None
    last = held = 0
    for step in per_step:
        if first is not None and held + per_step[step] > DUPLICATE_RANGE_ROWS:
            yield first, last
            first, held = None, 0
        first = step if first is None else first
        last = step
        held += per_step[step]
    if first is not None:
        yield first, last


def steps_of(ledger: Ledger, whole: list[PartInfo]) -> pa.Table:
    """Rows of steps/, from the whole parts only."""
    tables = [
        pq.read_table(ledger.directory / part.file, partitioning=None)
        for part in whole
        if part.table == STEPS
    ]
    if not tables:
        return SCHEMAS[STEPS].empty_table()
    table = pa.concat_tables(table.cast(SCHEMAS[STEPS]) for table in tables).unify_dictionaries()
    return with_realised(table, ledger.target_names)


def _due(ledger: Ledger, step: int) -> bool:
    interval = int(setting(ledger.starts.at(step), "interval", 0, group="shapley") or 0)
    return bool(interval) and step % interval == 0 and not ledger.starts.without_scoring(step)


def check_steps(ledger: Ledger, steps: pa.Table, totals: pa.Table, complete: bool) -> Check:
    """Step records and rows tell the same story; no step is missing."""
    step, target = integers(steps, "step"), texts(steps, "target")
    scored, place = equals(steps, "status", SCORED), places(steps, totals)
    rows, total, absolute = (
        taken(totals[name].to_numpy(), place) for name in ("samples", "total", "absolute")
    )
    expected, recorded = np.where(scored, integers(steps, "samples"), 0), numbers(steps, "sum_values")
    other_rows = rows != expected
    # "Not within", so that a NaN fails.
    other_sum = (
        scored & is_known(steps, "sum_values") & ~(np.abs(total - recorded) <= SUM_TOLERANCE * absolute)
    )
    bad = [
        f"step {step[i]} target {target[i]}: "
        + (
            f"{rows[i]} rows, {expected[i]} recorded"
            if other_rows[i]
            else f"rows sum to {total[i]}, recorded {recorded[i]}"
        )
        for i in np.flatnonzero(other_rows | other_sum)
    ]
    records = steps.group_by(["step", "target"]).aggregate([([], "count_all")])
    twice = records.filter(pc.greater(records["count_all"], 1))
    bad += [
        f"step {row['step']} target {row['target']}: {row['count_all']} records" for row in twice.to_pylist()
    ]
    alone = totals.filter(pa.array(places(totals, steps) < 0))
    bad += [
        f"step {row['step']} target {row['target']}: rows without a step record" for row in alone.to_pylist()
    ]
    statuses = dict(zip(step.tolist(), texts(steps, "status").tolist(), strict=True))
    # From the first record on, as a run that continues another one's checkpoint begins in the middle; to the newest commit.
    last = max((*statuses, *(committed for committed, _ in ledger.commits)), default=0)
    covered = range(min(statuses), last + 1) if statuses else range(0)
    missing = [number for number in covered if number not in statuses and _due(ledger, number)]
    if missing:
        bad.append(f"no record of {len(missing)} steps (first: {missing[0]})")
    kinds = Counter(status for status in statuses.values())
    figures = {"statuses": dict(kinds), "missing_steps": missing, "bad": bad}
    story = ", ".join(f"{count:,} {status}" for status, count in kinds.most_common()) or "no steps"
    if bad and not complete:
        return Check(
            "steps", False, f"parts are damaged, so {len(bad):,} records do not match ({story})", figures
        )
    if bad:
        return Check("steps", False, name_some("records do not match rows:", bad), figures)
    return Check("steps", True, f"{story}; rows and sums match", figures)
