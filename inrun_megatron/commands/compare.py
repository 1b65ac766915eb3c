"""`inrun compare`: do two runs agree about what their data are worth?"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from inrun_megatron.commands.options import JsonOption, PhaseOption, StepsOption
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.report.comparison.agreement import compare as compare_runs
from inrun_megatron.report.comparison.matching import Side, shared_targets
from inrun_megatron.report.documents.lookup import Documents
from inrun_megatron.report.phases import choose_steps
from inrun_megatron.report.tables import console, print_json, signed, table, with_error
from inrun_megatron.report.text import shorten
from inrun_megatron.report.values.ranking import Level
from inrun_megatron.report.values.scores import Measure, Per

_RUN_HELP = "Run directory, or its ledger directory (shapley/)."
_DATA_HELP = "Where a dataset of RUN_{} lies now, if it has moved. Repeatable."


def compare(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help=_RUN_HELP)],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help=_RUN_HELP)],
    target: Annotated[
        str | None, typer.Option("--target", help="Target. Default: every target that both runs have.")
    ] = None,
    by: Annotated[
        Level, typer.Option(help="document or sample; datasets are always compared.")
    ] = Level.document,
    measure: Annotated[
        Measure, typer.Option(help="Values that are added up; normalised: every step weighs the same.")
    ] = Measure.normalised,
    per: Annotated[Per, typer.Option(help="What a sum is divided by.")] = Per.token,
    n: Annotated[int, typer.Option("-n", help="Movers in each direction.")] = 5,
    steps: StepsOption = None,
    phase: PhaseOption = None,
    data_a: Annotated[
        list[str] | None, typer.Option("--data-a", metavar="NAME=PREFIX", help=_DATA_HELP.format("A"))
    ] = None,
    data_b: Annotated[
        list[str] | None, typer.Option("--data-b", metavar="NAME=PREFIX", help=_DATA_HELP.format("B"))
    ] = None,
    json: JsonOption = False,
) -> None:
    """Rank correlation, biggest movers and domains of two runs.

    Example: inrun compare runs/small runs/large --target code --phase 2/2

    Documents are matched by the dataset they were prepared in and their number there: the runs may read them in another
    order, blend or selection (inrun curate). --steps and --phase apply to each run by its own length.
    """
    if n < 0:
        raise UserError(f"-n {n} is no number of movers; give 0 or more")
    if by is Level.dataset:
        raise UserError(
            "--by dataset needs no matching: the table of datasets is always shown; give document or sample"
        )
    sides = []
    for run, moved in ((run_a, data_a), (run_b, data_b)):
        ledger = Ledger(run)
        chosen = choose_steps(steps, phase, ledger.last_step)
        sides.append(Side(ledger, Documents(ledger, moved), chosen))
    a, b = sides
    targets = shared_targets(a.ledger, b.ledger, target)
    found = compare_runs(a, b, targets, by, measure, per, n)
    record = {
        "runs": [side.ledger.run_id for side in sides],
        "steps": [[side.phase.first, side.phase.last] for side in sides],
        "by": by.value,
        "measure": measure.value,
        "per": per.value,
        **found,
    }
    if json:
        print_json(record)
        return
    out = console()
    for position, (side, run) in enumerate(zip(sides, (run_a, run_b), strict=True)):
        letter, first, last = "AB"[position], side.phase.first, side.phase.last
        out.print(Text(f"{letter}  {run} ({side.ledger.run_id}), steps {first}-{last}"))
    for name, figures in record["targets"].items():
        _print(out, name, figures, by)
        _print_domains(out, [row for row in record["domains"] if row["target"] == name])


def _print(out: Console, name: str, figures: dict[str, Any], by: Level) -> None:
    out.print(Text(f"\nTarget {name}", style="bold"))
    if not figures["same_target"]:
        out.print(Text(f"  The runs' targets {name} are not the same sequences."))
    both = f"{figures['shared']:,} {by.value}s in both (A {figures['rows_a']:,}, B {figures['rows_b']:,})"
    out.print(Text(f"  Spearman {_two(figures['spearman'])}, Pearson {_two(figures['pearson'])} over {both}"))
    shares = [figures[key] for key in ("same_sign", "top_decile", "bottom_decile")]
    same, top, bottom = ("-" if share is None else f"{share:.0%}" for share in shares)
    out.print(Text(f"  Same sign: {same}. Of A's top tenth {top} is in B's, of its bottom tenth {bottom}.\n"))
    movers = [*figures["movers"]["up"], *reversed(figures["movers"]["down"])]
    if not movers:
        return
    made = table(
        [
            (f"{by.value.capitalize()} of A", "left"),
            "Percentile\nA",
            "\nB",
            "Change",
            ("From", "left"),
            ("Text", "left"),
        ]
    )
    made.columns[-1].ratio, made.expand = 1, True
    for mover in movers:
        made.add_row(
            Text(f"{shorten(mover['dataset_a'], 18)}:{mover[f'{by.value}_a']}"),
            f"{100 * mover['percentile_a']:.1f}",
            f"{100 * mover['percentile_b']:.1f}",
            signed(100 * mover["change"], 1),
            Text(shorten(mover["source_a"] or "-", 20, keep_end=True)),
            Text(mover["snippet"] or "-"),
        )
    out.print(made)
    out.print()


def _print_domains(out: Console, rows: list[dict[str, Any]]) -> None:
    made = table(
        [("Dataset", "left"), "Normalised mean\nA", "\nB", "Negative\nA", "\nB", "Samples\nA", "\nB"]
    )
    for row in rows:
        cells: list[str | Text] = [Text(shorten(row["name"], 24))]
        for letter in "ab":
            mean = row[f"normalised_mean_{letter}"]
            cells.append(
                Text("-") if mean is None else with_error(mean, row[f"standard_error_{letter}"], 1.0)
            )
        for letter in "ab":
            share = row[f"negative_share_{letter}"]
            cells.append("-" if share is None else f"{share:.0%}")
        for letter in "ab":
            samples = row[f"samples_{letter}"]
            cells.append("-" if samples is None else f"{samples:,}")
        made.add_row(*cells)
    out.print(made)


def _two(number: float | None) -> str:
    return "-" if number is None else f"{number:+.3f}"
