"""The printed form of `inrun summary`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from inrun_megatron.ledger.checks import Check
from inrun_megatron.ledger.schema import SCORED
from inrun_megatron.report.documents.attribution import IN_WORDS
from inrun_megatron.report.tables import (
    checks_table,
    decimals_of,
    in_nats,
    scale_near,
    scale_of,
    signed,
    table,
    with_error,
)
from inrun_megatron.report.text import shorten
from inrun_megatron.report.values.findings import finding


def render(summary: dict[str, Any], audits: Sequence[Check], out: Console) -> None:
    """Print `build_summary`'s figures."""
    _run(summary, out)
    _targets(summary["targets"], out)
    _heading("Value per sample, by domain", out)
    _say(
        "Positive: the samples lowered the target's loss. Values in nats per token of the target, ± standard error over "
        "training steps. Normalised: each value divided by the mean |value| of its step, so that every step weighs the "
        "same.",
        out,
    )
    for target in summary["targets"]:
        _domains(summary, target["name"], out)
    _documents(summary, out)
    _heading("Audits", out)
    out.print(checks_table(audits))
    not_finite = summary["rows"]["not_finite"] or 0
    if not_finite:
        _say(f"{not_finite:,} rows have values that are not finite and are left out of every figure.", out)
    _say(f"Files and rows of the ledger are checked by: inrun verify {summary['run']['directory']}", out)


def _run(summary: dict[str, Any], out: Console) -> None:
    run, steps = summary["run"], summary["steps"]
    _heading(f"Run {run['id']}", out)
    lines = [(name, run[name]) for name in ("model", "training", "layout", "scoring") if run[name]]
    scored = steps["statuses"].get(SCORED, 0)
    others = [f"{count:,} {status}" for status, count in steps["statuses"].items() if status != SCORED]
    story = f"{steps['last']:,}, of which {scored:,} scored"
    if others:
        story += f" ({'; '.join(others)})"
    story += f"; {steps['samples_scored']:,} samples scored"
    lines.append(("steps", story))
    if steps["seconds_total"]:
        share = steps["scoring_share"]
        lines.append(("time", f"{steps['seconds_total']:,.0f} s in steps, {share:.0%} of it for scoring"))
    made = Table.grid(padding=(0, 2))
    for name, text in lines:
        made.add_row(Text(name, style="dim"), Text(text))
    out.print(made)


def _targets(targets: Sequence[dict[str, Any]], out: Console) -> None:
    _heading("Loss of each target", out)
    made = table(
        [
            ("Target", "left"),
            "First",
            "Last",
            "Change",
            "By samples",
            "By momentum",
            "By decay",
            "Explained",
        ]
    )
    for target in targets:
        change = None if target["realised"] is None else -target["realised"]
        explained = target["explained_fraction"]
        # The ledger's terms are loss reductions; beside the change of the loss they carry its sign.
        terms = [target[name] for name in ("sum_values", "momentum_term", "decay_term")]
        made.add_row(
            Text(target["name"]),
            "-" if target["first_loss"] is None else f"{target['first_loss']:.4f}",
            "-" if target["last_loss"] is None else f"{target['last_loss']:.4f}",
            "-" if change is None else f"{change:+.4f}",
            *("-" if term is None else f"{0 - term:+.4f}" for term in terms),
            "-" if explained is None else f"{explained:.0%}",
        )
    out.print(made)
    _say(
        "Nats per token. Change: over the scored steps whose next loss is known; by samples, momentum and decay: what "
        "each predicts for it to the order of the estimator; explained: their sum / change.",
        out,
    )
    if any(target["first_loss"] is not None and not target["steps_judged"] for target in targets):
        _say(
            "The change over a scored step is known where the next step is scored as well. With --shapley-interval above 1 see "
            "`inrun report`, where a scored step stands for all up to the next one.",
            out,
        )


