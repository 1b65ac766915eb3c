"""`inrun export`: the ledger, or values by sample, document or dataset, as one CSV, JSONL or Parquet file."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from inrun_megatron.commands.options import (
    DataOption,
    JsonOption,
    PhaseOption,
    RunArgument,
    StepsOption,
    TargetOption,
)
from inrun_megatron.commands.targets import chosen_targets
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import replacing
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import choose_steps
from inrun_megatron.report.query import Query, quoted
from inrun_megatron.report.tables import print_json
from inrun_megatron.report.values.ranking import create_figures, keys_of, level_of


class Format(StrEnum):
    """Of the file that is written."""

    csv = "csv"
    jsonl = "jsonl"
    parquet = "parquet"


_COPY_OPTIONS = {
    Format.csv: "FORMAT csv, HEADER",
    Format.jsonl: "FORMAT json",
    Format.parquet: "FORMAT parquet, COMPRESSION zstd",
}


def export(
    run: RunArgument,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="File to write.")],
    format: Annotated[
        Format | None, typer.Option("--format", help="Default: by the suffix of --output.")
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="row: the ledger's rows; or values added up by sample, document, dataset, file, or a field kept by "
            "inrun prepare (source, url, language).",
        ),
    ] = "row",
    target: TargetOption = None,
    steps: StepsOption = None,
    phase: PhaseOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Write values to one file.

    Example: inrun export runs/demo --by document --phase late --output values.csv

    Document values come from sample values: a sample's value is shared among its documents in proportion to their
    tokens in it, unless the run was scored with --shapley-granularity document or token. Rows come out ordered; the
    ledger's own Parquet files can also be read directly (docs/ledger.md).
    """
    path = Path(output).expanduser()
    kind = format or _format_of(path)
    ledger = Ledger(run)
    chosen = choose_steps(steps, phase, ledger.last_step)
    chosen_targets(ledger, target)
    if path.exists() and not path.is_file():
        # A rename would put a file in the place of a device such as /dev/stdout.
        raise UserError(f"{path} is no regular file; choose another --output")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --output, or give --overwrite")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent} is no directory; create it, or choose another --output")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{path.absolute().parent} is not writable; choose another --output")
    with Query(ledger) as query:
        if by == "row":
            where = f"s.step BETWEEN {chosen.first} AND {chosen.last}"
            if target is not None:
                where += f" AND s.target = {quoted(target)}"
            selection = (
                "SELECT s.step, s.dataset, d.name AS dataset_name, s.sample, s.segment, s.target, s.tokens, s.value, "
                f"s.normalised, s.relative FROM parts s JOIN datasets d ON s.dataset = d.dataset WHERE {where} "
                "ORDER BY s.step, s.dataset, s.sample, s.segment, s.target"
            )
        else:
            level = level_of(by)
            create_figures(query, level, chosen, Documents(ledger, data), target)
            selection = f"SELECT * FROM figures ORDER BY {', '.join(keys_of(level))}, target"
        rows = _copy(query, selection, path, kind)
    if json:
        print_json({"run": ledger.run_id, "file": str(path), "format": kind.value, "by": by, "rows": rows})
    else:
        typer.echo(f"{path}: {rows:,} rows by {by}, steps {chosen.first}-{chosen.last}")


def _format_of(path: Path) -> Format:
    suffix = path.suffix.lower().lstrip(".")
    if suffix in Format.__members__:
        return Format(suffix)
    raise UserError(f"--output {path} has no suffix .csv, .jsonl or .parquet; give --format")


def _copy(query: Query, selection: str, path: Path, kind: Format) -> int:
    """Write under a temporary name and rename, so that a broken export leaves no half of a file."""
    try:
        with replacing(path) as temporary:
            return query.copy(f"COPY ({selection}) TO {quoted(str(temporary))} ({_COPY_OPTIONS[kind]})")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
