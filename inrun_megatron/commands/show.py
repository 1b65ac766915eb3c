"""`inrun show`: one sample or one document, with its text and its value towards every target."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from inrun_megatron.commands.options import DataOption, JsonOption, PhaseOption, RunArgument, StepsOption
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.documents.attribution import create_document_rows
from inrun_megatron.report.documents.lookup import Documents, dataset_index
from inrun_megatron.report.phases import Phase, choose_steps
from inrun_megatron.report.query import Query
from inrun_megatron.report.tables import console, figure, print_json, signed, table
from inrun_megatron.report.text import printable, shorten


def show(
    run: RunArgument,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="D:K", help="Sample K of dataset D (name or number).")
    ] = None,
    document: Annotated[
        str | None,
        typer.Option("--document", metavar="D:N", help="Document N of dataset D (name or number)."),
    ] = None,
    steps: StepsOption = None,
    phase: PhaseOption = None,
    characters: Annotated[int, typer.Option(help="How much text to print.")] = 600,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """One sample or document: text, source, and its value towards each target.

    Example: inrun show runs/demo --document code:17

    A document's value is its share of the values of the samples it occurs in, in proportion to its tokens in them; where
    the run was scored with --shapley-granularity document or token, it is that of its own tokens.
    """
    if (sample is None) == (document is None):
        raise UserError("give one of --sample D:K and --document D:N")
    if characters < 4:
        raise UserError(f"--characters {characters} shows no text; give 4 or more")
    ledger = Ledger(run)
    chosen = choose_steps(steps, phase, ledger.last_step)
    documents = Documents(ledger, data)
    with Query(ledger) as query:
        if sample is not None:
            record = _sample(query, documents, *_key(ledger, sample, "--sample"), chosen, characters)
        else:
            assert document is not None
            record = _document(query, documents, *_key(ledger, document, "--document"), chosen, characters)
    if json:
        print_json(record)
    else:
        _print(record)


def _key(ledger: Ledger, text: str, option: str) -> tuple[int, int]:
    name, colon, number = text.rpartition(":")
    if not colon or not number.isdecimal():
        raise UserError(f"{option} {text!r} is not DATASET:NUMBER, such as {ledger.dataset_names[0]}:17")
    if int(number) >= 2**63:
        raise UserError(f"{option} {text!r}: no dataset has so many; numbers are below 2**63")
    return dataset_index(ledger, name), int(number)


def _sample(
    query: Query, documents: Documents, dataset: int, sample: int, phase: Phase, characters: int
) -> dict[str, Any]:
    ledger = query.ledger
    rows = query.rows(
        "SELECT s.step, s.target, s.tokens, s.value, s.normalised FROM scored s JOIN targets t ON s.target = t.target "
        f"WHERE s.dataset = {dataset} AND s.sample = {sample} "
        f"AND s.step BETWEEN {phase.first} AND {phase.last} ORDER BY s.step, t.position"
    )
    described = documents.described(dataset)
    by_part = described and ledger.granularity != "sample"
    measured = _measured(query, documents, dataset, sample, phase) if by_part else None
    spans = documents.spans(dataset, sample) if described else []
    total = sum(span.end - span.start for span in spans)
    parts = [
        {
            "document": span.document,
            "start": span.start,
            "end": span.end,
            "share": (span.end - span.start) / total,
            # A document that comes twice has its value at its first span.
            "values": None if measured is None else measured.pop(span.document, {}),
            "source": documents.source(dataset, span.document),
            "text": shorten(documents.text(dataset, span.document, span.start, span.end), characters),
        }
        for span in spans
    ]
    return {
        "run": ledger.run_id,
        "dataset": dataset,
        "dataset_name": ledger.dataset_names[dataset],
        "sample": sample,
        "first_step": phase.first,
        "last_step": phase.last,
        "values": rows,
        "documents": parts,
    }


def _measured(
    query: Query, documents: Documents, dataset: int, sample: int, phase: Phase
) -> dict[int, dict[str, float]]:
    """{document: {target: value}} of one sample that was scored by parts."""
    chosen = f"step BETWEEN {phase.first} AND {phase.last}"
    create_document_rows(query, documents, chosen, dataset, sample=sample)
    rows = query.rows(
        "SELECT r.document, r.target, sum(r.value) AS value FROM document_rows r JOIN targets t ON r.target = t.target "
        "GROUP BY r.document, r.target, t.position ORDER BY t.position"
    )
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["document"], {})[row["target"]] = row["value"]
    return found


def _document(
    query: Query, documents: Documents, dataset: int, document: int, phase: Phase, characters: int
) -> dict[str, Any]:
    ledger = query.ledger
    metadata = documents.metadata(dataset, document)
    create_document_rows(query, documents, f"step BETWEEN {phase.first} AND {phase.last}", dataset, document)
    rows = query.rows(
        "SELECT r.step, r.sample, r.target, r.tokens, r.share, r.sample_value, r.value, r.normalised "
        "FROM document_rows r JOIN targets t ON r.target = t.target "
        f"WHERE r.dataset = {dataset} ORDER BY r.step, r.sample, t.position"
    )
    return {
        "run": ledger.run_id,
        "dataset": dataset,
        "dataset_name": ledger.dataset_names[dataset],
        "document": document,
        "first_step": phase.first,
        "last_step": phase.last,
        "source": documents.source(dataset, document),
        "metadata": metadata,
        "values": rows,
        "text": shorten(documents.text(dataset, document, 0, 4 * characters), characters),
    }


def _print(record: dict[str, Any]) -> None:
    out = console()
    kind = "sample" if "sample" in record else "document"
    out.print(Text(f"{kind.capitalize()} {record['dataset_name']}:{record[kind]}", style="bold"))
    if kind == "document":
        for name, value in record["metadata"].items():
            if name != "document" and value is not None:
                out.print(Text(f"  {name}: {printable(str(value))}"))
    out.print()
    rows = record["values"]
    if not rows:
        out.print(f"No scored row in steps {record['first_step']}-{record['last_step']}.")
    else:
        out.print(_values(rows))
    parts = record["documents"] if kind == "sample" else [record]
    for part in parts:
        if kind == "sample":
            out.print(
                Text(
                    f"\nDocument {record['dataset_name']}:{part['document']}, tokens {part['start']}-{part['end']} "
                    f"({part['share']:.0%} of the sample), {part['source']}",
                    style="bold",
                )
            )
            if part["values"]:
                listed = (f"{target} {_signed(value)}" for target, value in part["values"].items())
                out.print(Text(f"  Value: {', '.join(listed)}"))
        else:
            out.print()
        for line in part["text"].splitlines():
            out.print(Text("  " + printable(line)))


def _signed(value: float) -> str:
    """A value with its sign."""
    return ("+" if value > 0 else "") + figure(value)


def _values(rows: list[dict[str, Any]]) -> Any:
    """One line per target: sum over the rows, and where they are."""
    made = table([("Target", "left"), "Value (nats)", "Normalised", "Samples", "Tokens", ("Steps", "left")])
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        steps = [row["step"] for row in own]
        value = sum(row["value"] for row in own)
        made.add_row(
            Text(target),
            Text(_signed(value), style="green" if value > 0 else "red"),
            signed(sum(row["normalised"] for row in own)),
            f"{len(own):,}",
            f"{sum(row['tokens'] for row in own):,}",
            shorten(", ".join(map(str, steps)), 40),
        )
    return made