def _domains(summary: dict[str, Any], target: str, out: Console) -> None:
    rows = [row for row in summary["domains"] if row["target"] == target]
    unit, name = scale_near([row["mean"] for row in rows], _scale(summary))
    # One number of decimals to a column.
    digits, normalised_digits = (
        decimals_of(*(None if row[field] is None else row[field] / scale for row in rows))
        for field, scale in (("standard_error", unit), ("normalised_standard_error", 1.0))
    )
    made = table(
        [
            ("Phase", "left"),
            ("Domain", "left"),
            "Samples",
            f"Mean ± s.e.\n{in_nats(name)}",
            "Sum\nnats",
            "Negative",
            "Normalised\nmean ± s.e.",
        ]
    )
    for phase in dict.fromkeys((row["phase"], row["first_step"], row["last_step"]) for row in rows):
        group = [row for row in rows if (row["phase"], row["first_step"], row["last_step"]) == phase]
        labels = [phase[0], f"{phase[1]}-{phase[2]}"] + [""] * len(group)
        if len(group) == 1:
            labels = [" ".join(labels[:2])]
        for label, row in zip(labels, group, strict=False):
            made.add_row(
                Text(label),
                Text(shorten(row["name"], 22)),
                f"{row['samples']:,}",
                with_error(row["mean"], row["standard_error"], unit, digits),
                f"{row['sum']:+#.3g}",
                f"{row['negative_share']:.0%}",
                with_error(row["normalised_mean"], row["normalised_standard_error"], 1.0, normalised_digits),
            )
        made.add_section()
    _subheading(f"Target {target}", out)
    out.print(made)
    _say(_in_words(summary, target), out)


def _scale(summary: dict[str, Any]) -> tuple[float, str]:
    """The unit of all tables that it suits: that of the domains' means."""
    return scale_of([row["mean"] for row in summary["domains"]])


def _in_words(summary: dict[str, Any], target: str) -> str:
    """The last phase in a sentence."""
    phase, found = summary["phases"][-1], finding(summary, target)
    best, largest = found["best"], found["largest"]
    if best is None:
        return f"Steps {phase['first']}-{phase['last']}: no scored samples."
    harmful = [
        f"{row['name']} ({row['negative_share']:.0%} of its samples negative)" for row in found["harmful"]
    ]
    text = f"Steps {phase['first']}-{phase['last']}: {best['name']} has the highest normalised mean"
    if best["normalised_mean"] <= 0:
        text += ", and even that is not positive"
    text += f"; below zero by more than two standard errors: {', '.join(harmful) or 'none'}."
    if largest is not None:
        text += (
            f" One sample, {largest['dataset_name']}:{largest['sample']} in step {largest['step']}, has "
            f"{largest['value']:+.3g}: {largest['share']:.0%} of the sum of |values| of these steps. Mind it when you "
            f"read raw means and sums (inrun show --sample {largest['dataset_name']}:{largest['sample']})."
        )
    return text


def _documents(summary: dict[str, Any], out: Console) -> None:
    documents, error = summary["documents"], summary["documents_error"]
    if documents is None and error is None:
        return
    phase = summary["phases"][-1]
    _heading(f"Best and worst documents, steps {phase['first']}-{phase['last']}", out)
    if documents is None:
        _say(f"Documents cannot be shown: {error}", out)
        return
    _say(
        f"{IN_WORDS[summary['run']['granularity']]} More: inrun top, inrun show --document NAME:NUMBER.",
        out,
    )
    for target, found in documents.items():
        values = [row["value"] for kind in ("best", "worst") for row in found[kind]]
        unit, name = scale_near(values, _scale(summary))
        made = table(
            [
                ("", "left"),
                f"Value\n{in_nats(name)}",
                "Tokens",
                ("Document", "left"),
                ("From", "left"),
                ("Text", "left"),
            ]
        )
        made.columns[-1].ratio, made.expand = 1, True
        for kind in ("best", "worst"):
            for position, row in enumerate(found[kind]):
                made.add_row(
                    kind if position == 0 else "",
                    signed(row["value"] / unit),
                    f"{row['tokens']:,}",
                    Text(f"{shorten(row['dataset_name'], 16)}:{row['document']}"),
                    Text(shorten(row["source"], 24, keep_end=True)),
                    Text(row["snippet"]),
                )
            made.add_section()
        _subheading(f"Target {target}", out)
        out.print(made)


def _heading(text: str, out: Console) -> None:
    out.print(Text(f"\n{text}", style="bold underline"))


def _subheading(text: str, out: Console) -> None:
    out.print(Text(f"\n{text}", style="bold"))


def _say(text: str, out: Console) -> None:
    out.print(Text(text))
