"""Is the ledger whole, and do its audits hold? Files are checked here, rows in rows.py, values in
audits.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from inrun_megatron.ledger.audits import check_additivity, check_coverage, check_efficiency
from inrun_megatron.ledger.checks import Check, name_some
from inrun_megatron.ledger.columns import places, taken
from inrun_megatron.ledger.files import digest_of, sha256_of
from inrun_megatron.ledger.rows import check_contents, check_duplicates, check_steps, steps_of
from inrun_megatron.ledger.run import own_files
from inrun_megatron.ledger.schema import (
    COMMITS,
    META_RUN,
    META_VERSION,
    SCHEMA_VERSION,
    SCHEMAS,
    STEPS,
    VALUES,
    PartInfo,
    commit_name,
)
from inrun_megatron.wording import counted

if TYPE_CHECKING:
    from inrun_megatron.ledger.read import Ledger


def verify_ledger(ledger: Ledger) -> list[Check]:
    """All checks, integrity first. Parts that are damaged are named once and left out of the checks of
    rows."""
    parts = [part for _, parts in ledger.commits for part in parts]
    whole, files = _check_files(ledger, parts)
    totals, contents = check_contents(ledger, [part for part in whole if part.table == VALUES])
    steps = steps_of(ledger, whole)
    complete = len(whole) == len(parts) and not ledger.damaged
    return [
        _check_commits(ledger),
        files,
        _check_uncommitted(ledger, parts),
        contents,
        check_duplicates(ledger, [part for part in whole if part.table == VALUES], totals),
        check_steps(ledger, steps, totals, complete),
        check_datasets(ledger),
        check_coverage(ledger.run),
        check_additivity(ledger.starts, steps, taken(totals["absolute"].to_numpy(), places(steps, totals))),
        check_efficiency(ledger.run, steps),
    ]


def _check_commits(ledger: Ledger) -> Check:
    figures = {
        "commits": len(ledger.commits),
        "last_step": ledger.last_step,
        "damaged": sorted(ledger.damaged),
    }
    if ledger.damaged:
        return Check(
            "commits",
            False,
            name_some("commit records that are damaged or missing:", sorted(ledger.damaged)),
            figures,
        )
    if not ledger.commits:
        # A run that has not come to its first commit, or whose commits/ is gone: every check below holds of nothing.
        detail = "none yet: the ledger holds no rows that a reader sees"
        return Check("commits", True, detail, figures, note=True)
    return Check(
        "commits",
        True,
        f"{counted(len(ledger.commits), 'commit')}, up to step {ledger.last_step}",
        figures,
    )


def _check_files(ledger: Ledger, parts: list[PartInfo]) -> tuple[list[PartInfo], Check]:
    """Every committed part is there with its bytes; returns those that are."""
    whole: list[PartInfo] = []
    bad: list[str] = []
    counts = Counter(part.file for part in parts)
    bad += [f"{file} (named by {count} commits)" for file, count in counts.items() if count > 1]
    for part in parts:
        fault = _fault(ledger, part)
        if fault is None:
            whole.append(part)
        else:
            bad.append(
                f"{part.file} {fault}: {part.rows:,} rows of steps {part.first_step} to {part.last_step}"
            )
    figures = {"parts": len(parts), "bytes": sum(part.bytes for part in parts), "bad": bad}
    if bad:
        return whole, Check("files", False, name_some("bad parts", bad), figures)
    return whole, Check(
        "files", True, f"{len(parts)} parts, {figures['bytes']:,} bytes, all hashes match", figures
    )


def _fault(ledger: Ledger, part: PartInfo) -> str | None:
    path = ledger.directory / part.file
    try:
        size = path.stat().st_size
        if size < part.bytes:
            return f"truncated ({size:,} of {part.bytes:,} bytes)"
        if size > part.bytes or sha256_of(path) != part.sha256:
            return "altered (sha256 differs)"
        found = pq.ParquetFile(path)
    except FileNotFoundError:
        return "missing"
    except (OSError, pa.ArrowInvalid) as error:
        return f"unreadable ({error})"
    metadata = found.schema_arrow.metadata or {}
    if metadata.get(META_VERSION) != str(SCHEMA_VERSION).encode():
        return f"of schema {metadata.get(META_VERSION)!r}, expected {SCHEMA_VERSION}"
    if metadata.get(META_RUN) != ledger.run_id.encode():
        return f"of another run ({metadata.get(META_RUN)!r})"
    if found.metadata.num_rows != part.rows or not found.schema_arrow.equals(SCHEMAS[part.table]):
        return f"not as committed ({found.metadata.num_rows:,} rows, columns {found.schema_arrow.names})"
    return None


def _check_uncommitted(ledger: Ledger, parts: list[PartInfo]) -> Check:
    named = {part.file for part in parts}
    commits = {commit_name(step) for step, _ in ledger.commits} | set(ledger.damaged)
    found = [
        f"{table}/{path.name}"
        for table in (VALUES, STEPS, COMMITS)
        for path in own_files(ledger.directory, table)
    ]
    extra = [file for file in found if file not in named and file not in commits]
    detail = "none"
    if extra:
        # Not a fault: the normal trace of a crash or of a run that is writing now. With a record lost they may be its parts.
        whose = (
            "of no commit record that can be read:"
            if ledger.damaged
            else "readers ignore them, a resume removes them:"
        )
        detail = name_some(whose, extra)
    return Check("uncommitted", True, detail, {"files": extra})


def check_datasets(ledger: Ledger) -> Check:
    """The datasets that rows refer to are still those of the run: sha256 of each .idx, and pieces of the .bin. Absent files
    are no fault."""
    same, absent, unrecorded, changed = 0, [], [], []
    for dataset in ledger.datasets:
        index, tokens = (Path(f"{dataset.get('path_prefix', '')}{suffix}") for suffix in (".idx", ".bin"))
        if dataset.get("idx_sha256") is None:  # an own loop may know no files
            unrecorded.append(str(dataset.get("name")))
        elif not index.is_file():
            absent.append(str(dataset.get("name")))
        elif sha256_of(index) != dataset["idx_sha256"]:
            changed.append(str(index))
        elif tokens.is_file() and dataset.get("bin_digest") not in (None, digest_of(tokens)):
            changed.append(str(tokens))
        else:
            same += 1
    figures = {"same": same, "absent": absent, "unrecorded": unrecorded, "changed": changed}
    if changed:
        return Check("datasets", False, name_some("data files changed since the run:", changed), figures)
    detail = f"{counted(same, 'dataset')} unchanged since the run"
    if absent:
        detail += f"; not found from here: {', '.join(absent)}"
    if unrecorded:
        detail += f"; recorded without files: {', '.join(unrecorded)}"
    return Check("datasets", True, detail, figures)
