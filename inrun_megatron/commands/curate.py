"""`inrun curate`: from values to the data of the next run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from inrun_megatron.commands.options import DataOption, JsonOption, PhaseOption, RunArgument, StepsOption
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.ledger.schema import now
from inrun_megatron.report.curation.blend import blend_weights
from inrun_megatron.report.curation.candidates import KEPT, UNJUDGED, Candidates, lowest, read_candidates
from inrun_megatron.report.curation.decisions import decide, domain_record
from inrun_megatron.report.curation.files import check_output, data_path, output_names, pasted, write_curation
from inrun_megatron.report.curation.rules import Blend, Rules, Unit
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import choose_steps
from inrun_megatron.report.query import Query
from inrun_megatron.report.tables import console, figure, print_json, signed, table
from inrun_megatron.report.text import shorten
from inrun_megatron.report.values.ranking import Level
from inrun_megatron.report.values.scores import Measure, Per, create_scores, parse_weights


def curate(
    run: RunArgument,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", help="Directory to write; not with --dry-run."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, with examples; write nothing.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME[=WEIGHT]",
            help="Targets that count, repeatable. Default: all, weight 1.",
        ),
    ] = None,
    measure: Annotated[
        Measure, typer.Option(help="Values that are added up; normalised: every step weighs the same.")
    ] = Measure.normalised,
    per: Annotated[Per, typer.Option(help="What a document's sum is divided by.")] = Per.token,
    drop_negative: Annotated[
        bool, typer.Option("--drop-negative", help="Drop documents with a score below 0.")
    ] = False,
    drop_bottom: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Drop the lowest so many per cent.")
    ] = None,
    keep_top: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Keep the highest so many per cent.")
    ] = None,
    percent_of: Annotated[Unit, typer.Option(help="What the percentages count.")] = Unit.documents,
    per_dataset: Annotated[
        bool, typer.Option("--per-dataset", help="Percentages within each dataset, not over all.")
    ] = False,
    min_samples: Annotated[
        int, typer.Option(help="Judge only documents that so many scored samples contain.")
    ] = 1,
    drop_unjudged: Annotated[
        bool, typer.Option("--drop-unjudged", help="Drop documents with less evidence; else they stay.")
    ] = False,
    blend: Annotated[
        Blend,
        typer.Option(help="Weights of the datasets: by tokens left, kept as they were, or moved by value."),
    ] = Blend.tokens,
    strength: Annotated[float, typer.Option(help="How far --blend value moves weights.")] = 1.0,
    smoothing: Annotated[
        float, typer.Option(help="Share of the blend that --blend value leaves as it was.")
    ] = 0.1,
    examples: Annotated[int, typer.Option(help="Documents to show of each dataset.")] = 3,
    steps: StepsOption = None,
    phase: PhaseOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a directory that inrun curate wrote.")
    ] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Choose documents by value and write the data of the next run: filtered .bin/.idx, a keep list, --data-path.

    Example: inrun curate runs/demo --target code=2 --target prose --drop-bottom 10 --phase late --dry-run

    The unit is the document. Its score is the weighted sum of its values towards the targets, normalised and per token.
    Documents that no rule drops stay, also those without a scored sample. Documents outside the run's training split are
    left out of what is written, so that none of them moves into training (docs/curation.md).
    """
    if (output is None) == (not dry_run):
        raise UserError("give one of --output DIR and --dry-run")
    if examples < 0:
        raise UserError(f"--examples {examples} is no number of documents; give 0 or more")
    rules = Rules(
        drop_negative=drop_negative,
        drop_bottom=drop_bottom,
        keep_top=keep_top,
        unit=percent_of,
        per_dataset=per_dataset,
        minimum_samples=min_samples,
        drop_unjudged=drop_unjudged,
        blend=blend,
        strength=strength,
        smoothing=smoothing,
    )
    ledger = Ledger(run)
    chosen = choose_steps(steps, phase, ledger.last_step)
    weights = parse_weights(ledger, target or ())
    documents = Documents(ledger, data)
    directory = None if output is None else Path(output).expanduser().absolute()
    if directory is not None:
        read = [documents.resolver.file(index).prefix for index in range(len(ledger.datasets))]
        check_output(directory, overwrite, read)
    with Query(ledger) as query:
        create_scores(query, Level.document, chosen, weights, measure, per, documents)
        found = read_candidates(query, documents)
    decide(found, rules)
    record: dict[str, Any] = {
        "run": ledger.run_id,
        "ledger": str(ledger.directory),
        "created": now(),
        "first_step": chosen.first,
        "last_step": chosen.last,
        "targets": weights,
        "measure": measure.value,
        "per": per.value,
        "rules": rules.to_dict(),
        **_figures(documents, found, rules, directory, ledger),
    }
    shown = [
        {
            "dropped": lowest(documents, found, index, (own.fate != KEPT) & own.judged, examples),
            "lowest_kept": lowest(documents, found, index, own.kept & own.judged, examples),
        }
        for index, own in enumerate(found)
    ]
    left = [] if directory is None else write_curation(directory, documents, found, record)
    if json:
        rows = [row | {"examples": own} for row, own in zip(record["datasets"], shown, strict=True)]
        print_json(record | {"dry_run": dry_run, "datasets": rows, "not_carried_over": left})
    else:
        _print(record, shown, directory, left)


