"""What was trained, in words, and how each target's loss went."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from inrun_megatron.ledger.audits import precision_of
from inrun_megatron.ledger.checks import setting
from inrun_megatron.ledger.read import Ledger
from inrun_megatron.ledger.step_table import loss_changes

LINES = ("model", "training", "layout", "scoring")


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
    rows = [row for row in steps.to_pylist() if row["target"] == ledger.target_names[0]]
    total = sum(row["seconds_total"] or 0.0 for row in rows)
    scoring = sum(row["seconds_scoring"] or 0.0 for row in rows)
    consumed = [row["consumed_samples"] for row in rows if row["consumed_samples"] is not None]
    return {
        "last": ledger.last_step,
        "statuses": dict(Counter(row["status"] for row in rows)),
        "samples_scored": sum(row["samples"] for row in rows),
        "samples_consumed": max(consumed, default=None),
        "seconds_total": total,
        "seconds_scoring": scoring,
        "scoring_share": scoring / total if total else None,
    }


def describe_targets(ledger: Ledger, steps: pa.Table) -> list[dict[str, Any]]:
    """First and last loss of each target, the loss change of the scored steps, and what the values explain of it.

    explained_fraction = (sum_values + momentum_term + decay_term) / realised, sums over the scored steps where all are
    known; see ledger/step_table.py. Under trajectory credit sum_values is that of the steps' own games.
    """
    rows = steps.to_pylist()
    changes = loss_changes(ledger.run, rows)
    described = []
    for target in ledger.targets:
        own = [row for row in rows if row["target"] == target["name"] and _finite(row["target_loss"])]
        # What is not finite, the efficiency audit names.
        known = [
            change
            for change in changes
            if change.target == target["name"] and _finite(change.realised) and _finite(change.predicted)
        ]
        realised = sum(change.realised for change in known)
        values = sum(change.batch for change in known)
        momentum = sum(change.momentum for change in known)
        decay = sum(change.decay for change in known)
        described.append(
            {
                "name": target["name"],
                "sequences": target.get("sequences") or target.get("n"),
                "first_step": own[0]["step"] if own else None,
                "first_loss": own[0]["target_loss"] if own else None,
                "last_step": own[-1]["step"] if own else None,
                "last_loss": own[-1]["target_loss"] if own else None,
                "steps_judged": len(known),
                "realised": realised if known else None,
                "sum_values": values if known else None,
                "momentum_term": momentum if known else None,
                "decay_term": decay if known else None,
                "explained_fraction": (values + momentum + decay) / realised if realised else None,
            }
        )
    return described


def _finite(number: float | None) -> bool:
    return number is not None and math.isfinite(number)


def _joined(*pieces: Any) -> str:
    return ", ".join(str(piece) for piece in pieces if piece)


def _named(name: str, value: Any) -> str | None:
    return None if value is None else f"{name} {value}".strip()


def _count(number: Any, noun: str) -> str | None:
    return None if number is None else f"{number} {noun}{'' if number == 1 else 's'}"


def _refreshed(refresh: Any) -> str | None:
    return (
        f"direction anew every {refresh} scored steps" if isinstance(refresh, int) and refresh > 1 else None
    )


def _every(interval: Any) -> str | None:
    if interval is None:
        return None
    return "every step" if interval == 1 else f"every {interval} steps"
