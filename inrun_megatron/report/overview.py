"""What the summary and the page say of a run as a whole: what was trained, its steps, losses and audits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.audits import check_additivity, check_coverage, check_efficiency, precision_of
from inrun_megatron.ledger.checks import Check, setting
from inrun_megatron.ledger.columns import integers, is_known, numbers, places, taken, texts
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.ledger.step_table import loss_changes
from inrun_megatron.report.query import Query

LINES = ("model", "training", "layout", "scoring")


def committed_ledger(run: Path | str) -> Ledger:
    """The ledger of a run. Raises UserError where there is none, or nothing is committed yet."""
    ledger = Ledger(run)
    if ledger.last_step < 1:
        raise UserError(f"{ledger.directory} has no committed step: no step is scored, or none committed yet")
    return ledger


def one_row_per_step(ledger: Ledger, steps: pa.Table) -> pa.Table:
    """Of `Ledger.steps()`, which has a row for each target as well: what does not depend on the target."""
    return steps.filter(pc.equal(pc.cast(steps["target"], pa.string()), ledger.target_names[0]))


def describe_run(ledger: Ledger) -> dict[str, Any]:
    """Identity, and one line each on model, training, layout and scoring; lines name only what run.json says, and what
    a resume changed of it (starts.json)."""
    run = ledger.run
    words = {name: [line] for name, line in _lines(ledger, run).items()}
    before = {name: line for name, (line,) in words.items()}
    for start in ledger.starts.resumed():
        for name, line in _lines(ledger, start).items():
            if line != before[name]:
                words[name].append(f"from step {start['step'] + 1}: {line}")
                before[name] = line
    return {
        "id": ledger.run_id,
        "directory": str(ledger.directory),
        "created": run.get("created"),
        **{name: "; ".join(filter(None, lines)) for name, lines in words.items()},
        "granularity": ledger.granularity,
        "versions": run.get("versions") or {},
    }


def _lines(ledger: Ledger, run: Mapping[str, Any]) -> dict[str, str]:
    """LINES in words. run: run.json, or a start that resumed it."""
    layout = run.get("layout") or {}
    model = _joined(
        _count(setting(run, "num_layers"), "layer"),
        _named("hidden", setting(run, "hidden_size")),
        _count(setting(run, "num_attention_heads"), "head"),
        _count(setting(run, "num_experts"), "expert"),
        _named("", setting(run, "normalization")),
        _named("positions", setting(run, "position_embedding_type")),
        _named("sequence", setting(run, "seq_length")),
    )
    training = _joined(
        _named("optimizer", setting(run, "optimizer", group="training") or setting(run, "optimizer")),
        _named("lr", setting(run, "lr")),
        _named("global batch", setting(run, "global_batch_size")),
        _named("micro batch", setting(run, "micro_batch_size", group="training")),
        _named("clipping at", setting(run, "clip_grad")),
        precision_of(run),
    )
    spread = _joined(
        *(f"{name.upper()} {size}" for name, size in layout.items() if isinstance(size, int)),
        _named("ZeRO", setting(run, "zero_stage")),
        "sequence parallel" if setting(run, "sequence_parallel") else None,
    )
    scoring = _joined(
        setting(run, "estimator"),
        "SGD proxy" if setting(run, "optimizer", group="shapley") == "sgd" else None,
        f"by {ledger.granularity}",
        _every(setting(run, "interval", group="shapley")),
        _refreshed(setting(run, "refresh", group="shapley")),
    )
    return dict(zip(LINES, (model, training, spread, scoring), strict=True))


def describe_steps(ledger: Ledger, steps: pa.Table) -> dict[str, Any]:
    """Counts of steps by status, samples and time. steps: `Ledger.steps()`."""
    own = one_row_per_step(ledger, steps)
    total, scoring = (
        float(np.where(is_known(own, name), numbers(own, name), 0.0).sum())
        for name in ("seconds_total", "seconds_scoring")
    )
    return {
        "last": ledger.last_step,
        "statuses": dict(Counter(own["status"].to_pylist())),
        "samples_scored": pc.sum(own["samples"], min_count=0).as_py(),
        "samples_consumed": pc.max(own["consumed_samples"]).as_py(),
        "seconds_total": total,
        "seconds_scoring": scoring,
        "scoring_share": scoring / total if total else None,
    }


def describe_targets(ledger: Ledger, steps: pa.Table) -> list[dict[str, Any]]:
    """First and last loss of each target, the loss change of the scored steps, and what the values explain of it.

    explained_fraction = (sum_values + momentum_term + decay_term) / realised, sums over the scored steps where all are
    known; see ledger/step_table.py. Under trajectory credit sum_values is that of the steps' own games.
    """
    changes = loss_changes(ledger.run, steps)
    with np.errstate(invalid="ignore"):  # what is not finite, the efficiency audit names
        changes = changes.where(np.isfinite(changes.realised) & np.isfinite(changes.predicted))
    step, loss, of = integers(steps, "step"), numbers(steps, "target_loss"), texts(steps, "target")
    described = []
    for target in ledger.targets:
        own, known = np.flatnonzero((of == target["name"]) & np.isfinite(loss)), changes.of(target["name"])
        realised, values, momentum, decay = (
            float(sums.sum()) for sums in (known.realised, known.batch, known.momentum, known.decay)
        )
        judged = len(known.step)
        described.append(
            {
                "name": target["name"],
                "sequences": target.get("sequences") or target.get("n"),
                "first_step": int(step[own[0]]) if len(own) else None,
                "first_loss": float(loss[own[0]]) if len(own) else None,
                "last_step": int(step[own[-1]]) if len(own) else None,
                "last_loss": float(loss[own[-1]]) if len(own) else None,
                "steps_judged": judged,
                "realised": realised if judged else None,
                "sum_values": values if judged else None,
                "momentum_term": momentum if judged else None,
                "decay_term": decay if judged else None,
                "explained_fraction": (values + momentum + decay) / realised if realised else None,
            }
        )
    return described


def audits_of(query: Query, steps: pa.Table) -> list[Check]:
    """The audits that need no pass over files and rows. steps: `Ledger.steps()`."""
    found = query.table("SELECT step, target, sum(absolute) AS absolute FROM cells GROUP BY step, target")
    run = query.ledger.run
    return [
        check_coverage(run),
        check_additivity(query.ledger.starts, steps, taken(numbers(found, "absolute"), places(steps, found))),
        check_efficiency(run, steps),
    ]


def _joined(*pieces: Any) -> str:
    return ", ".join(str(piece) for piece in pieces if piece)


def _named(name: str, value: Any) -> str | None:
    return None if value is None else f"{name} {value}".strip()


def _count(number: Any, noun: str) -> str | None:
    # Not `counted`: a run of one's own may describe itself with other things than integers.
    return None if number is None else f"{number} {noun}{'' if number == 1 else 's'}"


def _refreshed(refresh: Any) -> str | None:
    return (
        f"direction anew every {refresh} scored steps" if isinstance(refresh, int) and refresh > 1 else None
    )


def _every(interval: Any) -> str | None:
    if interval is None:
        return None
    return "every step" if interval == 1 else f"every {interval} steps"