def _figures(
    documents: Documents,
    found: list[Candidates],
    rules: Rules,
    directory: Path | None,
    ledger: Ledger,
) -> dict[str, Any]:
    """Figures per dataset, the blend and the split."""
    before, after = blend_weights(found, rules)
    # Without a dropped document nothing is rewritten, and the run's own split keeps its meaning.
    rewriting = any((own.fate >= UNJUDGED).any() for own in found)
    rows, prefixes = [], []
    for index, (own, file) in enumerate(zip(found, output_names(ledger.dataset_names), strict=True)):
        rewritten = rewriting and not own.kept.all() and bool(own.kept.any())
        source = str(Path(documents.resolver.file(index).prefix).absolute())
        prefix = str((directory or Path("DIR")) / file) if rewritten else source
        prefixes.append(prefix)  # with nothing left the weight is 0, and the data path leaves it out
        row = domain_record(own, before[index], after[index])
        rows.append(row | {"file": file, "prefix": prefix, "source": source, "rewritten": rewritten})
    split = "100,0,0" if rewriting else str(ledger.datasets[0]["description"]["split"])
    return {"datasets": rows, "data_path": data_path(prefixes, after), "split": split}


def _print(
    record: dict[str, Any], shown: list[dict[str, Any]], directory: Path | None, left: list[str]
) -> None:
    out = console()
    targets = ", ".join(f"{name} x {weight:g}" for name, weight in record["targets"].items())
    verb = "Would keep" if directory is None else "Kept"
    head = f"{verb} by {record['measure']} value per {record['per']}, steps {record['first_step']}-{record['last_step']}"
    out.print(Text(f"{head}, towards {targets}", style="bold"))
    made = table(
        [
            ("Dataset", "left"),
            "Documents",
            "Judged",
            "Dropped",
            "Tokens\nleft",
            "Score\nbefore",
            "\nafter",
            "Weight\nbefore",
            "\nafter",
        ]
    )
    for row in record["datasets"]:
        dropped = sum(own["documents"] for own in row["dropped"].values())
        made.add_row(
            Text(shorten(row["name"], 24)),
            f"{row['documents']:,}",
            f"{row['judged']:,}",
            f"{dropped:,}",
            f"{row['kept_tokens'] / max(row['tokens'], 1):.1%}",
            figure(row["score_before"], 3),
            figure(row["score_after"], 3),
            f"{row['weight_before']:.4f}",
            f"{row['weight_after']:.4f}",
        )
    out.print(made)
    for row, own in zip(record["datasets"], shown, strict=True):
        reasons = ", ".join(
            f"{part['documents']:,} {reason}" for reason, part in row["dropped"].items() if part["documents"]
        )
        held_out = f"; {row['held_out']:,} outside the training split left out" if row["held_out"] else ""
        out.print(Text(f"\n{row['name']}: {reasons or 'nothing goes'}{held_out}", style="bold"))
        for title, documents in (("goes", own["dropped"]), ("stays", own["lowest_kept"])):
            for document in documents:
                line = Text(f"  {title:>5} ")
                line.append_text(signed(document["score"], 5))
                name = f"{row['name']}:{document['document']}"  # as `inrun show --document` takes it
                line.append(f"  {name}  {shorten(document['source'], 28, keep_end=True)}  ")
                line.append(document["snippet"])
                out.print(line, no_wrap=True, overflow="ellipsis")
    if left:
        out.print(
            f"\nNot carried over (only .parquet files with one row per document are): {', '.join(left)}"
        )
    heading = (
        "The next run"
        if directory is None
        else f"{directory}: keep_list.parquet, curation.json; the next run"
    )
    out.print(Text(f"\n{heading}", style="bold"))
    # One line, however long: it is there to be pasted.
    out.print(Text(pasted(record)), soft_wrap=True)
